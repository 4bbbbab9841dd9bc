"""The default term under ``--overlap-moe-expert-parallel-comm``.

There Megatron runs a layer as four autograd graphs (attention and router; dispatch; experts;
combine), the second and the last on a stream of their own, so that the communication of one
micro-batch hides behind the work of another. What a graph computes for a later one is cut off from
its history, and its gradient is put back by hand (``ScheduleNode``). That is done for Megatron's
own tensors. Here it is done for the one that default vectors add: the router's scores, made in the
first graph and used in the last.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel.utils import get_comm_stream
from torch import Tensor

from megatron_default_moe.layers.observed_router import ObservedTopKRouter


class _TakeGradient(torch.autograd.Function):
    """Identity on the probabilities whose backward pass also brings the scores their gradient."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, scores_TE: Tensor, take: Callable[[], Tensor]) -> Tensor:
        ctx.take = take
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.take(), None


def _take_gradient(leaf: Tensor) -> Tensor:
    """Return the gradient that the layer's last graph left on ``leaf``."""
    grad, leaf.grad = leaf.grad, None
    assert grad is not None, "the end of the layer has not run backward yet"
    # Made on the stream of the last graph, read on that of the first.
    grad.record_stream(torch.cuda.current_stream())
    return grad


def cut(router: ObservedTopKRouter, probs: Tensor) -> Tensor:
    """Cut the router's scores off from the graph of this routing, and keep their gradient's way.

    The layer goes on with a leaf in ``router.routed_scores``. Megatron runs the graphs of a layer
    backward from the last to the first, so the leaf has its gradient by the time that of the
    probabilities comes back here.

    Args:
        router: has just routed.
        probs: the probabilities of that routing, as the dispatch takes them (any shape).

    Returns:
        The probabilities to go on with: the same values.
    """
    scores_TE = router.routed_scores
    if scores_TE is None or not scores_TE.requires_grad or not router.uses_scores:
        return probs
    leaf_TE = scores_TE.detach().requires_grad_()
    router.routed_scores = leaf_TE
    if (stream := get_comm_stream()) is not None:
        # Made on the computing stream, read on the communicating one: not to be reused before.
        for name in router.carried:
            getattr(router, name).record_stream(stream)
    result: Tensor = _TakeGradient.apply(
        probs, scores_TE, functools.partial(_take_gradient, leaf_TE)
    )
    return result
