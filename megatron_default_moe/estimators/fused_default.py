"""The router with default vectors on Triton kernels: one launch where the experts' rows pass by.

The state, the step and the formulas are ``DefaultMoERouter``'s. What differs is when and where the
work is done: the routing leaves its tensors as they are; :mod:`kernel_sums` takes all statistics of
the pass in one launch, and :mod:`kernels` makes the probabilities, masks them, multiplies and adds
in another, with one launch in the backward pass.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_default_moe.estimators.default import DefaultMoERouter
from megatron_default_moe.kernels import sums, term
from megatron_default_moe.layers.step_sums import StepSums
from megatron_default_moe.maths import functional


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
        **kwargs: Any,
    ) -> None:
        """Build the router; the arguments are Megatron's, those of later versions included."""
        super().__init__(
            config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer, **kwargs
        )
        tickets = sums.num_tickets(self.local_sums.shape[0], self.vector_width)
        self._new_buffer("kernel_tickets", (tickets,), torch.int32, persistent=False)

    def observe_experts(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> None:
        """Take the statistics of one micro-batch, the router's side included; one launch.

        Arguments as in :meth:`DefaultMoERouter.observe_experts`.
        """
        if not (self.counts_this_pass or self._mixes_micro_batch):
            return
        assert self.routed_probs is not None
        if self.collects_details and self.counts_this_pass:
            self._count_entropy()
        stats = StepSums.view(self.local_stats, self.num_experts, 0)
        step = sums.StatisticsOut(self.local_sums, stats.mass, stats.counts, stats.totals[:1])
        out = step
        if self._mixes_micro_batch:
            # Order before-use needs the micro-batch's own sums, too.
            out = sums.StatisticsOut(*(torch.zeros_like(total) for total in step))
        sums.add_statistics(
            rows,
            tokens_per_expert,
            probs,
            self.routed_probs,
            self.options.weighting,
            self.kernel_tickets,
            out,
        )
        if self._mixes_micro_batch:
            if self.counts_this_pass:
                torch._foreach_add_(list(step), list(out))
            self._mix_micro_batch(out.sums_eD, out.mass_E)

    def finish_output(self, output: Tensor) -> Tensor:
        """Add the default vectors to the routed experts' combined output; one launch.

        Arguments and result as in :meth:`DefaultMoERouter.finish_output`.
        """
        if not self.uses_vectors:
            return super().finish_output(output)
        scores_TE, probs_TE = self.routed_scores, self.routed_probs
        assert scores_TE is not None, "the routing of this micro-batch is not known"
        assert probs_TE is not None
        scale = self.config.moe_router_topk_scaling_factor or 1.0
        if self.score_function != "softmax":
            scores_TE, scale = self._dense(), None
        flat_TD = output.reshape(-1, self.vector_width)
        vectors_ED = self.vectors_in_use()
        result_TD = term.add_default_term(
            flat_TD,
            scores_TE,
            probs_TE,
            vectors_ED,
            softmax_scale=scale,
            in_forward=self.options.in_forward,
            fraction=self.fade_in_fraction(),
        )
        if self.collects_details and self.counts_this_pass:
            inactive_TE = self.faded(functional.inactive_probs(self._dense(), self._active()))
            self._count_norms(inactive_TE, vectors_ED, result_TD)
        self._forget_routing()
        return result_TD.view_as(output)
