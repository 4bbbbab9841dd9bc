"""The router with default vectors on Triton kernels: one launch where the experts' rows pass by.

The state, the step and the formulas are ``DefaultMoERouter``'s. What differs is when and where the
work is done: the routing leaves its tensors as they are; :mod:`kernel_sums` takes all statistics of
the pass in one launch, and :mod:`kernels` makes the probabilities, masks them, multiplies and adds
in another, with one launch in the backward pass.
"""

from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_default_moe import functional, kernel_sums, kernels
from megatron_default_moe.router import DefaultMoERouter
from megatron_default_moe.step_sums import StepSums


class _Routed(NamedTuple):
    """What a routing leaves for its layer: arguments of ``kernels.add_default_term``."""

    scores_TE: Tensor
    probs_TE: Tensor
    map_TE: Tensor
    softmax_scale: float | None


class FusedDefaultMoERouter(DefaultMoERouter):
    """DefaultMoERouter whose work on tokens and rows is done by Triton kernels.

    A softmax gate is computed inside the kernels; other gates hand over their probabilities. Same
    results as the parent within rounding, the same bits on every run.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        """Build the router; the arguments are Megatron's."""
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        tickets = kernel_sums.num_tickets(self.local_sums.shape[0], self.vector_width)
        self._new_buffer("kernel_tickets", (tickets,), torch.int32, persistent=False)
        # Between this router's forward and the end of its layer's.
        self._routed: _Routed | None = None

    def _look(self, logits_TE: Tensor, probs_TE: Tensor, map_TE: Tensor) -> Tensor:
        if self.collects_details and self.counts_this_pass:
            self._count_entropy(self.dense_probs(logits_TE.detach()))
        scores_TE, scale = logits_TE, self.config.moe_router_topk_scaling_factor or 1.0
        if self.score_function != "softmax" or self.options.normalized_gate:
            scores_TE, scale = self.dense_probs(logits_TE), None
        if self.options.normalized_gate:
            active_TE = map_TE & (probs_TE != 0)
            probs_TE = functional.replace_active_probs(probs_TE, active_TE, scores_TE)
        self._routed = _Routed(scores_TE, probs_TE.detach(), map_TE, scale)
        return probs_TE

    def observe_experts(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> None:
        """Take the statistics of one micro-batch, the router's side included; one launch.

        Arguments as in :meth:`DefaultMoERouter.observe_experts`.
        """
        if not (self.counts_this_pass or self._mixes_micro_batch):
            return
        assert self._routed is not None
        stats = StepSums.view(self.local_stats, self.num_experts, 0)
        step = kernel_sums.StatisticsOut(
            self.local_sums, stats.mass, stats.counts, stats.totals[:1]
        )
        out = step
        if self._mixes_micro_batch:
            # Order before-use needs the micro-batch's own sums, too.
            out = kernel_sums.StatisticsOut(*(torch.zeros_like(total) for total in step))
        kernel_sums.add_statistics(
            rows,
            tokens_per_expert,
            probs,
            self._routed.probs_TE,
            self._routed.map_TE,
            self.options.weighting,
            self.kernel_tickets,
            out,
        )
        if self._mixes_micro_batch:
            if self.counts_this_pass:
                torch._foreach_add_(list(step), list(out))
            self._micro_batch_mass = out.mass_E
            self._mix_micro_batch(out.sums_eD)

    def add_default_term(self, output: Tensor) -> Tensor:
        """Add the default vectors to the routed experts' combined output; one launch.

        Arguments and result as in :meth:`DefaultMoERouter.add_default_term`.
        """
        routed, self._routed = self._routed, None
        if routed is None or not self.uses_vectors:
            return output
        flat_TD = output.reshape(-1, self.vector_width)
        result_TD = kernels.add_default_term(
            flat_TD,
            routed.scores_TE,
            routed.probs_TE,
            routed.map_TE,
            self.vectors_in_use(),
            softmax_scale=routed.softmax_scale,
            in_forward=self.options.in_forward,
        )
        if self.collects_details and self.counts_this_pass:
            self._count_norms(flat_TD, result_TD)
        return result_TD.view_as(output)
