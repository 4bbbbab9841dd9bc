"""The linear default: what an expert a token did not use would return, linear in the token.

    v_j(x) = Ê_j + C_j G_j^-1 (P x - z_j)

Ê_j is the default vector, P a fixed random projection to r features, z_j and G_j their mean and
covariance over the tokens of expert j, C_j the covariance of its outputs with them; moving averages
of sums over steps. (Ours; measured on the planted-experts task: docs/estimators.md.)

Suffixes: T tokens, E experts, e local ones, D output width, H token width, r features, F = 1 + r.
"""

import torch
from torch import Tensor

_ALIKE = 1e-5
"""Variance of the features, in units of their mean square, below which there is no slope."""


def projection(width: int, rank: int, seed: int) -> Tensor:
    """Return P: [r, H] float32 from N(0, 1/H), the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=generator) / width**0.5


def features(tokens_TH: Tensor, projection_rH: Tensor) -> Tensor:
    """Return ``[1, P x]``: [T, F] float32. The one makes means and counts part of the moments."""
    projected_Tr = tokens_TH.float() @ projection_rH.t()
    return torch.cat([projected_Tr.new_ones(projected_Tr.shape[0], 1), projected_Tr], dim=1)


def token_moments(weights_TE: Tensor, features_TF: Tensor) -> Tensor:
    """Return ``sum_t w_te f_t f_t^T``: [E, F, F] float32, over this rank's tokens.

    Args:
        weights_TE: [T, E] the weight of each token in each expert's statistics, zero where unused.
        features_TF: [T, F].
    """
    pairs_TF = features_TF.unsqueeze(2) * features_TF.unsqueeze(1)
    size = features_TF.shape[1]
    return (weights_TE.float().t() @ pairs_TF.flatten(1)).view(-1, size, size)


def row_moments(
    rows_RD: Tensor, tokens_per_expert: list[int], weights_R: Tensor, features_RF: Tensor
) -> Tensor:
    """Return ``sum w E_i(x) f(x)^T`` per local expert: [e, D, F] float32.

    Args:
        rows_RD: [R, D] what the experts returned, sorted by expert.
        tokens_per_expert: row counts.
        weights_R: [R] what makes of a row the weighted output; zero for padding.
        features_RF: [R, F] of the rows' tokens.
    """
    sums_eDF = rows_RD.new_zeros(
        len(tokens_per_expert), rows_RD.shape[1], features_RF.shape[1], dtype=torch.float32
    )
    total = sum(tokens_per_expert)
    used_R1 = (weights_R != 0).unsqueeze(-1)
    weighted_RF = (features_RF * weights_R.float().unsqueeze(-1)).masked_fill(~used_R1, 0)
    rows_RD = rows_RD.float().masked_fill(~used_R1, 0)
    parts = zip(
        rows_RD[:total].split(tokens_per_expert),
        weighted_RF[:total].split(tokens_per_expert),
        sums_eDF,
        strict=True,
    )
    for rows, weighted, sums in parts:
        torch.mm(rows.t(), weighted, out=sums)
    return sums_eDF


def average(old: Tensor, sums: Tensor, mass_E: Tensor, beta: float) -> Tensor:
    """Return ``beta old + (1 - beta) sums`` where an expert got tokens and its sums are finite.

    Args:
        old: [E, ...] moving averages of sums.
        sums: [E, ...] of the step.
        mass_E: [E] the weights in them.
        beta: in [0, 1).
    """
    accepted_E = (mass_E > 0) & sums.flatten(1).isfinite().all(-1)
    shape = (-1, *([1] * (old.dim() - 1)))
    return torch.where(accepted_E.view(shape), torch.lerp(old, sums, 1.0 - beta), old)


def coefficients(cross_EDF: Tensor, moments_EFF: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the slopes ``C_j G_j^-1`` [E, D, r] and the centres ``z_j`` [E, r].

    Args:
        cross_EDF: [E, D, F] averages of ``sum w E f^T``.
        moments_EFF: [E, F, F] averages of ``sum w f f^T``; [:, 0, 0] is their mass.
        ridge: added to the diagonal of G, in units of its mean.

    Returns:
        Both zero for an expert without tokens, or with tokens that were all alike, or where a slope
        is not finite.
    """
    rank = moments_EFF.shape[1] - 1
    if rank == 0:
        return cross_EDF[..., 1:], moments_EFF[:, 0, 1:]
    mass_E11 = moments_EFF[:, :1, :1]
    means_EDF, second_EFF = cross_EDF / mass_E11, moments_EFF / mass_E11
    centre_Er = second_EFF[:, 0, 1:]
    covariance_Err = second_EFF[:, 1:, 1:] - centre_Er.unsqueeze(2) * centre_Er.unsqueeze(1)
    diagonal_E = covariance_Err.diagonal(dim1=1, dim2=2).mean(-1)
    square_E = second_EFF[:, 1:, 1:].diagonal(dim1=1, dim2=2).mean(-1)
    eye_rr = torch.eye(rank, device=covariance_Err.device)
    covariance_Err = covariance_Err + ridge * diagonal_E.view(-1, 1, 1) * eye_rr
    cross_EDr = means_EDF[..., 1:] - means_EDF[..., :1] * centre_Er.unsqueeze(1)
    # An expert without tokens has NaN here, and one whose tokens were all alike a covariance of
    # rounding errors: solve what there is, then leave those out.
    usable_E = covariance_Err.flatten(1).isfinite().all(-1) & (diagonal_E > _ALIKE * square_E)
    usable_E = usable_E & cross_EDr.flatten(1).isfinite().all(-1)
    covariance_Err = torch.where(usable_E.view(-1, 1, 1), covariance_Err, eye_rr)
    cross_EDr = torch.where(usable_E.view(-1, 1, 1), cross_EDr, 0)
    slopes_EDr = torch.linalg.solve_ex(covariance_Err, cross_EDr.mT)[0].mT
    finite_E = usable_E & slopes_EDr.flatten(1).isfinite().all(-1)
    slopes_EDr = torch.where(finite_E.view(-1, 1, 1), slopes_EDr, 0)
    return slopes_EDr.contiguous(), torch.where(finite_E.unsqueeze(-1), centre_Er, 0)


