"""``expert-group``: unused experts are stood in for by their outputs to tokens of the same group.

Dense Backpropagation Improves Routing (PMLR v262 panda24a); formulas in ``maths/groups.py``.
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor

from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.maths import functional, groups

logger = logging.getLogger(__name__)


class ExpertGroupRouter(ObservedTopKRouter):
    """Router that learns of an unused expert i from tokens that used i and share the group.

    No state: the table [N, N, D] is made anew for each micro-batch, over all ranks of the stage, so
    that it does not depend on the layout. Collectives: one all-reduce of ``4 N^2 (D + 1)`` bytes a
    layer and forward pass with gradients, and the dispatch of G numbers per token.
    """

    gives_scores_gradient = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the router; the arguments are Megatron's."""
        super().__init__(*args, **kwargs)
        # Not vector_width, which is the width of the step's sums.
        self.width = self.config.moe_latent_size or self.config.hidden_size
        self._table: Tensor | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Take the layer's number; the first layer says what the table costs."""
        super().set_layer_number(layer_number)
        if self.model_layer_number == 1 and os.environ.get("RANK", "0") == "0":
            size = 4 * self.num_experts**2 * (self.width + 1)
            logger.info(
                "--moe-router-gradient expert-group adds up %.1f MB a layer and micro-batch over"
                " the ranks of a pipeline stage",
                size / 1e6,
            )

    @property
    def _uses_table(self) -> bool:
        """Whether this pass needs the table: in the forward always, else where gradients flow."""
        in_forward = self.options.expert_group_in_forward
        return self.training and (in_forward or torch.is_grad_enabled())

    def _group(self) -> Tensor:
        assert self.routed_scores is not None
        return groups.membership(self.routed_scores.detach(), self.options.expert_group_size)

    def observe_experts(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> None:
        """Make the table of the micro-batch.

        Arguments as in :meth:`ObservedTopKRouter.observe_experts`.
        """
        super().observe_experts(rows, tokens_per_expert, probs)
        if not self._uses_table:
            return
        with torch.no_grad():
            self._table = self._make_table(rows.detach(), tokens_per_expert, probs.detach())

    def _make_table(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
        assert self.routed_scores is not None
        num, size = self.num_experts, self.options.expert_group_size
        group_TE = self._group()
        numbers_TG = group_TE.to(torch.float32).topk(size, dim=-1).indices
        carried_RG = self.dispatcher.carry(numbers_TG.to(torch.float32)).long()
        group_RE = torch.zeros(
            carried_RG.shape[0], num, dtype=torch.bool, device=rows.device
        ).scatter(1, carried_RG, True)
        flat = torch.zeros(num * num * (self.width + 1), device=rows.device)
        sums_EED = flat[: num * num * self.width].view(num, num, self.width)
        counts_EE = flat[num * num * self.width :].view(num, num)
        first = self.dispatcher.local_expert_indices[0]
        counts = tokens_per_expert.tolist()
        sums_EED[first : first + len(counts)] = groups.pair_sums(
            rows, counts, probs, group_RE, first
        )
        counts_EE.copy_(groups.pair_counts(self._active(), group_TE))
        torch.distributed.all_reduce(flat, group=self.tp_dp_cp_group)
        return groups.table(sums_EED, counts_EE)

    def finish_output(self, output: Tensor) -> Tensor:
        """Add the group term or its gradient to the routed experts' combined output.

        Arguments and result as in :meth:`ObservedTopKRouter.finish_output`.
        """
        if not self._uses_table:
            return super().finish_output(output)
        assert self._table is not None
        table_EED, self._table = self._table, None
        inactive_TE = functional.inactive_probs(self._dense(), self._active())
        result_TD = groups.attach(
            output.reshape(-1, self.width),
            inactive_TE,
            self._group(),
            table_EED,
            self.options.expert_group_size,
            self.options.expert_group_in_forward,
        )
        self._forget_routing()
        return result_TD.view_as(output)
