"""Megatron's three token dispatchers, which show the router what passes by.

A dispatcher is where the experts' rows and the layer's output pass by. Ours remember, between
``dispatch_postprocess`` and ``combine_preprocess``, which rows belong to which expert; hand the
experts' outputs to the router, which owns the sums; and let the router add the default term to the
combined output. Communication and permutation are Megatron's, untouched.
"""

from typing import Any

from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)
from torch import Tensor

from megatron_default_moe.errors import UserError
from megatron_default_moe.layers.observed_router import ObservedTopKRouter


class _DefaultMoEDispatch:
    """The part that is common to the three dispatchers; mixed in before Megatron's class."""

    router: ObservedTopKRouter
    _expert_rows: tuple[Tensor, Tensor] | None = None

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Any, ...]:
        """Remember the row counts and probabilities of the experts' input."""
        result: tuple[Any, ...] = super().dispatch_postprocess(  # type: ignore[misc]
            hidden_states, probs
        )
        _, tokens_per_expert, permuted_probs = result
        self._expert_rows = (tokens_per_expert, permuted_probs)
        return result

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Show the experts' outputs to the router before they travel back."""
        assert self._expert_rows is not None, "combine_preprocess without dispatch_postprocess"
        (tokens_per_expert, probs), self._expert_rows = self._expert_rows, None
        self.router.observe_experts(hidden_states, tokens_per_expert, probs)
        return super().combine_preprocess(hidden_states)  # type: ignore[misc]

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add the default term, in the experts' own width (before a latent projection back)."""
        output = super().combine_postprocess(hidden_states)  # type: ignore[misc]
        return self.router.finish_output(output)


class DefaultMoEAllGatherTokenDispatcher(_DefaultMoEDispatch, MoEAllGatherTokenDispatcher):
    """``--moe-token-dispatcher-type allgather``, connected with its router."""


class DefaultMoEAlltoAllTokenDispatcher(_DefaultMoEDispatch, MoEAlltoAllTokenDispatcher):
    """``--moe-token-dispatcher-type alltoall``, connected with its router."""


class DefaultMoEFlexTokenDispatcher(_DefaultMoEDispatch, MoEFlexTokenDispatcher):
    """``--moe-token-dispatcher-type flex``, connected with its router."""


_CONNECTED: dict[type, type] = {
    MoEAllGatherTokenDispatcher: DefaultMoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher: DefaultMoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher: DefaultMoEFlexTokenDispatcher,
}


def connect(dispatcher: Any, router: ObservedTopKRouter) -> None:
    """Turn a dispatcher that Megatron built into ours, in place.

    MoELayer names its dispatcher classes itself, and by the time its constructor returns other
    objects hold the dispatcher: changing the class keeps the object they hold.

    Args:
        dispatcher: one of Megatron's three.
        router: the layer's router.

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
    # Megatron's extension point for a CUDA graph of routing and preprocessing: the graph hands
    # these on to the rest of the layer, gradients included.
    dispatcher.cudagraph_attrs = [
        *dispatcher.cudagraph_attrs,
        *(f"router.{name}" for name in router.carried),
    ]
