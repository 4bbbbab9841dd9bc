"""Default MoE (arXiv 2504.12463): the router that owns the default vectors.

``DefaultMoERouter`` keeps the default vectors [E, D] on every rank, because every rank's tokens may
need any of them, and takes from the router's logits what the layer needs of the experts that a
token did not use.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_default_moe.layers.layer_metrics import layer_metrics
from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.layers.step_sums import StepSums
from megatron_default_moe.maths import functional

SETTLED = 1_000_000
"""Number of updates after which 1 - beta^n is 1 in float32 for any useful beta."""


class DefaultMoERouter(ObservedTopKRouter):
    """Router that owns the default vectors and prepares what the layer adds of them.

    Buffers (checkpointed, float32 in every precision): ``default_vectors`` [E, D] and
    ``default_vector_updates`` [E], the number of updates each has had. Local sums of the running
    step are buffers too, but not checkpointed: they are zero between steps.
    """

    fp32_buffers = (*ObservedTopKRouter.fp32_buffers, "default_vectors", "local_sums")
    checkpointed = ("default_vectors", "default_vector_updates")

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
        weighting, active_TE = self.options.weighting, self._active()
        mass_E = functional.router_mass(self.routed_probs, active_TE, weighting).float()
        sums_eD = functional.expert_sums(
            rows.detach(), tokens_per_expert, probs.detach(), weighting
        ).float()
        if self.counts_this_pass:
            self._count(active_TE)
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
        vectors_ED = functional.ema(self.default_vectors, sums_ED, mass_E, self.options.beta)
        updates_E = self.default_vector_updates + functional.accepted_experts(sums_ED, mass_E)
        self._micro_batch_vectors = self._corrected(vectors_ED, updates_E)

    def vectors_in_use(self) -> Tensor:
        """[E, D] the default vectors that the current micro-batch uses."""
        if self._mixes_micro_batch:
            assert self._micro_batch_vectors is not None
            return self._micro_batch_vectors
        return self._corrected(self.default_vectors, self.default_vector_updates)

    def _corrected(self, vectors_ED: Tensor, updates_E: Tensor) -> Tensor:
        if not self.options.bias_correction:
            return vectors_ED
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
        inactive_TE = functional.inactive_probs(self._dense(), self._active())
        self._forget_routing()
        vectors_ED = self.vectors_in_use()
        flat_TD = output.reshape(-1, self.vector_width)
        if self.options.in_forward:
            result_TD = functional.add_default_term(flat_TD, inactive_TE, vectors_ED)
        else:
            result_TD = functional.attach_default_gradient(flat_TD, inactive_TE, vectors_ED)
        if self.collects_details and self.counts_this_pass:
            self._count_norms(flat_TD, result_TD)
        return result_TD.view_as(output)

    @torch.no_grad()
    def _count_norms(self, flat_TD: Tensor, result_TD: Tensor) -> None:
        totals = StepSums.view(self.local_stats, self.num_experts, 0).totals
        totals[2] += (result_TD - flat_TD).float().square().sum()
        totals[3] += result_TD.float().square().sum()

    def local_step_sums(self, out: StepSums) -> None:
        """Write this rank's share of the step into zeroed ``out`` and start the next step."""
        super().local_step_sums(out)
        out.sums[self.local_experts] = self.local_sums
        self.local_sums.zero_()

    def _commit(self, step: StepSums) -> None:
        """Blend the sums of the step into the default vectors."""
        if self.frozen_expert_bias:
            return
        accepted_E = functional.accepted_experts(step.sums, step.mass)
        self.rejected_updates.add_(((step.counts > 0) & ~accepted_E).sum())
        before = self.default_vectors
        after = functional.ema(before, step.sums, step.mass, self.options.beta)
        if self.collects_details:
            self.step_metrics = layer_metrics(step, before, after, self.rejected_updates)
        self.default_vectors.copy_(after)
        self.default_vector_updates.add_(accepted_E)
        self.awaits_baseline = False

    @torch.no_grad()
    def settle(self) -> None:
        """Take the vectors that have been set for settled: bias correction leaves them as is."""
        self.default_vector_updates.clamp_(max=1).mul_(SETTLED)
