"""The statistics of the planted study against naive computations and a printed table."""

import math
import random

import pytest
import torch

from megatron_default_moe.planted import measures

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 15: 2.131, 30: 2.042}
"""Student's t, 97.5 %, by degrees of freedom."""


@pytest.mark.parametrize(("freedom", "value"), TABLE.items())
def test_student_t_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert measures.student_t_quantile(0.95, freedom) == pytest.approx(value, abs=6e-4)


def test_a_paired_interval_is_of_the_differences() -> None:
    interval = measures.paired_interval([1.0, 2.0, 4.0], [0.5, 2.5, 2.0])
    differences = [0.5, -0.5, 2.0]
    spread = math.sqrt(sum((d - 2 / 3) ** 2 for d in differences) / 2)
    assert interval.mean == pytest.approx(2 / 3)
    assert interval.half == pytest.approx(4.303 * spread / math.sqrt(3), rel=1e-3)
    assert not interval.excludes_zero
    assert measures.paired_interval([1.0], [0.0]).half == math.inf


def naive_information(first: list[int], second: list[int]) -> float:
    """2 I / (H + H), label by label."""
    count = len(first)

    def entropy(labels: list[object]) -> float:
        shares = [labels.count(label) / count for label in set(labels)]
        return -sum(share * math.log(share) for share in shares)

    own, other = entropy(list(first)), entropy(list(second))
    return 2 * (own + other - entropy(list(zip(first, second, strict=True)))) / (own + other)


def test_mutual_information_is_the_naive_one() -> None:
    draw = random.Random(0)
    first = [draw.randrange(5) for _ in range(200)]
    second = [(one + draw.randrange(2)) % 7 for one in first]
    found = measures.mutual_information(torch.tensor(first), torch.tensor(second))
    assert found == pytest.approx(naive_information(first, second), abs=1e-12)
    renamed = torch.tensor([(3 * one + 1) % 5 for one in first])
    assert measures.mutual_information(torch.tensor(first), renamed) == pytest.approx(1.0)


def test_load_and_dead_experts_are_counted() -> None:
    active_TE = torch.zeros(100, 4, dtype=torch.bool)
    active_TE[:50, 0] = active_TE[50:98, 1] = active_TE[98:, 2] = True
    assert measures.greatest_load(active_TE) == pytest.approx(2.0)
    assert measures.dead_experts(active_TE) == 2


def test_unexplained_variance_is_one_for_the_mean_and_zero_for_the_truth() -> None:
    clean = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) + 2
    assert measures.unexplained(clean.mean(0).expand_as(clean), clean) == pytest.approx(1.0)
    assert measures.unexplained(clean, clean) == 0


def test_cosine_and_ratio() -> None:
    cosine, ratio = measures.cosine_and_ratio(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert (cosine, ratio) == pytest.approx((0.5**0.5, 3 / 2**0.5))
