"""The statistics of the study: paired intervals, agreement with the hidden experts, load."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A mean and the half-width of its confidence interval."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside."""
        return abs(self.mean) > self.half


def student_t_share(value: float, freedom: int) -> float:
    """Return the probability that Student's t is within ``value`` of zero.

    The finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    angle = math.atan(value / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    if freedom == 1:
        total = 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def student_t_quantile(share: float, freedom: int) -> float:
    """Return the value within which Student's t lies with probability ``share``."""
    low, high = 0.0, 1.0
    while student_t_share(high, freedom) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_share(middle, freedom) < share else (low, middle)
    return high


def paired_interval(
    values: Sequence[float], baseline: Sequence[float], share: float = 0.95
) -> Interval:
    """Return the mean of ``values - baseline`` and its interval by Student's t.

    Args:
        values: of each seed.
        baseline: of the same seeds, in the same order.
        share: of the intervals that hold the true mean.

    Returns:
        The interval; its half-width is infinite for fewer than two seeds.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return Interval(mean, math.inf)
    variance = sum((one - mean) ** 2 for one in differences) / (count - 1)
    return Interval(mean, student_t_quantile(share, count - 1) * math.sqrt(variance / count))


def mutual_information(first_T: Tensor, second_T: Tensor) -> float:
    """Return the normalised mutual information of two labellings, in [0, 1].

    ``2 I(a; b) / (H(a) + H(b))``; one if both have a single label.

    Args:
        first_T: [T] int64 labels.
        second_T: [T] int64 labels.
    """
    rows, columns = int(first_T.max()) + 1, int(second_T.max()) + 1
    counts = torch.bincount(first_T * columns + second_T, minlength=rows * columns)
    joint = counts.view(rows, columns).double() / len(first_T)
    entropy = [
        float(torch.special.entr(part).sum()) for part in (joint, joint.sum(1), joint.sum(0))
    ]
    both, own, other = entropy
    return 1.0 if own + other == 0 else 2 * (own + other - both) / (own + other)


def greatest_load(active_TE: Tensor) -> float:
    """Return the greatest expert's number of tokens, in units of the fair share."""
    counts_E = active_TE.sum(0)
    return float(counts_E.max() * len(counts_E) / counts_E.sum().clamp_min(1))


def dead_experts(active_TE: Tensor) -> int:
    """Return how many experts get less than a tenth of their fair share."""
    counts_E = active_TE.sum(0)
    return int((counts_E * 10 * len(counts_E) < counts_E.sum()).sum())


def unexplained(output_TD: Tensor, clean_TD: Tensor) -> float:
    """Return the fraction of variance unexplained: 1 is as good as the mean."""
    error = (output_TD - clean_TD).square().mean()
    return float(error / (clean_TD - clean_TD.mean(0)).square().mean())


def cosine_and_ratio(gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the cosine of two gradients and the ratio of their norms, of any shape."""
    one, other = gradient.flatten().double(), reference.flatten().double()
    cosine = float(torch.dot(one, other) / (one.norm() * other.norm()).clamp_min(1e-30))
    return cosine, float(one.norm() / other.norm().clamp_min(1e-30))
