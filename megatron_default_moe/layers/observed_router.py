"""What every router of this package does, and where an estimator of the router gradient comes in.

``ObservedTopKRouter`` leaves the routing to Megatron and looks at its result later, when the
experts have run: what lies between may be replayed from a CUDA graph. The estimators are its
subclasses (``estimators/``); the layer, the dispatchers and the optimizer step know this class
only. What an estimator may declare: ``gives_scores_gradient``, ``chooses``, ``number_varies``,
``needs_tokens``, ``model_wide``, its buffers. What it may do, in the order of a step:

    begin_step        before the first micro-batch
    choose            in place of Megatron's top-k
    balance           the losses attached to the probabilities of its own choice
    observe_experts   the local experts' rows pass by
    finish_output     the routed experts' combined output passes by
    step_parts        what the step's one all-reduce adds up (``own_parts``: beside the load)
    take_step         the step was taken: state changes here and nowhere else
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_default_moe.errors import UserError
from megatron_default_moe.layers import fidelity, own_choice
from megatron_default_moe.layers.layer_metrics import layer_metrics
from megatron_default_moe.layers.step_sums import StepSums
from megatron_default_moe.maths import balance, functional
from megatron_default_moe.options.config import RouterGradientConfig

_MARK_FLOAT32 = getattr(module, "mark_keep_in_fp32", None)
"""After 0.19 Megatron keeps a buffer float32 that is marked; before, :meth:`_apply` does it."""


class ObservedTopKRouter(TopKRouter):
    """Megatron's TopKRouter, bit for bit, that also counts its load for the metrics."""

    fp32_buffers: tuple[str, ...] = ("local_stats",)
    """Buffers that stay float32 in a bf16 or fp16 model."""
    carried = ("routed_scores", "routed_probs")
    """What a routing leaves for its layer: tensors, so that a CUDA graph can hand them on."""
    gives_scores_gradient = False
    """Whether the scores of a routing get a gradient from the layer's output."""
    needs_tokens = False
    """Whether the dispatcher keeps the tokens of a micro-batch for ``finish_output``."""
    number_varies = False
    """Whether tokens use another number of experts than --moe-router-topk."""
    model_wide = False
    """Whether a step's load is added up over all layers of the model, too."""

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
        self.options: RouterGradientConfig = config.router_gradient
        # Only routers with default vectors carry sums of expert outputs.
        self.vector_width = 0
        # The layer's dispatcher (``token_dispatcher.connect``), and what it kept of a micro-batch.
        self.dispatcher: Any = None
        self.tokens: Tensor | None = None
        # Set by the training step on the steps that are logged: entropies and norms cost a pass.
        self.collects_details = False
        # Set by calibrate.py: evaluation passes count, as one step without gradients.
        self.calibrating = False
        # What an estimator notes of its last choice, for ``multipliers_again``.
        self.choice: Any = None
        # Between this router's forward and the end of its layer's, all [T, E]: the logits that were
        # routed (with a normalised gate the probabilities of all experts), with their gradient
        # where default vectors give them one;
        self.routed_scores: Tensor | None = None
        # and what the experts' outputs are multiplied by, without it; zero at unused experts.
        self.routed_probs: Tensor | None = None
        # Forward passes in the local sums, and in the pending ones: known without asking a device.
        self.counted_passes = 0
        # The all-reduced sums of the running step, between gradient finalisation and commit.
        self.pending: StepSums | None = None
        # Whether this step is probed, what its first micro-batch noted, and what came of it.
        self.probes = False
        self.probe: fidelity.Probe | None = None
        self.fidelity: Tensor | None = None
        # The estimator's own part of them.
        self.pending_own: Tensor | None = None
        # ``StepSums.load`` over all layers of the model, where ``model_wide``.
        self.model_load: Tensor | None = None
        # layer_metrics of the last step, if it was taken and is logged.
        self.step_metrics: Tensor | None = None
        # State that a plain Megatron checkpoint does not have.
        self.checkpointed = self.options.checkpointed
        # What of it the checkpoint about to be loaded lacks: it is not asked of it.
        everything = self.checkpointed if self.options.from_baseline else ()
        self.absent: tuple[str, ...] = self.options.absent or everything
        self._new_buffer("local_stats", (StepSums.numel(self.num_experts, 0),), persistent=False)
        if self.options.loss_free_bias is not None:
            # Not Megatron's expert_bias, which its softmax gate ignores.
            self._new_buffer("choice_bias", (self.num_experts,))
            self.fp32_buffers = (*self.fp32_buffers, "choice_bias")

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
        if _MARK_FLOAT32 is not None and dtype == torch.float32:
            _MARK_FLOAT32(getattr(self, name))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow device moves, but keep the float32 buffers' dtype and every bit of them."""
        if _MARK_FLOAT32 is not None:
            super()._apply(fn, recurse)
            return self
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

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Route with Megatron's code and leave the result for the layer (``TopKRouter.routing``).

        Nothing else happens here: a CUDA graph may replay this method without running it.

        Raises:
            UserError: Megatron returned indices of experts instead of a map.
        """
        if self.chooses:
            probs_TE, map_TE = own_choice.routing(self, logits, *args, **kwargs)
        else:
            probs_TE, map_TE = super().routing(logits, *args, **kwargs)
        if map_TE.dtype != torch.bool:
            raise UserError(
                "--moe-router-fusion with --moe-token-dispatcher-type flex routes by indices in"
                " this version of Megatron, and default vectors need a map of all experts: drop"
                " --moe-router-fusion"
            )
        scores_TE = logits.reshape(-1, self.num_experts)
        if self.options.normalized_gate:
            scores_TE = self.dense_probs(scores_TE)
            probs_TE = functional.replace_active_probs(probs_TE, probs_TE != 0, scores_TE)
        self.routed_probs = probs_TE.detach()
        if self.probe is not None and self.probe.logits_TE is None:
            self.probe.logits_TE = scores_TE.detach()
            self.probe.active_TE = self._active()
            self.probe.choice = self.choice
            probs_TE = self.probe.tap(probs_TE, "probs_grad_TE")
            scores_TE = self.probe.tap(scores_TE, "scores_grad_TE")
        # Where nothing gives them a gradient, a graph would carry one of zeros.
        self.routed_scores = scores_TE if self.gives_scores_gradient else scores_TE.detach()
        return probs_TE, map_TE

    def gating(self, input: Tensor) -> Tensor:
        """Compute the logits, as Megatron does; the first micro-batch of a probed step is noted."""
        if self.probes and self.counts_this_pass and not self.counted_passes:
            self.probe = fidelity.Probe(input)
        logits: Tensor = super().gating(input)
        return logits

    def multipliers_again(self, logits_TE: Tensor, probe: fidelity.Probe) -> Tensor:
        """Return the multipliers of a micro-batch as a function of its logits, its choice given.

        Args:
            logits_TE: [T, E] float32.
            probe: of the micro-batch.
        """
        assert probe.active_TE is not None
        return self.dense_probs(logits_TE) * probe.active_TE

    @property
    def own_sums(self) -> int:
        """Length of the estimator's own part of the step's sums."""
        return 0

    @property
    def uses_scores(self) -> bool:
        """Whether this forward pass gives the scores a gradient."""
        return self.gives_scores_gradient and self.training

    @property
    def chooses(self) -> bool:
        """Whether :meth:`choose` takes the place of Megatron's top-k."""
        return self.options.loss_free_bias is not None

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Choose each token's experts; here the top-k of the biased scores, weighted without bias.

        Args:
            logits_TE: [T, E] the logits (jitter and forced values included).

        Returns:
            [T, E] what the experts' outputs are multiplied by, in the dtype of the logits, zero
            where unused; its graph is the estimator's gradient rule. [T, E] bool map.
        """
        return own_choice.biased_topk(self, logits_TE)

    def balance(
        self,
        probs_TE: Tensor,
        logits_TE: Tensor,
        chosen_TE: Tensor,
        shape: tuple[int, int],
        padding_T: Tensor | None,
    ) -> Tensor:
        """Attach the losses that balance an own choice: Megatron's three, of what was chosen.

        Args:
            probs_TE: [T, E] the multipliers.
            logits_TE: [T, E] the logits.
            chosen_TE: [T, E] bool the choice, before any expert's capacity.
            shape: sequence length and batch size, whose product is T.
            padding_T: [T] bool True for padding, or None.

        Returns:
            ``probs_TE`` with the losses attached.
        """
        return own_choice.balance(self, probs_TE, logits_TE, chosen_TE, shape, padding_T)

    def begin_step(self) -> None:
        """Prepare for a step's first micro-batch."""

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attach a balance loss as Megatron does; the global one at the strength it asks for.

        Each rank's share of ``global_aux_loss`` is divided by the tokens of all data-parallel
        ranks, over which the gradient is then averaged once more (Megatron-LM #3672): that second
        division is taken back here. What is logged, loss over coefficient, stays. (A Megatron with
        the diff in ``patches/`` hands over a larger coefficient: nothing is left to do.)
        """
        stock = aux_loss_coeff == self.get_aux_loss_coeff("global_aux_loss")
        is_global = aux_loss_name == "global_load_balancing_loss"
        if is_global and stock and self.options.global_aux_loss_exact:
            dp_size = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
            aux_loss_coeff, aux_loss = aux_loss_coeff * dp_size, aux_loss * dp_size
        attached: Tensor = super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, *args, **kwargs
        )
        return attached

    def _active(self) -> Tensor:
        """[T, E] bool: the experts that each token of the micro-batch uses.

        Megatron's map is no better guide: its probabilities are zero outside of the map, and inside
        it where capacity is filled up with tokens that did not choose the expert.
        """
        assert self.routed_probs is not None
        return self.routed_probs != 0

    def _dense(self) -> Tensor:
        """[T, E] the micro-batch's probabilities of all experts, see :meth:`dense_probs`."""
        assert self.routed_scores is not None, "the routing of this micro-batch is not known"
        if self.options.normalized_gate:
            return self.routed_scores
        return self.dense_probs(self.routed_scores)

    def observe_experts(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> None:
        """Count what was routed, in passes that count; called when the experts have run.

        Args:
            rows: [R, D] outputs of the local experts, each already multiplied by its probability,
                sorted by expert. With expert tensor parallelism they are partial sums.
            tokens_per_expert: [e] row counts.
            probs: [R] the probabilities.
        """
        if self.counts_this_pass:
            self._count(self._active())

    def finish_output(self, output: Tensor) -> Tensor:
        """Return the routed experts' combined output as it is; estimators add their part here.

        Args:
            output: [..., D] of this rank's tokens, in the order the router saw them.
        """
        self._forget_routing()
        return output

    def _forget_routing(self) -> None:
        self.tokens = None
        for name in self.carried:
            setattr(self, name, None)

    @torch.no_grad()
    def _count(self, active_TE: Tensor) -> None:
        self.counted_passes += 1
        stats = StepSums.view(self.local_stats, self.num_experts, 0)
        stats.counts.add_(active_TE.sum(0))
        stats.totals[0].add_(active_TE.shape[0])
        if self.collects_details:
            self._count_entropy()

    @torch.no_grad()
    def _count_entropy(self) -> None:
        scores_TE = self._dense().float()
        # (Where every gate may be closed, such a token's entropy is zero.)
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
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

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        """Describe the state for a checkpoint as Megatron does, buffers included.

        State is left out while a checkpoint without it is about to be loaded.
        (Relaxing ``--dist-ckpt-strictness`` instead would let any other missing tensor pass.)
        """
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        for name in self.absent:
            del state[prefix + name]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load; a checkpoint without this state keeps what is at hand if that was asked for."""
        for name in self.absent:
            state_dict.setdefault(prefix + name, getattr(self, name))
        self.absent = ()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def local_step_sums(self) -> list[Tensor]:
        """Return the buffers that the running step is summed up in on this rank."""
        return [self.local_stats]

    def step_parts(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pair the parts of the step's flat buffer with the local sums that go there.

        Args:
            flat: [StepSums.numel] this layer's part of the buffer that is all-reduced.
        """
        return [(flat[-self.local_stats.numel() :], self.local_stats)]

    def own_parts(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pair the parts of the estimator's own sums with the local ones that go there.

        Args:
            flat: [own_sums] float32.
        """
        return []

    def own_metrics(self) -> dict[str, Tensor]:
        """Return what is logged of this estimator and a taken step beside the load: scalars."""
        own: dict[str, Tensor] = {}
        if self.options.loss_free_bias is not None:
            own["choice-bias spread"] = self.choice_bias.max() - self.choice_bias.min()
        if self.fidelity is not None:
            own |= dict(zip(fidelity.NAMES, self.fidelity, strict=True))
        return own

    @classmethod
    def take_step(cls, taking: "Sequence[ObservedTopKRouter]") -> None:
        """End a step that the optimizer took, for all layers of a stage whose sums are pending.

        Args:
            taking: routers of this class; each one's ``pending`` is the whole global batch.
        """
        for router in taking:
            if router.collects_details:
                assert router.pending is not None
                router.step_metrics = layer_metrics(router.pending, router.own_metrics())

    @classmethod
    def move_choice_bias(cls, taking: "Sequence[ObservedTopKRouter]") -> None:
        """Move the biases of loss-free balancing after a step that the optimizer took."""
        for router in taking:
            rate = router.options.loss_free_bias
            if rate is not None and not router.frozen_expert_bias:
                assert router.pending is not None
                counts_E = router.pending.counts
                router.choice_bias.copy_(balance.moved_bias(router.choice_bias, counts_E, rate))
