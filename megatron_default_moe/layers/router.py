"""Routers: Megatron's TopKRouter that counts its load, and the one that owns default vectors.

Both leave the routing itself to Megatron and look at its result later, when the experts have run:
what lies between may be replayed from a CUDA graph. ``DefaultMoERouter`` keeps the default vectors
[E, D] on every rank, because every rank's tokens may need any of them, and takes from the router's
logits what the layer needs of the experts a token did not use.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_default_moe.layers.step_sums import StepSums
from megatron_default_moe.loop import tracker
from megatron_default_moe.maths import functional
from megatron_default_moe.options.config import RouterGradientConfig

SETTLED = 1_000_000
"""Number of updates after which 1 - beta^n is 1 in float32 for any useful beta."""


class ObservedTopKRouter(TopKRouter):
    """Megatron's TopKRouter, bit for bit, that also counts its load for the metrics."""

    fp32_buffers: tuple[str, ...] = ("local_stats",)
    """Buffers that stay float32 in a bf16 or fp16 model."""
    carried = ("routed_scores", "routed_probs", "routed_map")
    """What a routing leaves for its layer: tensors, so that a CUDA graph can hand them on."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        """Build the router; the arguments are Megatron's."""
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.options: RouterGradientConfig = config.router_gradient
        # Only routers with default vectors carry sums of expert outputs.
        self.vector_width = 0
        # Set by the training step on the steps that are logged: entropies and norms cost a pass.
        self.collects_details = False
        # Set by calibrate.py: evaluation passes count, as one step without gradients.
        self.calibrating = False
        # Between this router's forward and the end of its layer's, all [T, E]: the logits that were
        # routed (with a normalised gate the probabilities of all experts), with their gradient
        # where default vectors give them one;
        self.routed_scores: Tensor | None = None
        # what the experts' outputs are multiplied by, without it; and the chosen experts.
        self.routed_probs: Tensor | None = None
        self.routed_map: Tensor | None = None
        # The all-reduced sums of the running step, between gradient finalisation and commit.
        self.pending: StepSums | None = None
        # tracker.layer_metrics of the last step, if it was taken and is logged.
        self.step_metrics: Tensor | None = None
        self._new_buffer("local_stats", (StepSums.numel(self.num_experts, 0),), persistent=False)

    def _new_buffer(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        persistent: bool = True,
    ) -> None:
        # An explicit device, like upstream's buffers: under `with torch.device("meta")` they would
        # otherwise be materialised as garbage later.
        device = torch.cuda.current_device()
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow device moves, but keep the float32 buffers' dtype and every bit of them."""
        before = {name: getattr(self, name) for name in self.fp32_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @property
    def model_layer_number(self) -> int:
        """Number of the layer in the model, from 1; MTP layers come after the decoder's.

        Megatron numbers MTP layers from 1 again and adds them up like this for its own log
        (``TopKRouter.apply_z_loss``).
        """
        number: int = self.layer_number
        return number + self.config.num_layers if self.is_mtp_layer else number

    @property
    def counts_this_pass(self) -> bool:
        """Whether this forward pass is one that the optimizer step will take gradients from.

        Not evaluation, and not the first of the two passes of activation recomputation, which
        runs without gradients.
        """
        if self.calibrating:
            return not self.training
        return self.training and torch.is_grad_enabled()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route with Megatron's code and leave the result for the layer (``TopKRouter.routing``).

        Nothing else happens here: a CUDA graph may replay this method without running it.
        """
        probs_TE, map_TE = super().routing(logits, padding_mask)
        scores_TE = logits.reshape(-1, self.num_experts)
        if self.options.normalized_gate:
            scores_TE = self.dense_probs(scores_TE)
            active_TE = map_TE & (probs_TE != 0)
            probs_TE = functional.replace_active_probs(probs_TE, active_TE, scores_TE)
        # Only default vectors give them a gradient; for others a graph would carry one of zeros.
        self.routed_scores = scores_TE if self.options.uses_default_vectors else scores_TE.detach()
        self.routed_probs = probs_TE.detach()
        self.routed_map = map_TE
        return probs_TE, map_TE

    def _active(self) -> Tensor:
        """[T, E] bool: the experts that each token of the micro-batch uses."""
        assert self.routed_map is not None
        assert self.routed_probs is not None
        # A padding token of a filled-up expert is in the map with probability zero.
        return self.routed_map & (self.routed_probs != 0)

    def _dense(self) -> Tensor:
        """[T, E] the micro-batch's probabilities of all experts, see :meth:`dense_probs`."""
        assert self.routed_scores is not None, "the routing of this micro-batch is not known"
        if self.options.normalized_gate:
            return self.routed_scores
        return self.dense_probs(self.routed_scores)

    def observe_experts(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> None:
        """Count what was routed, in passes that count.

        Called when the experts have run; the arguments are :class:`DefaultMoERouter`'s business.
        """
        if self.counts_this_pass:
            self._count(self._active())

    def add_default_term(self, output: Tensor) -> Tensor:
        """Return the routed experts' combined output as it is: there are no default vectors."""
        self._forget_routing()
        return output

    def _forget_routing(self) -> None:
        for name in self.carried:
            setattr(self, name, None)

    @torch.no_grad()
    def _count(self, active_TE: Tensor) -> None:
        stats = StepSums.view(self.local_stats, self.num_experts, 0)
        stats.counts.add_(active_TE.sum(0))
        stats.totals[0] += active_TE.shape[0]
        if self.collects_details:
            self._count_entropy()

    @torch.no_grad()
    def _count_entropy(self) -> None:
        scores_TE = self._dense().float()
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        totals = StepSums.view(self.local_stats, self.num_experts, 0).totals
        totals[1] += torch.special.entr(scores_TE).sum()

    def dense_probs(self, logits_TE: Tensor) -> Tensor:
        """Return the probabilities of all experts, as Megatron computes those of the chosen.

        An expert bias is not in them: it only takes part in the choice.

        Args:
            logits_TE: [T, E] the logits the routing saw (jitter and forced values included).

        Returns:
            [T, E] in the dtype of the logits: scores in float32, scaled, then cast
            (``moe_utils.topk_routing_with_score_function``). With ``normalized_gate`` the sum of
            the scores is over all experts, where Megatron's is over the chosen.
        """
        if self.score_function == "softmax":
            scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        elif self.score_function == "sigmoid":
            scores_TE = torch.sigmoid(logits_TE.float())
        else:
            assert self.score_function == "sqrtsoftplus", self.score_function
            scores_TE = torch.nn.functional.softplus(logits_TE.float()).sqrt()
        if self.options.normalized_gate:
            scores_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        if self.config.moe_router_topk_scaling_factor:
            scores_TE = scores_TE * self.config.moe_router_topk_scaling_factor
        return scores_TE.type_as(logits_TE)

    def local_step_sums(self, out: StepSums) -> None:
        """Write this rank's share of the step into zeroed ``out`` and start the next step."""
        stats = StepSums.view(self.local_stats, self.num_experts, 0)
        out.mass.copy_(stats.mass)
        out.counts.copy_(stats.counts)
        out.totals.copy_(stats.totals)
        self.local_stats.zero_()

    @torch.no_grad()
    def commit(self, taken: bool) -> None:
        """End the step: use the pending sums if the optimizer took it, forget them otherwise."""
        step, self.pending = self.pending, None
        self.step_metrics = None
        if step is not None and taken:
            self._commit(step)

    def _commit(self, step: StepSums) -> None:
        if self.collects_details:
            self.step_metrics = tracker.layer_metrics(step, None, None, None)


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
    ) -> None:
        """Build the router; the arguments are Megatron's."""
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        assert pg_collection is not None
        self.vector_width = config.moe_latent_size or config.hidden_size
        ep_size, ep_rank = pg_collection.ep.size(), pg_collection.ep.rank()
        num_local = self.num_experts // ep_size
        self.local_experts = slice(ep_rank * num_local, (ep_rank + 1) * num_local)
        self._new_buffer("default_vectors", (self.num_experts, self.vector_width))
        self._new_buffer("default_vector_updates", (self.num_experts,), torch.int64)
        self._new_buffer("local_sums", (num_local, self.vector_width), persistent=False)
        self._new_buffer("rejected_updates", (1,), torch.int64, persistent=False)
        # Until the checkpoint without default vectors is loaded, they are not asked of it.
        self.awaits_baseline = self.options.from_baseline
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

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        """Describe the state for a checkpoint as Megatron does, buffers included.

        The vectors are left out while a checkpoint without them is about to be loaded. (Relaxing
        ``--dist-ckpt-strictness`` instead would let any other missing tensor pass.)
        """
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        if self.awaits_baseline:
            for name in self.checkpointed:
                del state[prefix + name]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load; a checkpoint without default vectors keeps those at hand if that was asked for."""
        if self.awaits_baseline:
            self.awaits_baseline = False
            for name in self.checkpointed:
                state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *rest)

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

    def add_default_term(self, output: Tensor) -> Tensor:
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
            return super().add_default_term(output)
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
            self.step_metrics = tracker.layer_metrics(step, before, after, self.rejected_updates)
        self.default_vectors.copy_(after)
        self.default_vector_updates.add_(accepted_E)
        self.awaits_baseline = False

    @torch.no_grad()
    def settle(self) -> None:
        """Take the vectors that have been set for settled: bias correction leaves them as is."""
        self.default_vector_updates.clamp_(max=1).mul_(SETTLED)
