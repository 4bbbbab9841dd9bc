"""The MoE layer: Megatron's, whose dispatcher and router know the default vectors."""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_default_moe.router import DefaultMoERouter
from megatron_default_moe.token_dispatcher import give_default_vectors


class DefaultMoELayer(MoELayer):
    """Megatron's MoELayer with default vectors.

    Its spec must name :class:`DefaultMoERouter` as the router (``default_moe_spec`` does). One
    forward pass: the router routes and keeps the probabilities of the unused experts; dispatch;
    the experts run; their rows are summed per expert; combine; the default term is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build Megatron's layer, then connect its dispatcher with its router."""
        super().__init__(*args, **kwargs)
        assert isinstance(self.router, DefaultMoERouter), type(self.router)
        give_default_vectors(self.token_dispatcher, self.router)
