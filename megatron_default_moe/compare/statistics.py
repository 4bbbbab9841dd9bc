"""Means, standard errors, paired differences with t-intervals, and when a curve reaches a level.

Plain Python on a few numbers. The interval is Student's for the mean of paired differences: what
seeds have in common (data order, initial weights) cancels in each difference.
"""

import dataclasses
import math
from collections.abc import Sequence

LEVEL = 0.95
"""Of every interval."""


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over seeds; without spread where there is one seed."""

    count: int
    mean: float
    error: float | None
    """Standard error of the mean."""
    low: float | None
    high: float | None
    """The interval of `LEVEL`."""


def mean_of(values: Sequence[float]) -> Mean | None:
    """Mean, standard error and t-interval; None of nothing.

    Args:
        values: one number a seed.
    """
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(1, mean, None, None, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(variance / count)
    reach = t_quantile(count - 1) * error
    return Mean(count, mean, error, mean - reach, mean + reach)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t that a Student variable stays below in size with this probability.

    Args:
        freedom: degrees of freedom, at least 1.
        level: the probability, between 0 and 1.
    """
    low, high = 0.0, 1.0
    while two_sided(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def two_sided(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's T; Abramowitz and Stegun 26.7.3 and 26.7.4.

    Args:
        t: at least 0.
        freedom: degrees of freedom, at least 1.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    # Odd: cos + 2/3 cos^3 + ... ; even: 1 + 1/2 cos^2 + ...
    for place in range(freedom // 2):
        total += term
        number = 2 * place + 1 + odd
        term *= cosine**2 * number / (number + 1)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def tokens_to(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """Tokens at which a curve is first at a level or below; None if it never is.

    Args:
        curve: tokens and loss, in order of tokens; straight between two evaluations.
        level: the loss.
    """
    before: tuple[float, float] | None = None
    for tokens, loss in curve:
        if loss <= level:
            if before is None:
                return tokens
            share = (before[1] - level) / (before[1] - loss)
            return before[0] + share * (tokens - before[0])
        before = (tokens, loss)
    return None