def predictions(
    grad_TD: Tensor,
    vectors_ED: Tensor,
    slopes_EDr: Tensor,
    centre_Er: Tensor,
    features_TF: Tensor,
) -> Tensor:
    """Return ``<dy_t, v_j(x_t)>`` for every expert: [T, E] float32.

    Args:
        grad_TD: [T, D] dy.
        vectors_ED: [E, D] Ê.
        slopes_EDr: [E, D, r] and
        centre_Er: [E, r] from :func:`coefficients`.
        features_TF: [T, F] of the tokens.
    """
    grad_TD = grad_TD.float()
    result_TE = grad_TD @ vectors_ED.t()
    (num_experts, width, rank) = slopes_EDr.shape
    if rank:
        flat_DEr = slopes_EDr.transpose(0, 1).reshape(width, num_experts * rank)
        along_TEr = (grad_TD @ flat_DEr).view(-1, num_experts, rank)
        offset_TEr = features_TF[:, 1:].unsqueeze(1) - centre_Er
        result_TE = result_TE + (along_TEr * offset_TEr).sum(-1)
    return result_TE


def anchor(predicted_TE: Tensor, active_grad_TE: Tensor, probs_TE: Tensor) -> Tensor:
    """Return how much the used experts' own terms exceed their predictions: [T] float32.

    ``sum over used a of w_a (g_a - <dy, v_a>)`` with ``w_a = p_a / sum p``; for K = 1 the used
    expert's own residual.

    Args:
        predicted_TE: [T, E] from :func:`predictions`.
        active_grad_TE: [T, E] ``g_a = <dy, E_a(x)>`` at used experts.
        probs_TE: [T, E] multipliers, zero at unused experts.
    """
    share_TE = probs_TE.float() / probs_TE.float().sum(-1, keepdim=True).clamp_min(1e-20)
    residual_TE = (active_grad_TE.float() - predicted_TE).masked_fill(probs_TE == 0, 0)
    return (share_TE * residual_TE).sum(-1)


def explained(fit_2: Tensor) -> Tensor:
    """Return ``1 - sum (g - prediction)^2 / sum g^2`` in [0, 1], zero where nothing is known: [].

    Args:
        fit_2: [2] averages of the two sums, over used experts.
    """
    ratio = 1 - fit_2[0] / fit_2[1]
    return torch.where(ratio.isfinite(), ratio, 0).clamp(0, 1)


def fit(predicted_TE: Tensor, active_grad_TE: Tensor, active_TE: Tensor) -> Tensor:
    """Return how well the used experts' terms are predicted: [2] float32.

    ``sum (g - prediction)^2`` and ``sum g^2`` over used experts.

    Args:
        predicted_TE: [T, E] from :func:`predictions`.
        active_grad_TE: [T, E] ``g_a = <dy, E_a(x)>`` at used experts.
        active_TE: [T, E] bool, the used ones.
    """
    true_TE = active_grad_TE.float().masked_fill(~active_TE, 0)
    missed_TE = true_TE - predicted_TE.masked_fill(~active_TE, 0)
    return torch.stack([missed_TE.square().sum(), true_TE.square().sum()])


def average_fit(old_2: Tensor, fit_2: Tensor, beta: float) -> Tensor:
    """Return the moving average of a step's :func:`fit`, as shares of its second number: [2].

    (How large gradients are depends on the number of data-parallel ranks; the share does not.)
    """
    share_2 = fit_2 / fit_2[1]
    return average(old_2[None], share_2[None], share_2[1:], beta)[0]


def anchor_strength(form: str, fit_2: Tensor) -> Tensor | float | None:
    """Return delta, the share of :func:`anchor` that is added; None for none.

    Args:
        form: ``none``, ``full`` or ``scaled`` (:func:`explained`).
        fit_2: [2] from :func:`average_fit`.
    """
    return {"none": None, "full": 1.0, "scaled": explained(fit_2)}[form]


def unused_gradient(
    predicted_TE: Tensor,
    active_grad_TE: Tensor,
    probs_TE: Tensor,
    strength: Tensor | float | None,
) -> Tensor:
    """Return the gradient of the unused experts' probabilities: [T, E], zero at used ones.

    The predictions, each shifted by ``strength`` times the :func:`anchor` of its token.

    Args:
        predicted_TE: [T, E] from :func:`predictions`.
        active_grad_TE: [T, E] ``g_a = <dy, E_a(x)>`` at used experts.
        probs_TE: [T, E] multipliers, zero at unused experts.
        strength: from :func:`anchor_strength`.
    """
    if strength is not None:
        shift_T = anchor(predicted_TE, active_grad_TE, probs_TE)
        predicted_TE = predicted_TE + (strength * shift_T).unsqueeze(-1)
    return predicted_TE.masked_fill(probs_TE != 0, 0)
