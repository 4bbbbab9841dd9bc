"""What the experts that a token did not use would have returned, through Megatron's dispatcher.

A second dispatch of the same tokens, with the map of the unused experts, costs N/K times the work
of the first: a measuring instrument. It works for every layout, because it is Megatron's own way to
the experts and back, whose backward pass brings each expert the gradient of its rows.
"""

import copy
from typing import Any

import torch
from torch import Tensor


class _OutputsAsGradients(torch.autograd.Function):
    """Zeros whose backward pass gives each row's probability ``<gradient, the row>``."""

    @staticmethod
    def forward(ctx: Any, probs_R: Tensor, rows_RD: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD)
        ctx.probs_dtype = probs_R.dtype
        return torch.zeros_like(rows_RD)

    @staticmethod
    def backward(ctx: Any, *grads_RD: Tensor) -> tuple[Tensor, None]:
        (grad_RD,), (rows_RD,) = grads_RD, ctx.saved_tensors
        products_RD = grad_RD.float() * rows_RD.float()
        return products_RD.sum(-1).to(ctx.probs_dtype), None


class _WithGradientOf(torch.autograd.Function):
    """Identity on the output; its gradient also goes to ``other``, of the same shape."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, other: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def attach_gradients(
    dispatcher: Any, tokens: Tensor, map_TE: Tensor, probs_TE: Tensor, output: Tensor
) -> Tensor:
    """Return ``output``, bit for bit, with the gradient that these experts would give ``probs``.

    Expert i would have added ``p_i E_i(x)``, so ``dL/dp_i = <dy, E_i(x)>``. Neither the tokens nor
    the experts get a gradient from it.

    Args:
        dispatcher: the layer's, connected with its experts; what it holds of its own dispatch
            stays as it is.
        tokens: what it dispatched.
        map_TE: [T, E] bool, the experts to ask.
        probs_TE: [T, E] their probabilities, zero elsewhere.
        output: the routed experts' combined output.
    """
    second = copy.copy(dispatcher)
    second.__class__ = dispatcher.unobserved
    second.shared_experts = None
    second.drop_and_pad = False
    second.number_varies = True
    x, probs = second.dispatch_preprocess(tokens.detach(), map_TE, probs_TE)
    x, probs = second.token_dispatch(x, probs)
    x, tokens_per_expert, probs = second.dispatch_postprocess(x, probs)
    with torch.no_grad():
        rows, _ = dispatcher.experts(x, tokens_per_expert, torch.ones_like(probs))
    zeros = second.combine_preprocess(_OutputsAsGradients.apply(probs, rows))
    zeros = second.combine_postprocess(second.token_combine(zeros))
    result: Tensor = _WithGradientOf.apply(output, zeros)
    return result
