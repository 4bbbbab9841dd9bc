"""Megatron's graph of routing and preprocessing, on a machine that has no CUDA graphs.

The graph itself is replaced, and nothing else: Megatron's own capture and replay code runs, and
what stands for the graph is the capture pass of a twin layer, which shares every parameter and
buffer with the layer and none of its Python state. So only tensors come back.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.module import GraphableMegatronModule
from torch import Tensor

GRAPHS = {
    "cuda_graph_impl": "transformer_engine",
    "cuda_graph_modules": ["moe_router", "moe_preprocess"],
}
"""Settings of a layer that can have such a graph."""


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
    cuda_graphs._set_capture_start()
    try:
        yield
    finally:
        cuda_graphs._set_capture_end()


def give_graph(layer: Any, twin: Any, x: Tensor) -> None:
    """Capture ``layer`` with input ``x``, and let its twin, built the same, be what is replayed."""
    for own, other in zip(layer.modules(), twin.modules(), strict=True):
        other._parameters, other._buffers = own._parameters, own._buffers

    def replay(hidden_states: Tensor, is_first_microbatch: bool) -> Any:
        with _capturing():
            return twin._te_cuda_graph_capture(hidden_states)

    with _capturing():
        outputs = layer(x, attention_mask=None)
    sum(out.sum() for out in outputs if out.requires_grad).backward()
    layer.zero_grad()
    layer.cuda_graphs = [replay]
    # The layer's own method looks for Transformer Engine; the one it extends does the same here.
    layer._get_te_cuda_graph_replay_args = functools.partial(
        GraphableMegatronModule._get_te_cuda_graph_replay_args, layer
    )

    def refuse(*args: Any) -> None:
        raise AssertionError("a replayed router runs no Python")

    layer.mlp.router.forward = refuse
