"""Intervals against numbers worked out by hand and the printed t table."""

import math

import pytest

from megatron_default_moe.compare.statistics import mean_of, t_quantile, tokens_to, two_sided


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (9, 2.2622), (30, 2.0423)],
)
def test_the_quantiles_are_those_of_the_printed_table(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-5)


def test_the_distribution_has_its_closed_forms() -> None:
    """Of one degree of freedom Cauchy's; of two t / sqrt(2 + t^2)."""
    for t in (0.0, 0.3, 1.0, 5.0):
        assert two_sided(t, 1) == pytest.approx(2 / math.pi * math.atan(t))
        assert two_sided(t, 2) == pytest.approx(t / math.sqrt(2 + t * t))


def test_a_mean_has_its_error_and_interval() -> None:
    # 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14/3, error sqrt(14/12).
    found = mean_of([1.0, 2.0, 3.0, 6.0])
    assert found is not None
    assert (found.count, found.mean) == (4, 3.0)
    assert found.error == pytest.approx(1.0801234)
    assert found.low == pytest.approx(3 - 3.1824463 * 1.0801234)
    assert found.high == pytest.approx(3 + 3.1824463 * 1.0801234)


def test_one_seed_has_no_interval_and_none_no_mean() -> None:
    alone = mean_of([2.5])
    assert alone is not None
    assert (alone.mean, alone.error, alone.low, alone.high) == (2.5, None, None, None)
    assert mean_of([]) is None


@pytest.mark.parametrize(
    ("level", "tokens"), [(5.0, 100), (4.0, 100), (3.5, 150), (3.0, 200), (2.5, 350), (1.9, None)]
)
def test_a_curve_reaches_a_level_between_two_evaluations(
    level: float, tokens: float | None
) -> None:
    """It rises again between 200 and 300 tokens: the first time counts."""
    curve = [(100.0, 4.0), (200.0, 3.0), (300.0, 3.0), (400.0, 2.0)]
    assert tokens_to(curve, level) == tokens
