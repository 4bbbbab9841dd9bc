"""Default MoE (arXiv 2504.12463): the router that owns the default vectors.

``DefaultMoERouter`` keeps the default vectors [E, D] on every rank, because every rank's tokens may
need any of them, and takes from the router's logits what the layer needs of the experts that a
token did not use.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_default_moe.layers.layer_metrics import layer_metrics, vector_metrics
from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.layers.step_sums import StepSums
from megatron_default_moe.maths import functional

_BLENDED_AT_ONCE = 2**24
"""Numbers of the default vectors of all layers that a commit blends at a time: 64 MB."""

SETTLED = 1_000_000
"""Number of updates after which 1 - beta^n is 1 in float32 for any useful beta."""


class DefaultMoERouter(ObservedTopKRouter):
    """Router that owns the default vectors and prepares what the layer adds of them.

    Buffers (checkpointed, float32 in every precision): ``default_vectors`` [E, D] and
    ``default_vector_updates`` [E], the number of updates each has had; with a fade-in also
    ``default_vector_steps`` [1], the optimizer steps taken since it began. Local sums of the
    running step are buffers too, but not checkpointed: they are zero between steps.
    """

    gives_scores_gradient = True
    fp32_buffers: tuple[str, ...] = (
        *ObservedTopKRouter.fp32_buffers,
        "default_vectors",
        "local_sums",
    )

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the router; the arguments are Megatron's, those of later versions included."""
        super().__init__(
            config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer, **kwargs
        )
        assert pg_collection is not None
        self.vector_width = config.moe_latent_size or config.hidden_size
        ep_size, ep_rank = pg_collection.ep.size(), pg_collection.ep.rank()
        num_local = self.num_experts // ep_size
        self.local_experts = slice(ep_rank * num_local, (ep_rank + 1) * num_local)
        self._new_buffer("default_vectors", (self.num_experts, self.vector_width))
        self._new_buffer("default_vector_updates", (self.num_experts,), torch.int64)
        self._new_buffer("local_sums", (num_local, self.vector_width), persistent=False)
        self._new_buffer("rejected_updates", (1,), torch.int64, persistent=False)
        if self.options.fade_in:
            self._new_buffer("default_vector_steps", (1,), torch.int64)
        # Order before-use: the vectors this micro-batch uses, from the experts' side to the end
        # of its layer: [E, D].
        self._micro_batch_vectors: Tensor | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Take the global layer number, which also seeds a Gaussian start of the vectors."""
        super().set_layer_number(layer_number)
        if self.options.init == "gaussian":
            # The same numbers on every rank and in every layout: seeded by the layer alone.
            generator = torch.Generator().manual_seed(self.model_layer_number)
            start = torch.randn(self.default_vectors.shape, generator=generator)
            self.default_vectors.copy_(start * self.config.init_method_std)

    def _forget_routing(self) -> None:
        super()._forget_routing()
        self._micro_batch_vectors = None

    @property
    def rows_may_be_padding(self) -> bool:
        """Whether experts get rows of probability zero, whose outputs may be anything."""
        config = self.config
        return bool(
            config.moe_pad_expert_input_to_capacity
            or config.moe_router_padding_for_quantization
            or config.moe_token_dispatcher_type == "flex"
        )

    @property
    def uses_scores(self) -> bool:
        """Whether this forward pass gives the scores a gradient."""
        return self.uses_vectors

    @property
    def uses_vectors(self) -> bool:
        """Whether this forward pass adds the default term."""
        return self.training or self.options.in_eval

    @property
    def _mixes_micro_batch(self) -> bool:
        """Whether this pass blends its own outputs into the vectors it uses (before-use)."""
        return self.training and self.options.order == "before-use"

    def observe_experts(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> None:
        """Take the local experts' outputs of one micro-batch into the sums of the step.

        Args:
            rows: [R, D] outputs, each already multiplied by its probability, sorted by expert.
                With expert tensor parallelism they are partial sums; the sum over ranks is exact.
            tokens_per_expert: [e] row counts.
            probs: [R] the probabilities.
        """
        if not (self.counts_this_pass or self._mixes_micro_batch):
            return
        assert self.routed_probs is not None
        weighting = self.options.weighting
        mass_E = functional.router_mass(self.routed_probs, weighting).float()
        sums_eD = functional.expert_sums(
            rows.detach(),
            tokens_per_expert,
            probs.detach(),
            weighting,
            padded=self.rows_may_be_padding,
        ).float()
        if self.counts_this_pass:
            self._count(self._active())
            StepSums.view(self.local_stats, self.num_experts, 0).mass.add_(mass_E)
            self.local_sums.add_(sums_eD)
        if self._mixes_micro_batch:
            self._mix_micro_batch(sums_eD, mass_E)

    def _mix_micro_batch(self, sums_eD: Tensor, own_mass_E: Tensor) -> None:
        """Order before-use: the vectors of this micro-batch, from all ranks of the stage."""
        flat = self.local_stats.new_zeros(self.num_experts * (self.vector_width + 1))
        sums_ED = flat[: -self.num_experts].view(self.num_experts, self.vector_width)
        mass_E = flat[-self.num_experts :]
        sums_ED[self.local_experts] = sums_eD
        mass_E.copy_(own_mass_E)
        torch.distributed.all_reduce(flat, group=self.tp_dp_cp_group)
        mean_ED, accepted_E = functional.mean_outputs(sums_ED, mass_E)
        beta = self.options.beta
        vectors_ED = functional.blend(self.default_vectors, mean_ED, accepted_E, beta)
        self._micro_batch_vectors = self._corrected(vectors_ED, accepted_E)

    def vectors_in_use(self) -> Tensor:
        """[E, D] the default vectors that the current micro-batch uses."""
        if self._mixes_micro_batch:
            assert self._micro_batch_vectors is not None
            return self._micro_batch_vectors
        return self._corrected(self.default_vectors)

    def faded(self, inactive_TE: Tensor) -> Tensor:
        """The inactive probabilities as the forward uses them: less of them during a fade-in."""
        fraction = self.fade_in_fraction()
        return inactive_TE if fraction is None else functional.faded(inactive_TE, fraction)

    def fade_in_fraction(self) -> Tensor | None:
        """[1] float32, how much of the default term the forward has; None without a fade-in."""
        if not self.options.fade_in:
            return None
        return functional.fade_in_fraction(self.default_vector_steps, self.options.fade_in)

    def _corrected(self, vectors_ED: Tensor, just_updated_E: Tensor | None = None) -> Tensor:
        """The vectors to use; ``just_updated_E`` marks those with an update that is not counted."""
        if not self.options.bias_correction:
            return vectors_ED
        updates_E = self.default_vector_updates
        if just_updated_E is not None:
            updates_E = updates_E + just_updated_E
        return functional.bias_corrected(vectors_ED, updates_E, self.options.beta)

    def finish_output(self, output: Tensor) -> Tensor:
        """Add the default vectors to the routed experts' combined output of the micro-batch.

        Args:
            output: [..., D] of this rank's tokens, in the order the router saw them.

        Returns:
            The same shape and dtype; the argument itself where no default vectors are used.

        Raises:
            AssertionError: the micro-batch's routing has not come here. Without it the term would
                be left out of this layer, unnoticed.
        """
        if not self.uses_vectors:
            return super().finish_output(output)
        inactive_TE = self.faded(functional.inactive_probs(self._dense(), self._active()))
        vectors_ED = self.vectors_in_use()
        self._forget_routing()
        flat_TD = output.reshape(-1, self.vector_width)
        if self.options.in_forward:
            result_TD = functional.add_default_term(flat_TD, inactive_TE, vectors_ED)
        else:
            result_TD = functional.attach_default_gradient(flat_TD, inactive_TE, vectors_ED)
        if self.collects_details and self.counts_this_pass:
            self._count_norms(inactive_TE, vectors_ED, result_TD)
        return result_TD.view_as(output)

    @torch.no_grad()
    def _count_norms(self, inactive_TE: Tensor, vectors_ED: Tensor, result_TD: Tensor) -> None:
        totals = StepSums.view(self.local_stats, self.num_experts, 0).totals
        if self.options.in_forward:
            # Not the difference of the outputs, in which a bf16 output has lost a small term.
            term_TD = inactive_TE.to(vectors_ED.dtype) @ vectors_ED
            totals[2] += term_TD.square().sum()
        totals[3] += result_TD.float().square().sum()

    def local_step_sums(self) -> list[Tensor]:
        """Return the buffers that the running step is summed up in on this rank."""
        return [*super().local_step_sums(), self.local_sums]

    def step_parts(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pair the parts of ``flat`` with the local sums that go there."""
        sums_ED = StepSums.view(flat, self.num_experts, self.vector_width).sums
        return [*super().step_parts(flat), (sums_ED[self.local_experts], self.local_sums)]

    @classmethod
    def take_step(cls, taking: Sequence[ObservedTopKRouter]) -> None:
        """Blend the sums of the step into the default vectors, many layers at a time."""
        routers = [
            router
            for router in taking
            if isinstance(router, DefaultMoERouter) and not router.frozen_expert_bias
        ]
        if routers:
            at_a_time = max(1, _BLENDED_AT_ONCE // routers[0].default_vectors.numel())
            for first in range(0, len(routers), at_a_time):
                _blend_together(routers[first : first + at_a_time])

    @torch.no_grad()
    def settle(self) -> None:
        """Take the vectors that have been set for settled: bias correction leaves them as is."""
        self.default_vector_updates.clamp_(max=1).mul_(SETTLED)
        self.count_fade_in_from(0)

    @torch.no_grad()
    def count_fade_in_from(self, steps: int) -> None:
        """Set the number of steps taken of a fade-in, if there is one."""
        if self.options.fade_in:
            self.default_vector_steps.fill_(steps)


def _blend_together(routers: list[DefaultMoERouter]) -> None:
    """Blend the pending sums of some layers into their vectors: [L, E, D], layer by layer."""
    steps = [router.pending for router in routers if router.pending is not None]
    mean_LED, accepted_LE = functional.mean_outputs(
        torch.stack([step.sums for step in steps]), torch.stack([step.mass for step in steps])
    )
    counted_LE = torch.stack([step.counts for step in steps]) > 0
    before_LED = torch.stack([router.default_vectors for router in routers])
    beta = routers[0].options.beta
    after_LED = functional.blend(before_LED, mean_LED, accepted_LE, beta)
    rejected_L1 = (counted_LE & ~accepted_LE).sum(-1, keepdim=True)
    torch._foreach_add_([router.rejected_updates for router in routers], list(rejected_L1))
    for router, step, before_ED, after_ED in zip(
        routers, steps, before_LED, after_LED, strict=True
    ):
        if router.collects_details:
            own = vector_metrics(step, before_ED, after_ED, router.rejected_updates)
            router.step_metrics = layer_metrics(step, {**router.own_metrics(), **own})
    torch._foreach_copy_([router.default_vectors for router in routers], list(after_LED))
    if routers[0].options.fade_in:
        torch._foreach_add_([router.default_vector_steps for router in routers], 1)
    updates = [router.default_vector_updates for router in routers]
    torch._foreach_add_(updates, list(accepted_LE.to(torch.int64)))
