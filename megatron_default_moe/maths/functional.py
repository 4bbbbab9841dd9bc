"""The maths of Default MoE as pure functions of tensors.

Legend of the shape suffixes: T tokens, E experts (all), e experts of this rank, D width of an
expert's output, R rows an expert-parallel rank returns (sorted by expert), K experts per token.

Sources: Default MoE, arXiv 2504.12463 (the substitution of default vectors for the experts a
token did not use, and their exponential moving average). ``naive.py`` restates every function as
a loop in float64; the tests hold the two against each other.

All sums are taken in float32 at least. Nothing here synchronises the device with the host, except
that a ``tokens_per_expert_e`` which already lives on the host is read there.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

Weighting = Literal["router", "uniform"]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or the tensor's own dtype if that is wider."""
    return tensor.dtype if tensor.dtype.itemsize > 4 else torch.float32


def _multiplies_parts(tensor: Tensor) -> bool:
    """Whether a product with ``tensor`` is made of bfloat16 parts, with a float32 result.

    The CPU has no such product (``mm`` with ``out_dtype``): there the tensor is cast.
    """
    return tensor.dtype == torch.bfloat16 and tensor.device.type != "cpu"


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
    """Return ``output + inactive @ Ê``, rounded once to the dtype of the output.

    A bfloat16 output takes the product from operands split into bfloat16 parts
    (:class:`_SplitTerm`): no float32 tensor of the output's size is made. (In float16 parts of
    small numbers would be lost: there the product is made in float32, cast and added.)

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
    if output_TD.dtype == torch.bfloat16:
        return _SplitTerm.apply(output_TD, inactive_TE, vectors_ED)
    return output_TD + (inactive_TE.to(vectors_ED.dtype) @ vectors_ED).to(output_TD.dtype)


def _product_gradient(grad_TD: Tensor, vectors_ED: Tensor) -> Tensor:
    """[T, E] ``grad @ Ê^T`` in the dtype of Ê; of bfloat16 gradients without a copy of them."""
    if not _multiplies_parts(grad_TD):
        return grad_TD.to(vectors_ED.dtype) @ vectors_ED.t()
    num_experts, width = vectors_ED.shape
    parts_2ED = grad_TD.new_empty(2, num_experts, width)
    parts_2ED[0].copy_(vectors_ED)
    torch.sub(vectors_ED, parts_2ED[0], out=parts_2ED[1])
    halves_T2E = torch.mm(grad_TD, parts_2ED.flatten(0, 1).t(), out_dtype=torch.float32)
    return halves_T2E[:, :num_experts] + halves_T2E[:, num_experts:]


class _SplitTerm(torch.autograd.Function):
    """``output + p @ v`` as one bfloat16 product: ``[p_hi, p_hi, p_lo] @ [v_hi; v_lo; v_hi]``.

    With ``x_hi`` the bfloat16 nearest to x and ``x_lo`` the one nearest to the rest, only the
    product of the two rests is left out, 2^-16 of the term. What is saved is the buffer of the
    vectors itself; its parts are made again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, output_TD: Tensor, inactive_TE: Tensor, vectors_ED: Tensor) -> Tensor:
        ctx.save_for_backward(vectors_ED)
        ctx.inactive_dtype = inactive_TE.dtype
        (num_tokens, num_experts), width = inactive_TE.shape, vectors_ED.shape[1]
        probs_T3E = output_TD.new_empty(num_tokens, 3, num_experts)
        probs_T3E[:, :2].copy_(inactive_TE.unsqueeze(1))
        torch.sub(inactive_TE, probs_T3E[:, 0], out=probs_T3E[:, 2])
        vectors_3ED = output_TD.new_empty(3, num_experts, width)
        vectors_3ED[::2].copy_(vectors_ED)
        torch.sub(vectors_ED, vectors_3ED[0], out=vectors_3ED[1])
        return torch.addmm(output_TD, probs_T3E.flatten(1), vectors_3ED.flatten(0, 1))

    @staticmethod
    def backward(ctx: Any, *grads_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_TD,), (vectors_ED,) = grads_TD, ctx.saved_tensors
        return grad_TD, _product_gradient(grad_TD, vectors_ED).to(ctx.inactive_dtype), None


