"""What a user asked for, under one set of names: what the rules of ``support.py`` read."""

import os
from typing import Any

from megatron_default_moe.options.config import RouterGradientConfig


class Settings:
    """Read access to parsed arguments or a TransformerConfig under one set of names.

    An attribute that one of the two does not have reads as None.
    """

    def __init__(self, source: Any, options: RouterGradientConfig) -> None:
        """Wrap ``source`` and the package's own options."""
        self._source = source
        self.options = options

    def __getattr__(self, name: str) -> Any:
        """Return the setting, or None."""
        return getattr(self._source, name, None)

    @property
    def experts(self) -> int | None:
        """Number of experts (``num_experts`` in arguments, ``num_moe_experts`` in a config)."""
        return self.num_experts or self.num_moe_experts

    @property
    def score(self) -> str:
        """The router's score function."""
        return self.moe_router_score_function or "softmax"

    @property
    def topk(self) -> int:
        """Experts per token."""
        return self.moe_router_topk or 2

    @property
    def balancing(self) -> list[str]:
        """The load-balancing types, as a list."""
        kind = self.moe_router_load_balancing_type
        return [kind] if isinstance(kind, str) else list(kind or [])

    @property
    def graph_modules(self) -> list[str]:
        """Names of the modules captured by CUDA graphs, by either name of the flag."""
        modules = self.cuda_graph_modules or self.cuda_graph_scope_deprecated or []
        return [getattr(module, "name", str(module)) for module in modules]

    @property
    def graph_impl(self) -> str:
        """Who makes CUDA graphs, also by the two flags that were there before."""
        if self.external_cuda_graph:
            return "transformer_engine"
        return "local" if self.enable_cuda_graph else self.cuda_graph_impl or "none"

    @property
    def graphs_hide_routing(self) -> bool:
        """Whether a replayed graph hides the routing from the rest of the layer.

        Transformer Engine's graph of routing and preprocessing hands it on; no other does.
        """
        if self.graph_impl == "none":
            return False
        routing, modules = {"moe_router", "moe_preprocess"}, set(self.graph_modules)
        # No module at all means the whole layer, or the whole step.
        if not modules or modules - routing - {"attn", "mlp"}:
            return True
        shared = modules >= routing and self.graph_impl == "transformer_engine"
        return bool(modules & routing) and not shared

    @property
    def layers_without_a_stage(self) -> bool:
        """Whether Megatron would leave layers of the model out (``get_num_layers_to_build``)."""
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        if first is None:
            first = self.num_layers_in_first_pipeline_stage
        if last is None:
            last = self.num_layers_in_last_pipeline_stage
        named = [count for count in (first, last) if count is not None]
        stages = self.pipeline_model_parallel_size or 1
        if not named or stages > len(named):
            return False
        # On a single stage the last of the two counts.
        return sum(named[-stages:]) != self.num_layers

    def environment(self, name: str) -> str | None:
        """Return an environment variable, which some settings of libraries are."""
        return os.environ.get(name)
