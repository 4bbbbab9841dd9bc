"""The MoE layers: Megatron's, whose dispatcher and router know each other."""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_default_moe.layers import overlap
from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.layers.token_dispatcher import connect


class ObservedMoELayer(MoELayer):
    """Megatron's MoELayer, bit for bit, whose router counts what was routed.

    Its spec must name :class:`ObservedTopKRouter` as the router (``default_moe_spec`` does).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build Megatron's layer, then connect its dispatcher with its router."""
        super().__init__(*args, **kwargs)
        assert isinstance(self.router, ObservedTopKRouter), type(self.router)
        connect(self.token_dispatcher, self.router, self.experts)


class DefaultMoELayer(ObservedMoELayer):
    """Megatron's MoELayer with an estimator of the router gradient.

    Its spec must name one of ``estimators/`` as the router. One forward pass, for default vectors:
    the router routes and keeps its logits; dispatch; the experts run; their rows are summed per
    expert; combine; the default term, of the experts a token did not use, is added.
    """

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prepare for the dispatch; arguments and results are Megatron's.

        This is the end of what runs, or is replayed from a CUDA graph, before the dispatch.
        """
        hidden_states, probs = super().preprocess(hidden_states, probs, routing_map)
        if self.config.overlap_moe_expert_parallel_comm:
            probs = overlap.cut(self.router, probs)
        return hidden_states, probs
