"""The same maths as ``functional.py``, as loops over tokens and experts in float64.

Slow on purpose: this is what the formulas say, one multiplication at a time. The tests compare
``functional`` and the whole layer with it. Shape suffixes as in ``functional.py``.
"""

import math

import torch
from torch import Tensor


def default_term(probs_TE: Tensor, active_TE: Tensor, default_vectors_ED: Tensor) -> Tensor:
    """[T, D] float64: ``sum over inactive i of pi_ti Ê_i``, token by token."""
    num_tokens, num_experts = probs_TE.shape
    term_TD = torch.zeros(num_tokens, default_vectors_ED.shape[1], dtype=torch.float64)
    for t in range(num_tokens):
        for i in range(num_experts):
            if not active_TE[t, i]:
                term_TD[t] += probs_TE[t, i].double() * default_vectors_ED[i].double()
    return term_TD


def fading_output(
    output_TD: Tensor,
    probs_TE: Tensor,
    active_TE: Tensor,
    default_vectors_ED: Tensor,
    steps: int,
    fade_in: int,
) -> Tensor:
    """[T, D] float64: ``y + min(1, n / N) y'`` after n of the N steps of a fade-in.

    Its gradient into the router logits is that of the whole term (:func:`router_logit_gradient`
    with the default vectors as the values of inactive experts), whatever n is.
    """
    fraction = 1.0 if steps >= fade_in else steps / fade_in
    term_TD = default_term(probs_TE, active_TE, default_vectors_ED)
    faded_TD = output_TD.double().clone()
    for t in range(len(term_TD)):
        for d in range(term_TD.shape[1]):
            faded_TD[t, d] += fraction * term_TD[t, d]
    return faded_TD


def expert_sums(
    rows_RD: Tensor, tokens_per_expert_e: Tensor, probs_R: Tensor, weighting: str
) -> Tensor:
    """[e, D] float64: per expert, the sum of ``row`` (router) or ``row / p`` (uniform)."""
    sums_eD = torch.zeros(len(tokens_per_expert_e), rows_RD.shape[1], dtype=torch.float64)
    row = 0
    for i, count in enumerate(tokens_per_expert_e.tolist()):
        for _ in range(count):
            p = float(probs_R[row])
            if p != 0:
                sums_eD[i] += rows_RD[row].double() / (p if weighting == "uniform" else 1.0)
            row += 1
    return sums_eD


def router_mass(probs_TE: Tensor, active_TE: Tensor, weighting: str) -> Tensor:
    """[E] float64: per expert, the sum of p (router) or the number of tokens (uniform)."""
    mass_E = torch.zeros(probs_TE.shape[1], dtype=torch.float64)
    for t in range(probs_TE.shape[0]):
        for i in range(probs_TE.shape[1]):
            if active_TE[t, i]:
                mass_E[i] += 1.0 if weighting == "uniform" else float(probs_TE[t, i])
    return mass_E


def ema(default_vectors_ED: Tensor, sums_ED: Tensor, mass_E: Tensor, beta: float) -> Tensor:
    """[E, D] float64: the moving average, expert by expert, number by number."""
    result_ED = default_vectors_ED.double().clone()
    for i in range(len(mass_E)):
        mass = float(mass_E[i])
        if not (mass > 0 and math.isfinite(mass)):
            continue
        mean_D = [float(s) / mass for s in sums_ED[i]]
        if all(math.isfinite(m) for m in mean_D):
            for d, m in enumerate(mean_D):
                result_ED[i, d] = beta * result_ED[i, d] + (1 - beta) * m
    return result_ED


def router_logit_gradient(probs_TE: Tensor, values_TED: Tensor, grad_TD: Tensor) -> Tensor:
    """[T, E] float64: ``dL/ds_j = pi_j (g_j - sum_i pi_i g_i)`` with ``g_i = <dy, v_i>``.

    The gradient of ``y = sum_i pi_i v_i`` (v detached, pi a softmax) into the router logits
    (estimators.md). ``values_TED`` holds each token's v_i: E_i(x) for an active expert; for an
    inactive one zero (TopK) or Ê_i (Default).
    """
    grad_TE = torch.zeros(probs_TE.shape, dtype=torch.float64)
    for t in range(probs_TE.shape[0]):
        g_E = [float(grad_TD[t].double() @ v.double()) for v in values_TED[t]]
        mean = sum(float(p) * g for p, g in zip(probs_TE[t], g_E, strict=True))
        for j, g in enumerate(g_E):
            grad_TE[t, j] = float(probs_TE[t, j]) * (g - mean)
    return grad_TE