class _Faded(torch.autograd.Function):
    """A product with a fraction in the forward pass, the identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inactive_TE: Tensor, fraction: Tensor) -> Tensor:
        return inactive_TE * fraction.to(inactive_TE.dtype)

    @staticmethod
    def backward(ctx: Any, *grads_TE: Tensor) -> tuple[Tensor, None]:
        return grads_TE[0], None


def faded(inactive_TE: Tensor, fraction: Tensor) -> Tensor:
    """Return the inactive probabilities for a fraction f of the default term, gradient in full.

    With them :func:`add_default_term` gives ``y_topk + f y' + (1 - f)(y' - stopgrad(y'))``: from
    the backward-only form (f = 0, :func:`attach_default_gradient`) to the whole term (f = 1). The
    output sees f of the term; the router learns from all of it, whatever f is.

    Args:
        inactive_TE: [T, E] from :func:`inactive_probs`.
        fraction: [1] f, on the same device.

    Returns:
        [T, E] in the dtype of ``inactive_TE``: f times it, with its own gradient.
    """
    return _Faded.apply(inactive_TE, fraction)


def fade_in_fraction(steps_1: Tensor, fade_in: int) -> Tensor:
    """Return ``min(1, n / N)``: how much of the default term the next step's forward has.

    Args:
        steps_1: [1] int, the number n of optimizer steps taken since the fade-in began.
        fade_in: N, at least 1.

    Returns:
        [1] float32, on the device of ``steps_1``.
    """
    return (steps_1.to(torch.float32) / fade_in).clamp(max=1.0)


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
        (grad_TD,), (vectors_ED,) = grads_TD, ctx.saved_tensors
        return grad_TD, _product_gradient(grad_TD, vectors_ED).to(ctx.inactive_dtype), None


def attach_default_gradient(
    output_TD: Tensor, inactive_TE: Tensor, default_vectors_ED: Tensor
) -> Tensor:
    """Return ``output`` unchanged, bit for bit, with the router gradient of the default term.

    The backward-only form ``y = y_topk + y' - stopgrad(y')`` (estimators.md), without computing
    y' in the forward. Arguments as in :func:`add_default_term`.
    """
    return _DefaultGradientOnly.apply(output_TD, inactive_TE, default_vectors_ED.detach())


def expert_sums(
    rows_RD: Tensor,
    tokens_per_expert_e: Tensor,
    probs_R: Tensor,
    weighting: Weighting,
    *,
    padded: bool = True,
) -> Tensor:
    """Sum the rows the local experts returned, per expert.

    Megatron's experts return ``pi_i(x) E_i(x)``. Weighting ``router`` wants exactly their sum;
    ``uniform`` divides each row by its probability first. Rows with probability zero are padding
    and count as nothing, whatever they hold. Every expert is summed by itself (and not all by one
    product with a selecting matrix, which would be fewer operations), so that a row that is not
    finite spoils the sum of its own expert only.

    Args:
        rows_RD: [R, D] expert outputs sorted by expert; rows beyond the counts are ignored.
        tokens_per_expert_e: [e] integer row counts, on the host or on the device.
        probs_R: [R] router probability of each row.
        weighting: ``router`` or ``uniform``.
        padded: whether rows may be padding that is not finite; off saves a copy of all rows.

    Returns:
        [e, D] sums in the accumulation dtype of the rows, without a gradient. Deterministic for
        host counts; device counts use atomic additions.
    """
    with torch.no_grad():
        dtype, probs_R1 = accumulation_dtype(rows_RD), probs_R.reshape(-1, 1)
        on_host = tokens_per_expert_e.device.type == "cpu"
        if padded or not on_host:
            rows_RD = rows_RD.masked_fill(probs_R1 == 0, 0)
        if not on_host:
            if weighting == "uniform":
                rows_RD = rows_RD.to(dtype) / probs_R1.to(dtype).masked_fill(probs_R1 == 0, 1)
            return _segment_sums_on_device(rows_RD, tokens_per_expert_e, dtype)
        counts = tokens_per_expert_e.tolist()
        sums_eD = rows_RD.new_empty(len(counts), rows_RD.shape[1], dtype=dtype)
        segments = rows_RD[: sum(counts)].split(counts)
        if weighting == "router":
            for segment, sum_D in zip(segments, sums_eD, strict=True):
                torch.sum(segment, 0, dtype=dtype, out=sum_D)
            return sums_eD
        weights_PR = _row_weights(probs_R1.reshape(-1), rows_RD)
        for weights, segment, sum_D in zip(
            weights_PR[:, : sum(counts)].split(counts, dim=1), segments, sums_eD, strict=True
        ):
            if weights.dtype == segment.dtype != dtype:
                products_PD = torch.mm(weights, segment, out_dtype=dtype)
            else:
                products_PD = weights @ segment.to(dtype)
            torch.sum(products_PD, 0, out=sum_D)
        return sums_eD


def _row_weights(probs_R: Tensor, rows_RD: Tensor) -> Tensor:
    """[P, R] whose sum over P is ``1 / p`` (zero where p is), to multiply rows with.

    For bfloat16 rows on a device P is three bfloat16 parts, which hold the 24 bits of a float32, so
    that the rows need no copy in float32; elsewhere it is one row in the accumulation dtype.
    """
    dtype = accumulation_dtype(rows_RD)
    inverse_R = (1.0 / probs_R.to(dtype)).masked_fill_(probs_R == 0, 0)
    if not _multiplies_parts(rows_RD):
        return inverse_R.unsqueeze(0)
    parts_3R = rows_RD.new_empty(3, probs_R.numel())
    for part_R in parts_3R:
        part_R.copy_(inverse_R)
        inverse_R = inverse_R - part_R
    return parts_3R


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


def router_mass(probs_TE: Tensor, weighting: Weighting) -> Tensor:
    """Return the weight each expert's sum carries: the denominator of its mean output.

    Args:
        probs_TE: [T, E] the probabilities the experts' rows were multiplied by, zero at the experts
            that a token does not use.
        weighting: ``router`` sums the probabilities, ``uniform`` counts the tokens.

    Returns:
        [E] in the accumulation dtype, without a gradient.
    """
    with torch.no_grad():
        dtype = accumulation_dtype(probs_TE)
        if weighting == "uniform":
            return (probs_TE != 0).sum(0, dtype=dtype)
        return probs_TE.sum(0, dtype=dtype)


def mean_outputs(sums_ED: Tensor, mass_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return each expert's mean output S_i/N_i, and where it exists and is finite.

    Args:
        sums_ED: [..., E, D] sums (:func:`expert_sums`, over all ranks).
        mass_E: [..., E] their weights (:func:`router_mass`, over all ranks).

    Returns:
        [..., E, D] the means, and [..., E] bool where they may be used.
    """
    mean_ED = sums_ED / mass_E.unsqueeze(-1)
    # A comparison with NaN is false, so these are the finite ones.
    finite_E = mean_ED.abs().amax(-1) < math.inf
    return mean_ED, finite_E & (mass_E > 0) & (mass_E < math.inf)


