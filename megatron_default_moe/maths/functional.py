"""The maths of Default MoE as pure functions of tensors.

Legend of the shape suffixes: T tokens, E experts (all), e experts of this rank, D width of an
expert's output, R rows an expert-parallel rank returns (sorted by expert), K experts per token.

Sources: Default MoE, arXiv 2504.12463 (the substitution of default vectors for the experts a
token did not use, and their exponential moving average). ``naive.py`` restates every function as
a loop in float64; the tests hold the two against each other.

All sums are taken in float32 at least. Nothing here synchronises the device with the host, except
that a ``tokens_per_expert_e`` which already lives on the host is read there.
"""

from typing import Any, Literal

import torch
from torch import Tensor

Weighting = Literal["router", "uniform"]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or the tensor's own dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def inactive_probs(probs_TE: Tensor, active_TE: Tensor) -> Tensor:
    """Return the router probabilities of the experts a token did not use.

    Args:
        probs_TE: [T, E] probabilities over all experts, any float dtype.
        active_TE: [T, E] bool, True where the expert's own output enters the token's output.

    Returns:
        [T, E] in the accumulation dtype, zero at active entries; differentiable in ``probs_TE``.
    """
    return probs_TE.to(accumulation_dtype(probs_TE)).masked_fill(active_TE, 0.0)


def replace_active_probs(probs_TE: Tensor, active_TE: Tensor, dense_TE: Tensor) -> Tensor:
    """Return ``probs`` with the entries of ``dense`` at the active experts.

    The old values get no gradient, but stay in the graph: Megatron attaches its auxiliary losses
    to them (``MoEAuxLossAutoScaler``), whose backward only has to be reached.

    Args:
        probs_TE: [T, E] Megatron's probabilities, zero at inactive experts.
        active_TE: [T, E] bool, the experts each token uses.
        dense_TE: [T, E] the probabilities to use, of all experts, in the same dtype.

    Returns:
        [T, E], still zero at inactive experts.
    """
    return torch.where(active_TE, dense_TE, probs_TE)


def default_term(probs_TE: Tensor, active_TE: Tensor, default_vectors_ED: Tensor) -> Tensor:
    """Return what the default vectors add to each token's output.

    ``term_t = sum over inactive i of pi_ti * Ê_i``, with Ê detached (arXiv 2504.12463).

    Args:
        probs_TE: [T, E] probabilities over all experts.
        active_TE: [T, E] bool, the experts each token used.
        default_vectors_ED: [E, D] float32 default vectors.

    Returns:
        [T, D] in the dtype of the default vectors.
    """
    inactive_TE = inactive_probs(probs_TE, active_TE)
    return inactive_TE.to(default_vectors_ED.dtype) @ default_vectors_ED.detach()


def add_default_term(output_TD: Tensor, inactive_TE: Tensor, default_vectors_ED: Tensor) -> Tensor:
    """Return ``output + inactive @ Ê``: the product in the dtype of Ê, then cast, then added.

    Args:
        output_TD: [T, D] the routed experts' combined output.
        inactive_TE: [T, E] from :func:`inactive_probs`.
        default_vectors_ED: [E, D] float32 default vectors, treated as constants.

    Returns:
        [T, D] in the dtype of ``output_TD``.
    """
    vectors_ED = default_vectors_ED.detach()
    if output_TD.dtype == vectors_ED.dtype == inactive_TE.dtype:
        return torch.addmm(output_TD, inactive_TE, vectors_ED)
    return output_TD + (inactive_TE.to(vectors_ED.dtype) @ vectors_ED).to(output_TD.dtype)


class _DefaultGradientOnly(torch.autograd.Function):
    """Identity on the output whose backward also reaches the inactive probabilities."""

    @staticmethod
    def forward(
        ctx: Any, output_TD: Tensor, inactive_TE: Tensor, default_vectors_ED: Tensor
    ) -> Tensor:
        ctx.save_for_backward(default_vectors_ED)
        ctx.inactive_dtype = inactive_TE.dtype
        return output_TD.view_as(output_TD)

    @staticmethod
    def backward(ctx: Any, *grads_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_TD,) = grads_TD
        (vectors_ED,) = ctx.saved_tensors
        grad_TE = grad_TD.to(vectors_ED.dtype) @ vectors_ED.t()
        return grad_TD, grad_TE.to(ctx.inactive_dtype), None


def attach_default_gradient(
    output_TD: Tensor, inactive_TE: Tensor, default_vectors_ED: Tensor
) -> Tensor:
    """Return ``output`` unchanged, bit for bit, with the router gradient of the default term.

    The backward-only form ``y = y_topk + y' - stopgrad(y')`` (estimators.md), without computing
    y' in the forward. Arguments as in :func:`add_default_term`.
    """
    return _DefaultGradientOnly.apply(output_TD, inactive_TE, default_vectors_ED.detach())


