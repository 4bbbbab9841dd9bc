"""SparseMixer and SparseMixer-v2: drawn experts, and the gradient rule of their multipliers.

arXiv 2310.00811 (v1, K = 1) and 2409.12136 (v2, GRIN, K = 1 or 2). Shapes: T tokens, E experts.
Everything is in the dtype of the logits, which callers hand over in float32 (or float64).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """One expert per token."""

    multiplier_T: Tensor
    """[T] what its output is multiplied by; the graph is the estimator's gradient rule."""
    expert_T: Tensor
    """[T] int64 its number."""


class _Straight(torch.autograd.Function):
    """A value with the gradient of another."""

    @staticmethod
    def forward(ctx: object, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def keep_mask(logits_TE: Tensor, width: float) -> Tensor:
    """Return which experts may be drawn: those within ``width`` of the best, relatively.

    Out is expert j where ``max s - s_j > width (|max s| + |s_j|)`` (2310.00811, equation 9).

    Args:
        logits_TE: [T, E]; -inf is out.
        width: the paper's r.

    Returns:
        [T, E] bool.
    """
    best_T1 = logits_TE.max(-1, keepdim=True).values
    bound_TE = width * (best_T1.abs() + logits_TE.abs())
    return (best_T1 - logits_TE <= bound_TE) & (logits_TE > -math.inf)


def draw(probs_TE: Tensor, uniforms_TE: Tensor) -> Tensor:
    """Draw one expert per token with these probabilities, by an exponential race.

    Args:
        probs_TE: [T, E]; an expert with probability zero is never drawn.
        uniforms_TE: [T, E] in (0, 1), independent.

    Returns:
        [T] int64.
    """
    arrival_TE = -torch.log(uniforms_TE) / probs_TE.clamp_min(1e-30)
    return arrival_TE.masked_fill(probs_TE == 0, math.inf).argmin(-1)


def sparsemixer(
    logits_TE: Tensor, width: float, uniforms_TE: Tensor | None, coin_T: Tensor | None
) -> Choice:
    """Choose one expert by SparseMixer (v1).

    ``p`` is the softmax of the unmasked logits, D drawn from it, ``m = p_D``. The output's
    multiplier is m where D is the argmax or the coin falls so (probability 1/2), else m / 2; its
    derivative is 2 in either case: the Euler and the mid-point term, each with probability 1/2.

    Args:
        logits_TE: [T, E].
        width: of the mask.
        uniforms_TE: [T, E] in (0, 1) to draw with; None (evaluation) takes the argmax.
        coin_T: [T] in (0, 1), with ``uniforms_TE``.
    """
    probs_TE = _masked_softmax(logits_TE, width)
    best_T = logits_TE.argmax(-1)
    if uniforms_TE is None or coin_T is None:
        return Choice(_at(probs_TE, best_T), best_T)
    drawn_T = draw(probs_TE.detach(), uniforms_TE)
    drawn_prob_T = _at(probs_TE, drawn_T)
    whole_T = (drawn_T == best_T) | (coin_T < 0.5)
    value_T = torch.where(whole_T, drawn_prob_T, drawn_prob_T / 2).detach()
    return Choice(_Straight.apply(value_T, 2 * drawn_prob_T), drawn_T)


def sparsemixer_v2(
    logits_TE: Tensor,
    topk: int,
    width: float,
    uniforms_KTE: Tensor | None,
    coins_KT: Tensor | None,
) -> list[Choice]:
    """Choose one or two experts by SparseMixer-v2, the second without the first.

    As v1, but the multiplier is m where D is the argmax or the coin falls so (probability 1/4),
    else m / 3, and its derivative is 1 (Heun's third-order rule). The multipliers are not
    normalised together.

    Args:
        logits_TE: [T, E].
        topk: 1 or 2.
        width: of the mask.
        uniforms_KTE: [K, T, E] in (0, 1); None (evaluation) takes the best.
        coins_KT: [K, T] in (0, 1), with ``uniforms_KTE``.
    """
    choices: list[Choice] = []
    left_TE = logits_TE
    for k in range(topk):
        probs_TE = _masked_softmax(left_TE, width)
        best_T = left_TE.argmax(-1)
        if uniforms_KTE is None or coins_KT is None:
            choice = Choice(_at(probs_TE, best_T), best_T)
        else:
            drawn_T = draw(probs_TE.detach(), uniforms_KTE[k])
            drawn_prob_T = _at(probs_TE, drawn_T)
            whole_T = (drawn_T == best_T) | (coins_KT[k] < 0.25)
            value_T = torch.where(whole_T, drawn_prob_T, drawn_prob_T / 3).detach()
            choice = Choice(_Straight.apply(value_T, drawn_prob_T), drawn_T)
        choices.append(choice)
        left_TE = left_TE.scatter(1, choice.expert_T.unsqueeze(-1), -math.inf)
    return choices


def given(logits_TE: Tensor, experts: list[Tensor], width: float) -> Tensor:
    """Return the probabilities that given experts were drawn with: [T, E], zero elsewhere.

    Args:
        logits_TE: [T, E].
        experts: [T] int64 for each choice, in the order of drawing.
        width: of the mask.
    """
    left_TE, result_TE = logits_TE, torch.zeros_like(logits_TE)
    for expert_T in experts:
        chosen_T1 = expert_T.unsqueeze(-1)
        probs_TE = _masked_softmax(left_TE, width)
        result_TE = result_TE.scatter(1, chosen_T1, probs_TE.gather(1, chosen_T1))
        left_TE = left_TE.scatter(1, chosen_T1, -math.inf)
    return result_TE


def combine(choices: list[Choice], num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the multipliers [T, E], zero where unused, and the map [T, E] bool."""
    numbers_TK = torch.stack([choice.expert_T for choice in choices], dim=-1)
    values_TK = torch.stack([choice.multiplier_T for choice in choices], dim=-1)
    zeros_TE = values_TK.new_zeros(numbers_TK.shape[0], num_experts)
    chosen_TE = torch.zeros_like(zeros_TE, dtype=torch.bool).scatter(1, numbers_TK, True)
    return zeros_TE.scatter(1, numbers_TK, values_TK), chosen_TE


def _masked_softmax(logits_TE: Tensor, width: float) -> Tensor:
    masked_TE = logits_TE.masked_fill(~keep_mask(logits_TE.detach(), width), -math.inf)
    return torch.softmax(masked_TE, dim=-1)


def _at(values_TE: Tensor, expert_T: Tensor) -> Tensor:
    return values_TE.gather(1, expert_T.unsqueeze(-1)).squeeze(-1)
