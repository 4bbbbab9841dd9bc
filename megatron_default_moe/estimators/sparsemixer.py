"""``sparsemixer`` and ``sparsemixer-v2``: experts are drawn, and the draw's gradient estimated.

arXiv 2310.00811 and 2409.12136 (GRIN); the formulas are in ``maths/sparsemixer.py``.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_default_moe.estimators.draws import Draws, places
from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.maths import hashing, sparsemixer


class SparseMixerV2Router(ObservedTopKRouter):
    """SparseMixer-v2 (K = 1 or 2).

    State: ``draw_steps`` [1] int64, the steps taken, on which the draws depend. Extra work: a
    softmax and a hash of [T, E] per choice. No collective.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the router; the arguments are Megatron's."""
        super().__init__(*args, **kwargs)
        self._new_buffer("draw_steps", (1,), torch.int64)
        self._draws: Draws | None = None
        # Sequence length and batch size of the micro-batch that is being routed.
        self._shape = (0, 0)

    @property
    def chooses(self) -> bool:
        """Always: experts are drawn."""
        return True

    def set_layer_number(self, layer_number: int) -> None:
        """Take the layer's number, which seeds its draws."""
        super().set_layer_number(layer_number)
        self._draws = Draws(self.model_layer_number)

    def begin_step(self) -> None:
        """Begin the step's draws."""
        if self._draws is not None:
            self._draws.begin_step()

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Route; the draws depend on where in the batch a token stands."""
        self._shape = logits.shape[0], logits.shape[1]
        return super().routing(logits, *args, **kwargs)

    def uniforms(self, columns: int) -> Tensor | None:
        """[T, columns] numbers in (0, 1) for this micro-batch; None in evaluation."""
        if not self.training:
            return None
        assert self._draws is not None, "set_layer_number was not called"
        key = self._draws.key(self.draw_steps)
        return hashing.uniforms(key, places(self, *self._shape), columns)

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Draw K experts per token; arguments and results as :meth:`ObservedTopKRouter.choose`."""
        scores_TE = logits_TE.float()
        uniforms_KTE = coins_KT = None
        columns = self.num_experts + 1
        drawn = self.uniforms(self.topk * columns)
        if drawn is not None:
            drawn_KTC = drawn.view(-1, self.topk, columns).transpose(0, 1)
            uniforms_KTE, coins_KT = drawn_KTC[..., :-1], drawn_KTC[..., -1]
        choices = sparsemixer.sparsemixer_v2(
            scores_TE, self.topk, self.options.mask_width, uniforms_KTE, coins_KT
        )
        self.choice = [choice.expert_T for choice in choices]
        probs_TE, chosen_TE = sparsemixer.combine(choices, self.num_experts)
        return probs_TE.type_as(logits_TE), chosen_TE

    def multipliers_again(self, logits_TE: Tensor, probe: Any) -> Tensor:
        """As :meth:`ObservedTopKRouter.multipliers_again`: what the derivative is taken of."""
        return sparsemixer.given(logits_TE, probe.choice, self.options.mask_width)

    @classmethod
    def take_step(cls, taking: Any) -> None:
        """Count the step."""
        super().take_step(taking)
        for router in taking:
            router.draw_steps.add_(1)


class SparseMixerRouter(SparseMixerV2Router):
    """SparseMixer (K = 1), with its learned scale omega of the output.

    State beside the draws': ``output_scale`` [D], a parameter that starts at one (omega; it can be
    folded into the experts' last matrices after training).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the router; the arguments are Megatron's."""
        super().__init__(*args, **kwargs)
        width = self.config.moe_latent_size or self.config.hidden_size
        scale = torch.ones(
            width, dtype=self.config.params_dtype, device=torch.cuda.current_device()
        )
        self.output_scale = torch.nn.Parameter(scale)
        # Each rank sees its part of the sequence: Megatron adds the gradients up over them.
        self.output_scale.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one expert per token."""
        drawn = self.uniforms(self.num_experts + 1)
        choice = sparsemixer.sparsemixer(
            logits_TE.float(),
            self.options.mask_width,
            None if drawn is None else drawn[:, :-1],
            None if drawn is None else drawn[:, -1],
        )
        self.choice = [choice.expert_T]
        probs_TE, chosen_TE = sparsemixer.combine([choice], self.num_experts)
        return probs_TE.type_as(logits_TE), chosen_TE

    def multipliers_again(self, logits_TE: Tensor, probe: Any) -> Tensor:
        """As :meth:`ObservedTopKRouter.multipliers_again`; v1's derivative is twice p's."""
        return 2 * super().multipliers_again(logits_TE, probe)

    def finish_output(self, output: Tensor) -> Tensor:
        """Scale the routed experts' output."""
        return super().finish_output(output * self.output_scale)