def expert_sums(
    rows_RD: Tensor, tokens_per_expert_e: Tensor, probs_R: Tensor, weighting: Weighting
) -> Tensor:
    """Sum the rows the local experts returned, per expert.

    Megatron's experts return ``pi_i(x) E_i(x)``. Weighting ``router`` wants exactly their sum;
    ``uniform`` divides each row by its probability first. Rows with probability zero are padding
    and count as nothing, whatever they hold.

    Args:
        rows_RD: [R, D] expert outputs sorted by expert; rows beyond the counts are ignored.
        tokens_per_expert_e: [e] integer row counts, on the host or on the device.
        probs_R: [R] router probability of each row.
        weighting: ``router`` or ``uniform``.

    Returns:
        [e, D] sums in the accumulation dtype of the rows, without a gradient. Deterministic for
        host counts; device counts use atomic additions.
    """
    with torch.no_grad():
        dtype = accumulation_dtype(rows_RD)
        probs_R1 = probs_R.reshape(-1, 1)
        if weighting == "uniform":
            rows_RD = rows_RD.to(dtype) / probs_R1.to(dtype)
        rows_RD = torch.where(probs_R1 != 0, rows_RD, 0)
        if tokens_per_expert_e.device.type == "cpu":
            counts = tokens_per_expert_e.tolist()
            segments = rows_RD[: sum(counts)].split(counts)
            return torch.stack([segment.sum(0, dtype=dtype) for segment in segments])
        return _segment_sums_on_device(rows_RD, tokens_per_expert_e, dtype)


def _segment_sums_on_device(
    rows_RD: Tensor, tokens_per_expert_e: Tensor, dtype: torch.dtype
) -> Tensor:
    """Sum rows per expert when only the device knows the counts (no host read, [e, D])."""
    num_experts, num_rows = tokens_per_expert_e.numel(), rows_RD.shape[0]
    row_R = torch.arange(num_rows, device=rows_RD.device)
    # Rows beyond the last segment get the index one past the last expert and are cut off.
    expert_R = torch.bucketize(row_R, tokens_per_expert_e.cumsum(0), right=True)
    sums = torch.zeros(num_experts + 1, rows_RD.shape[1], dtype=dtype, device=rows_RD.device)
    return sums.index_add_(0, expert_R, rows_RD.to(dtype))[:-1]


def router_mass(probs_TE: Tensor, active_TE: Tensor, weighting: Weighting) -> Tensor:
    """Return the weight each expert's sum carries: the denominator of its mean output.

    Args:
        probs_TE: [T, E] the probabilities the experts' rows were multiplied by.
        active_TE: [T, E] bool, the experts each token used.
        weighting: ``router`` sums the probabilities, ``uniform`` counts the tokens.

    Returns:
        [E] in the accumulation dtype, without a gradient.
    """
    with torch.no_grad():
        dtype = accumulation_dtype(probs_TE)
        if weighting == "uniform":
            return active_TE.sum(0).to(dtype)
        return torch.where(active_TE, probs_TE, 0).sum(0, dtype=dtype)


def accepted_experts(sums_ED: Tensor, mass_E: Tensor) -> Tensor:
    """Return [E] bool: the experts whose mean output S_i/N_i exists and is finite."""
    mean_ED = sums_ED / mass_E.unsqueeze(-1)
    return (mass_E > 0) & mass_E.isfinite() & mean_ED.isfinite().all(-1)


def ema(default_vectors_ED: Tensor, sums_ED: Tensor, mass_E: Tensor, beta: float) -> Tensor:
    """Return the next default vectors.

    ``Ê_i <- beta Ê_i + (1 - beta) S_i / N_i`` where N_i > 0 and S_i / N_i is finite; elsewhere
    Ê_i stays as it was, to the bit (arXiv 2504.12463).

    Args:
        default_vectors_ED: [E, D] the vectors before the step.
        sums_ED: [E, D] sums over the tokens of the step (:func:`expert_sums`, over all ranks).
        mass_E: [E] their weights (:func:`router_mass`, over all ranks).
        beta: in [0, 1), the share of the old vector.

    Returns:
        [E, D], a new tensor.
    """
    mean_ED = sums_ED / mass_E.unsqueeze(-1)
    accepted_E1 = accepted_experts(sums_ED, mass_E).unsqueeze(-1)
    blended_ED = beta * default_vectors_ED + (1.0 - beta) * mean_ED
    return torch.where(accepted_E1, blended_ED, default_vectors_ED)


def bias_corrected(default_vectors_ED: Tensor, updates_E: Tensor, beta: float) -> Tensor:
    """Return ``Ê_i / (1 - beta^n_i)``: the mean a zero-started average would have without its lag.

    Args:
        default_vectors_ED: [E, D] averages that started at zero.
        updates_E: [E] int, the number n_i of updates each has had; 0 leaves the vector as it is.
        beta: in [0, 1), as in :func:`ema`.

    Returns:
        [E, D].
    """
    # In float64: 1 - beta^n cancels when beta is near one and n small.
    seen_weight_E = (1.0 - beta ** updates_E.double()).to(default_vectors_ED.dtype)
    scale_E = torch.where(updates_E > 0, 1.0 / seen_weight_E, 1.0)
    return default_vectors_ED * scale_E.unsqueeze(-1)
