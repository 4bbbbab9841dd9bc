"""What default vectors add to a layer: operations, temporaries and saved bytes, counted on meta.

Tensors on the meta device have shapes and no values, so any size costs nothing, and they take the
paths of a GPU. Counted is what PyTorch dispatches, views aside: a launch each on a GPU.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from building import build_layer
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_default_moe import commit, reduce_step_sums

TOKENS, WIDTH, EXPERTS, LOCAL, TOPK = 4096, 2048, 32, 8, 4
ROWS = TOKENS * TOPK


@dataclasses.dataclass
class Counted:
    operations: int = 0
    allocated: int = 0
    """Bytes of the tensors that operations made."""
    names: list[str] = dataclasses.field(default_factory=list)


class _Counter(TorchDispatchMode):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Questions that PyTorch asks itself, memory without a value, and views launch nothing.
        name = func.__name__
        if func.is_view or name.startswith(("detach", "promote_types", "empty", "new_empty")):
            return result
        self.counted.operations += 1
        self.counted.names.append(name)
        given = {id(one) for one in torch.utils._pytree.tree_leaves((args, kwargs))}
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor) and id(one) not in given:
                self.counted.allocated += one.numel() * one.element_size()
        return result


@contextmanager
def counting() -> Iterator[Counted]:
    counted = Counted()
    with _Counter(counted):
        yield counted


def router_on_meta(**settings: Any) -> Any:
    """A router in bf16 whose expert parallelism is pretended: `LOCAL` of `EXPERTS` are its own."""
    layer = build_layer(
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        hidden_size=WIDTH,
        num_attention_heads=1,
        moe_ffn_hidden_size=8,
        **settings,
    )
    router = layer.router
    if hasattr(router, "local_sums"):
        router.local_experts = slice(0, LOCAL)
        router.local_sums = router.local_sums[:LOCAL].clone()
    return router.to("meta")


def micro_batch(router: Any) -> dict[str, Any]:
    """Count one micro-batch: what routing leaves, the experts' side, the output; and backward."""
    like = {"device": "meta", "dtype": torch.bfloat16}
    logits = torch.empty(TOKENS, EXPERTS, device="meta", requires_grad=True)
    counts = torch.full((LOCAL,), ROWS // LOCAL)
    rows, probs = torch.empty(ROWS, WIDTH, **like), torch.empty(ROWS, device="meta")
    output = torch.empty(TOKENS, WIDTH, **like, requires_grad=True)
    router.routing(logits)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        owned = {output.data_ptr, *(id(buffer) for buffer in router.buffers())}
        if id(tensor) not in owned:
            saved[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    with counting() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        router.observe_experts(rows, counts, probs)
        result = router.finish_output(output)
    with counting() as backward:
        if result.grad_fn is not None:
            torch.autograd.backward(result, torch.empty_like(result))
    return {"forward": forward, "backward": backward, "saved": sum(saved.values())}


def step(layers: int, **settings: Any) -> tuple[Counted, Counted]:
    """Count the reduction (the all-reduce itself aside) and the commit of a stage's layers."""
    stage = torch.nn.ModuleList(router_on_meta(**settings) for _ in range(layers))
    with counting() as reduction:
        reduce_step_sums(stage)
    with counting() as committing:
        commit(stage, taken=True)
    return reduction, committing
