"""Megatron's three token dispatchers, which show the router what passes by.

A dispatcher is where the experts' rows and the layer's output pass by. Ours remember, between
``dispatch_postprocess`` and ``combine_preprocess``, which rows belong to which expert; hand the
experts' outputs to the router, which owns the sums; and let the router add the default term to the
combined output. Communication and permutation are Megatron's, untouched.
"""

from typing import Any

from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import permute, sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)
from torch import Tensor

from megatron_default_moe.errors import UserError
from megatron_default_moe.layers.observed_router import ObservedTopKRouter


class _CountedAlltoAll(MoEAlltoAllTokenDispatcher):
    """Megatron's, for a number of experts per token that varies: it takes K for granted."""

    number_varies = True
    """Off where the router chooses K experts for each token."""

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Count the rows that go out; arguments and result are Megatron's."""
        counts: Tensor = super().preprocess(routing_map)
        if self.number_varies and not self.drop_and_pad:
            self.num_out_tokens = routing_map.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return counts

    def carry(self, values_TC: Tensor) -> Tensor:
        """Send numbers of each token the way its rows went: [T, C] -> [R, C], sorted by expert."""
        values, _, _, _, _ = permute(
            values_TC, self.routing_map, num_out_tokens=int(self.num_out_tokens)
        )
        values = all_to_all(self.ep_group, values, self.output_splits, self.input_splits)
        if self.tp_size > 1:
            splits = None if self.output_splits_tp is None else self.output_splits_tp.tolist()
            values = gather_from_sequence_parallel_region(
                values, group=self.tp_group, output_split_sizes=splits
            )
        if self.num_local_experts > 1:
            values, _ = sort_chunks_by_idxs(
                values,
                self.num_global_tokens_per_local_expert.ravel(),
                self.sort_input_by_local_experts,
            )
        return values


class _AllGather(MoEAllGatherTokenDispatcher):
    """Megatron's, which also sends numbers of the tokens."""

    def carry(self, values_TC: Tensor) -> Tensor:
        """As :meth:`_CountedAlltoAll.carry`."""
        if self.tp_size > 1 or self.ep_size > 1:
            values_TC = gather_from_sequence_parallel_region(values_TC, group=self.tp_ep_group)
        values, _, _, _, _ = permute(
            values_TC, self.local_map, num_out_tokens=self.local_probs.numel()
        )
        return values


class _DefaultMoEDispatch:
    """The part that is common to the three dispatchers; mixed in before Megatron's class."""

    router: ObservedTopKRouter
    experts: Any
    unobserved: type
    """Megatron's class, for a dispatch that the router does not see."""
    _expert_rows: tuple[Tensor, Tensor] | None = None
    expert_inputs: Tensor | None = None
    """[R, H] the tokens that the local experts got, for a router that needs them."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keep the tokens for a router that needs them."""
        if self.router.needs_tokens or self.router.probe is not None:
            self.router.tokens = hidden_states.detach()
        result: tuple[Tensor, Tensor] = super().dispatch_preprocess(  # type: ignore[misc]
            hidden_states, routing_map, probs
        )
        return result

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Any, ...]:
        """Remember the row counts and probabilities of the experts' input."""
        result: tuple[Any, ...] = super().dispatch_postprocess(  # type: ignore[misc]
            hidden_states, probs
        )
        inputs, tokens_per_expert, permuted_probs = result
        if self.router.needs_tokens:
            self.expert_inputs = inputs.detach()
        self._expert_rows = (tokens_per_expert, permuted_probs)
        return result

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Show the experts' outputs to the router before they travel back."""
        assert self._expert_rows is not None, "combine_preprocess without dispatch_postprocess"
        (tokens_per_expert, probs), self._expert_rows = self._expert_rows, None
        self.router.observe_experts(hidden_states, tokens_per_expert, probs)
        self.expert_inputs = None
        return super().combine_preprocess(hidden_states)  # type: ignore[misc]

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add the default term, in the experts' own width (before a latent projection back)."""
        output: Tensor = super().combine_postprocess(hidden_states)  # type: ignore[misc]
        probe, tokens = self.router.probe, self.router.tokens
        if probe is not None and probe.unused_TE is None and tokens is not None:
            output = probe.ask_unused(self, tokens, output)
        return self.router.finish_output(output)


class DefaultMoEAllGatherTokenDispatcher(_DefaultMoEDispatch, _AllGather):
    """``--moe-token-dispatcher-type allgather``, connected with its router."""

    unobserved = MoEAllGatherTokenDispatcher


class DefaultMoEAlltoAllTokenDispatcher(_DefaultMoEDispatch, _CountedAlltoAll):
    """``--moe-token-dispatcher-type alltoall``, connected with its router."""

    unobserved = _CountedAlltoAll


class DefaultMoEFlexTokenDispatcher(_DefaultMoEDispatch, MoEFlexTokenDispatcher):
    """``--moe-token-dispatcher-type flex``, connected with its router."""

    unobserved = MoEFlexTokenDispatcher


_CONNECTED: dict[type, type] = {
    MoEAllGatherTokenDispatcher: DefaultMoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher: DefaultMoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher: DefaultMoEFlexTokenDispatcher,
}


def connect(dispatcher: Any, router: ObservedTopKRouter, experts: Any) -> None:
    """Turn a dispatcher that Megatron built into ours, in place.

    MoELayer names its dispatcher classes itself, and by the time its constructor returns other
    objects hold the dispatcher: changing the class keeps the object they hold.

    Args:
        dispatcher: one of Megatron's three.
        router: the layer's router.
        experts: the layer's local experts.

    Raises:
        UserError: a dispatcher of another kind, or none (a kernel that dispatches by itself).
    """
    if type(dispatcher) not in _CONNECTED:
        raise UserError(
            f"--moe-token-dispatcher-type made a {type(dispatcher).__name__}, which shows the"
            " router nothing of what the experts return: use alltoall or allgather, without"
            " kernels that skip the dispatcher"
        )
    dispatcher.__class__ = _CONNECTED[type(dispatcher)]
    dispatcher.router = router
    dispatcher.experts = experts
    dispatcher.number_varies = router.number_varies
    # Neither is a module: this makes no submodule of the router.
    router.dispatcher = dispatcher
    # Megatron's extension point for a CUDA graph of routing and preprocessing: the graph hands
    # these on to the rest of the layer, gradients included.
    dispatcher.cudagraph_attrs = [
        *dispatcher.cudagraph_attrs,
        *(f"router.{name}" for name in router.carried),
    ]
