"""What SparseMixer's drawn gradients are in expectation, and what that expectation is exact on.

Contract: the mean of value and gradient over many draws is the sum over every expert and coin of
their probability times theirs (enumerated here); and the claims of the papers that do hold: with
``g_D(m)`` the loss as a function of the multiplier, the mid-point rule is exact on a quadratic
``g`` (2310.00811, section 3.2) and Heun's third-order rule on a cubic one (2409.12136, section 2).
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megatron_default_moe.maths import hashing, sparsemixer
from megatron_default_moe.maths.sparsemixer import Choice

EXPERTS = 5
WIDE = 1e9
"""A mask that keeps every expert."""
COIN = {"v1": 0.5, "v2": 0.25}
"""Probability that a multiplier is whole where the expert is not the best."""

Loss = Callable[[list[Choice]], Tensor]


def logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(EXPERTS, generator=generator, dtype=torch.float64)


def choose(version: str, topk: int, scores_TE: Tensor, width: float, drawn: Tensor) -> list[Choice]:
    """Choose with numbers [T, K, E + 1]: a column for each expert, and the coin."""
    drawn_KTC = drawn.transpose(0, 1)
    if version == "v1":
        return [
            sparsemixer.sparsemixer(scores_TE, width, drawn_KTC[0, :, :-1], drawn_KTC[0, :, -1])
        ]
    return sparsemixer.sparsemixer_v2(
        scores_TE, topk, width, drawn_KTC[..., :-1], drawn_KTC[..., -1]
    )


def gradients(
    version: str, topk: int, scores_E: Tensor, width: float, drawn: Tensor, loss: Loss
) -> tuple[Tensor, list[Choice]]:
    """Return the gradient [T, E] of T tokens with the same logits, and what was chosen."""
    scores_TE = scores_E.expand(drawn.shape[0], -1).clone().requires_grad_()
    choices = choose(version, topk, scores_TE, width, drawn)
    (grad_TE,) = torch.autograd.grad(loss(choices).sum(), scores_TE)
    return grad_TE, choices


def outcomes(
    version: str, topk: int, scores_E: Tensor, width: float
) -> Iterator[tuple[float, Tensor]]:
    """Each outcome: its probability, by own arithmetic, and numbers [1, K, E + 1] for it."""
    per_choice = list(itertools.product(range(EXPERTS), (True, False)))
    for outcome in itertools.product(per_choice, repeat=topk):
        left, chance = scores_E.clone(), 1.0
        drawn = torch.full((1, topk, EXPERTS + 1), 0.5, dtype=torch.float64)
        for k, (expert, whole) in enumerate(outcome):
            best = left.max()
            kept = (best - left) <= width * (best.abs() + left.abs())
            probs = torch.where(kept & left.isfinite(), left.exp(), 0.0)
            coin = COIN[version] if whole else 1 - COIN[version]
            chance *= float(probs[expert] / probs.sum()) * coin
            drawn[0, k, expert] = 1 - 1e-15
            drawn[0, k, -1] = 0.0 if whole else 0.999
            left[expert] = -torch.inf
        if chance > 0:
            yield chance, drawn


def a_loss(choices: list[Choice]) -> Tensor:
    """Return a loss of the token that is different for each expert, and not linear."""
    slope_E = torch.linspace(-1.0, 2.0, EXPERTS, dtype=torch.float64)
    parts = [slope_E[one.expert_T] * (one.multiplier_T + one.multiplier_T**2) for one in choices]
    result = torch.stack(parts).sum(0)
    if len(parts) == 2:
        result = result + parts[0] * parts[1]
    return result


@pytest.mark.parametrize("width", [WIDE, 0.6])
@pytest.mark.parametrize(("version", "topk"), [("v1", 1), ("v2", 1), ("v2", 2)])
def test_the_mean_over_draws_is_the_sum_over_outcomes(
    version: str, topk: int, width: float
) -> None:
    scores_E = logits()
    expected_E = torch.zeros(EXPERTS, dtype=torch.float64)
    total = 0.0
    for chance, drawn in outcomes(version, topk, scores_E, width):
        grad_TE, _ = gradients(version, topk, scores_E, width, drawn, a_loss)
        expected_E += chance * grad_TE[0]
        total += chance
    assert total == pytest.approx(1)

    tokens = 200_000
    key = torch.tensor([7, 11], dtype=torch.int64)
    flat = hashing.uniforms(key, torch.arange(tokens), topk * (EXPERTS + 1))
    drawn = flat.double().view(tokens, topk, EXPERTS + 1)
    grad_TE, choices = gradients(version, topk, scores_E, width, drawn, a_loss)
    error_E = grad_TE.std(0) / tokens**0.5
    assert ((grad_TE.mean(0) - expected_E).abs() <= 5 * error_E + 1e-12).all()
    assert error_E.max() < 0.01 * expected_E.abs().max(), "too few draws to say anything"
    assert len(choices[0].expert_T.unique()) > 1


def test_no_outcome_without_a_mask_is_left_out() -> None:
    assert len(list(outcomes("v2", 1, logits(), WIDE))) == 2 * EXPERTS
    assert len(list(outcomes("v2", 1, logits(), 0.6))) < 2 * EXPERTS


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("version", "degree"), [("v1", 2), ("v2", 3)])
def test_the_rule_is_exact_on_a_polynomial_of_its_degree(
    version: str, degree: int, seed: int
) -> None:
    assert error_of_rule(version, degree, seed) < 1e-12
    assert error_of_rule(version, degree + 1, seed) > 1e-6, "of its degree, and of no higher one"


def error_of_rule(version: str, degree: int, seed: int) -> float:
    """Distance of the experts' expected gradients, the best one's left out, from the exact sum.

    Exact is ``sum_D dp_D (g_D(p_D) - g_D(0))``, to which v1 adds ``sum_D p_D g_D'(p_D) dp_D``, the
    multiplier's own derivative. (At the best expert both take Euler's rule, which is of first
    order.)
    """
    scores_E = logits(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    powers = torch.arange(degree + 1)
    coefficients_EP = torch.randn(EXPERTS, degree + 1, generator=generator, dtype=torch.float64)

    def g(choices: list[Choice]) -> Tensor:
        (one,) = choices
        return (coefficients_EP[one.expert_T] * one.multiplier_T.unsqueeze(-1) ** powers).sum(-1)

    found_E = torch.zeros(EXPERTS, dtype=torch.float64)
    for chance, drawn in outcomes(version, 1, scores_E, WIDE):
        grad_TE, (choice,) = gradients(version, 1, scores_E, WIDE, drawn, g)
        if choice.expert_T[0] != scores_E.argmax():
            found_E += chance * grad_TE[0]

    scores_E = scores_E.clone().requires_grad_()
    probs_E = scores_E.softmax(-1)
    exact: Tensor = torch.zeros((), dtype=torch.float64)
    for expert in range(EXPERTS):
        if expert == int(scores_E.argmax()):
            continue
        prob = probs_E[expert]
        p = prob.detach().requires_grad_()
        value = (coefficients_EP[expert] * p**powers).sum()
        (slope,) = torch.autograd.grad(value, p)
        weight = value.detach() - coefficients_EP[expert, 0]
        if version == "v1":
            weight = weight + p.detach() * slope
        exact = exact + prob * weight
    (exact_E,) = torch.autograd.grad(exact, scores_E)
    return float((found_E - exact_E).abs().max())
