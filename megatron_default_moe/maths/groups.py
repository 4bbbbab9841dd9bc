"""Expert-group approximation (Dense Backpropagation Improves Routing, PMLR v262 panda24a).

An expert that a token did not use is stood in for by what it returned to other tokens of the same
group. N experts, G = group size, T tokens, R rows at the local experts e, D width.
"""

from typing import Any

import torch
from torch import Tensor


def membership(scores_TE: Tensor, size: int) -> Tensor:
    """Return the group of each token: [T, E] bool, its ``size`` best experts (R_G(x))."""
    best_TG = scores_TE.topk(size, dim=-1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, best_TG, True)


def pair_counts(active_TE: Tensor, group_TE: Tensor) -> Tensor:
    """Return |X_ij| of these tokens: [E, E] float32, i used and both i and j in the group."""
    used_TE = (active_TE & group_TE).to(torch.float32)
    return used_TE.t() @ group_TE.to(torch.float32)


def pair_sums(
    rows_RD: Tensor, tokens_per_expert: list[int], probs_R: Tensor, group_RE: Tensor, first: int
) -> Tensor:
    """Sum what each local expert returned, by the other experts of the tokens' groups.

    Args:
        rows_RD: [R, D] outputs, each multiplied by its probability, sorted by expert.
        tokens_per_expert: row counts of the local experts.
        probs_R: [R] the probabilities.
        group_RE: [R, E] bool the group of each row's token.
        first: number of the first local expert.

    Returns:
        [e, E, D] float32: ``sum E_i(x)`` over the rows of i whose group has i and j.
    """
    sums_eED = rows_RD.new_zeros(
        len(tokens_per_expert), group_RE.shape[1], rows_RD.shape[1], dtype=torch.float32
    )
    total, weight_R = sum(tokens_per_expert), probs_R.reshape(-1).float()
    inverse_R = torch.where(weight_R != 0, 1 / weight_R, 0)
    parts = zip(
        rows_RD[:total].split(tokens_per_expert),
        inverse_R[:total].split(tokens_per_expert),
        group_RE[:total].split(tokens_per_expert),
        strict=True,
    )
    for number, (rows, inverse, group) in enumerate(parts):
        counted = (group & group[:, first + number].unsqueeze(-1)).to(torch.float32)
        torch.mm((counted * inverse.unsqueeze(-1)).t(), rows.float(), out=sums_eED[number])
    return sums_eED


def table(sums_EED: Tensor, counts_EE: Tensor) -> Tensor:
    """Return ``a_ij = sums_ij / max(1, |X_ij|)``: [E, E, D]."""
    return sums_EED / counts_EE.clamp_min(1).unsqueeze(-1)


class _GroupTerm(torch.autograd.Function):
    """The output, with the group term added or only its gradient into the probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        output_TD: Tensor,
        inactive_TE: Tensor,
        group_TE: Tensor,
        table_EED: Tensor,
        size: int,
        in_forward: bool,
    ) -> Tensor:
        ctx.save_for_backward(group_TE, table_EED)
        ctx.size, ctx.dtype = size, inactive_TE.dtype
        if not in_forward:
            return output_TD.view_as(output_TD)
        term_TD = torch.zeros_like(output_TD, dtype=torch.float32)
        for j in range(group_TE.shape[1]):
            # Only tokens with j in their group have a part in this product.
            weights_TE = inactive_TE.float() * group_TE[:, j : j + 1] / size
            term_TD.addmm_(weights_TE, table_EED[:, j])
        return output_TD + term_TD.to(output_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads_TD: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TD,), (group_TE, table_EED) = grads_TD, ctx.saved_tensors
        grad_TE = grad_TD.new_zeros(group_TE.shape, dtype=torch.float32)
        for j in range(group_TE.shape[1]):
            product_TE = grad_TD.float() @ table_EED[:, j].t()
            grad_TE.addcmul_(product_TE, group_TE[:, j : j + 1].float(), value=1 / ctx.size)
        return grad_TD, grad_TE.to(ctx.dtype), None, None, None, None


def attach(
    output_TD: Tensor,
    inactive_TE: Tensor,
    group_TE: Tensor,
    table_EED: Tensor,
    size: int,
    in_forward: bool,
) -> Tensor:
    """Return the output with ``y' = sum_i inactive_i (1/G) sum_{j in R_G} a_ij``, or its gradient.

    Args:
        output_TD: [T, D] the routed experts' combined output.
        inactive_TE: [T, E] probabilities of unused experts, zero at used ones.
        group_TE: [T, E] bool (:func:`membership`).
        table_EED: [E, E, D] float32 (:func:`table`), a constant.
        size: G.
        in_forward: whether y' is added, or only ``dL/dpi_i = <dy, v_i>`` goes into the graph.
    """
    result: Tensor = _GroupTerm.apply(
        output_TD, inactive_TE, group_TE, table_EED.detach(), size, in_forward
    )
    return result