def blend(vectors_ED: Tensor, mean_ED: Tensor, accepted_E: Tensor, beta: float) -> Tensor:
    """Return ``beta Ê_i + (1 - beta) m_i`` at accepted experts, elsewhere Ê_i to the bit.

    Arguments as in :func:`ema`, the means from :func:`mean_outputs`.
    """
    blended_ED = torch.lerp(vectors_ED, mean_ED.to(vectors_ED.dtype), 1.0 - beta)
    return torch.where(accepted_E.unsqueeze(-1), blended_ED, vectors_ED)


def ema(default_vectors_ED: Tensor, sums_ED: Tensor, mass_E: Tensor, beta: float) -> Tensor:
    """Return the next default vectors.

    ``Ê_i <- beta Ê_i + (1 - beta) S_i / N_i`` where N_i > 0 and S_i / N_i is finite; elsewhere
    Ê_i stays as it was, to the bit (arXiv 2504.12463).

    Args:
        default_vectors_ED: [..., E, D] the vectors before the step; leading dimensions are layers.
        sums_ED: [..., E, D] sums over the tokens of the step.
        mass_E: [..., E] their weights.
        beta: in [0, 1), the share of the old vector.

    Returns:
        [..., E, D], a new tensor.
    """
    return blend(default_vectors_ED, *mean_outputs(sums_ED, mass_E), beta)


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
