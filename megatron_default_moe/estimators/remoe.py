"""``remoe``: experts whose gate ``ReLU(W x)`` is open run; a loss closes the right number of them.

arXiv 2412.14711. No softmax and no top-k: the gate is differentiable as it is. The weight of the
loss adapts to the sparsity of the model, which starts dense.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.maths import balance


class ReMoERouter(ObservedTopKRouter):
    """ReMoE: a gate per expert, and a load-balanced L1 loss with an adaptive weight.

    State: ``sparsity_weight`` [1] float32, the weight of the loss (lambda), the same in every layer
    and on every rank. Collectives: [E] counts a layer and forward pass over the stage, and two
    numbers a step over the pipeline.
    """

    fp32_buffers = (*ObservedTopKRouter.fp32_buffers, "sparsity_weight")
    number_varies = True
    model_wide = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the router; the arguments are Megatron's."""
        super().__init__(*args, **kwargs)
        self._new_buffer("sparsity_weight", (1,))
        self.sparsity_weight.fill_(self.options.remoe_lambda)

    @property
    def chooses(self) -> bool:
        """Always: a gate that is open is a choice."""
        return True

    def dense_probs(self, logits_TE: Tensor) -> Tensor:
        """[T, E] the gates."""
        return torch.relu(logits_TE)

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Open the gates; arguments and results as :meth:`ObservedTopKRouter.choose`."""
        gates_TE = torch.relu(logits_TE)
        return gates_TE, gates_TE > 0

    def balance(
        self,
        probs_TE: Tensor,
        logits_TE: Tensor,
        chosen_TE: Tensor,
        shape: tuple[int, int],
        padding_T: Tensor | None,
    ) -> Tensor:
        """Attach ``lambda N sum_i f_i mean_t gate_i``, ``f_i = open_i / (T k)``.

        T and f are of the micro-batch of all ranks. Arguments as
        :meth:`ObservedTopKRouter.balance`.
        """
        assert padding_T is None, "remoe with padding"
        open_E = chosen_TE.sum(0).to(torch.float32)
        torch.distributed.all_reduce(open_E, group=self.tp_dp_cp_group)
        ranks = self.tp_dp_cp_group.size()
        num_tokens = probs_TE.shape[0] * ranks
        # A rank's share of the mean; gradients are averaged over data-parallel ranks afterwards.
        dp_size = ranks // self.tp_cp_group.size()
        mean_E = probs_TE.float().sum(0) / num_tokens
        weight = self.sparsity_weight.squeeze(0) * dp_size
        loss = balance.sparsity_loss(weight, mean_E, open_E, num_tokens, self.topk)
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            probs_TE,
            weight,
            loss,
            "remoe_l1_loss",
            self.tp_dp_cp_group,
            needs_dp_avg=False,
        )
        return attached

    def own_metrics(self) -> dict[str, Tensor]:
        """This layer's sparsity, and the weight of the loss that the step had."""
        assert self.pending is not None
        routed, possible = self.pending.load().unbind()
        return {
            **super().own_metrics(),
            "remoe sparsity": 1 - routed / possible.clamp_min(1),
            "remoe lambda": self.sparsity_weight[0].clone(),
        }

    @classmethod
    def take_step(cls, taking: Any) -> None:
        """Move lambda towards the sparsity ``1 - k / N``."""
        super().take_step(taking)
        for router in taking:
            assert router.model_load is not None
            routed, possible = router.model_load.unbind()
            factor = balance.sparsity_weight_factor(
                routed, possible, router.topk, router.num_experts, router.options.remoe_factor
            )
            router.sparsity_weight.mul_(factor)
