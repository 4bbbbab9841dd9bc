"""What the page says of differences, and that its curves are what the runs logged."""

import dataclasses
import pathlib

import numpy as np
import pytest

from megatron_default_moe.compare import page, results, study
from megatron_default_moe.compare.pictures import differences, paired
from megatron_default_moe.compare.results import Result, Row, rows
from megatron_default_moe.report import overlay
from megatron_default_moe.report.scalars import STEP_SECONDS, TOKENS, VALIDATION_LOSS, Scalars


def result(arm: str, seed: int, losses: dict[int, float], seconds: float = 1.0) -> Result:
    """A run of ten tokens a step, whose first step is slow."""
    steps = list(losses)
    series = {
        VALIDATION_LOSS: losses,
        TOKENS: {step: 10.0 * step for step in steps},
        STEP_SECONDS: {step: seconds if place else 100.0 for place, step in enumerate(steps)},
        "load max/mean": dict.fromkeys(steps, 1.5),
        **{f"moe/router entropy_layer_{layer}": {max(steps): layer / 10} for layer in (1, 2)},
    }
    return Result(arm, seed, Scalars(series=series, tokens_per_step=10.0), max(steps))


BASE = [result("topk", 1, {1: 5.0, 2: 4.0, 3: 3.0}), result("topk", 2, {1: 5.5, 2: 4.5, 3: 3.2})]
BETTER = [
    result("a<b", 1, {1: 5.0, 2: 3.0, 3: 2.9}, 2.0),
    result("a<b", 2, {1: 5.5, 2: 3.2, 3: 3.1}, 2.0),
]


@pytest.fixture
def table() -> list[Row]:
    return rows(["topk", "a<b", "none"], "topk", [*BASE, *BETTER])


def test_rows_compare_runs_of_the_same_seed(table: list[Row]) -> None:
    base, better, none = table
    assert better.difference is not None
    # -0.1 in both seeds: no spread at all.
    assert better.difference.mean == pytest.approx(-0.1)
    assert better.difference.error == pytest.approx(0)
    # At 20 of 30 tokens it has the baseline's final loss.
    assert (better.reached, better.paired) == (2, 2)
    assert better.tokens_ratio is not None
    assert better.tokens_ratio.mean == pytest.approx(2 / 3)
    assert better.step_time_ratio is not None
    assert better.step_time_ratio.mean == 2
    assert base.difference is None
    assert (none.final, none.difference, none.tokens) == (None, None, None)


def test_tokens_are_given_only_where_every_pair_reaches_the_loss() -> None:
    worse = [result("late", 1, {1: 6.0, 2: 5.0, 3: 3.5}), BETTER[1]]
    late = [worse[0], dataclasses.replace(worse[1], arm="late")]
    row = rows(["topk", "late"], "topk", [*BASE, *late])[1]
    assert (row.reached, row.paired, row.tokens, row.tokens_ratio) == (1, 2, None, None)


def test_a_seed_without_its_pair_is_in_no_difference() -> None:
    alone = result("alone", 7, {3: 1.0})
    row = rows(["topk", "alone"], "topk", [*BASE, alone])[1]
    assert row.final is not None
    assert (row.final.mean, row.difference, row.paired) == (1.0, None, 0)
    assert "nothing can be said" in page.verdict(row, "topk")


@pytest.mark.parametrize(
    ("apart", "says"),
    [
        ([-0.5, -0.51], "better."),
        ([0.5, 0.51], "worse."),
        ([-0.1, -0.5], "no difference can be told."),
        ([-0.1], "nothing follows."),
    ],
)
def test_a_verdict_is_the_intervals(apart: list[float], says: str) -> None:
    own = [result("own", seed, {3: 3.0 + d}) for seed, d in enumerate(apart, 1)]
    base = [result("topk", seed, {3: 3.0}) for seed in (1, 2)]
    assert page.verdict(rows(["topk", "own"], "topk", [*base, *own])[1], "topk").endswith(says)


def test_the_curve_of_differences_is_the_pairs(table: list[Row]) -> None:
    steps, apart = paired(BETTER, BASE)
    assert steps == [1, 2, 3]
    np.testing.assert_allclose(apart, [[0, -1, -0.1], [0, -1.3, -0.1]])
    (axes,) = differences(table, "topk").axes
    line = axes.lines[0]
    np.testing.assert_allclose(line.get_xdata(), [10, 20, 30])
    np.testing.assert_allclose(line.get_ydata(), [0, -1.15, -0.1])
    # Two pairs: the interval at 20 tokens is 12.706 times half their distance.
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-1.15 - 12.7062 * 0.15, abs=1e-3)


def test_a_line_is_the_mean_in_a_band_of_its_seeds(table: list[Row]) -> None:
    groups = {row.arm: [one.scalars for one in row.results.values()] for row in table}
    axes = overlay.losses(groups).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [5.25, 4.25, 3.1])
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (3.0, 5.5)
    (load,) = overlay.balance(groups).axes
    np.testing.assert_allclose(load.lines[1].get_ydata(), [1.5, 1.5, 1.5])
    assert load.axison
    layers = overlay.by_layer(groups)
    assert layers is not None
    np.testing.assert_allclose(layers.axes[0].lines[0].get_ydata(), [0.1, 0.2])
    assert overlay.by_layer({"none": []}) is None


def test_names_are_text_to_the_page(table: list[Row], tmp_path: pathlib.Path) -> None:
    arms: dict[str, dict[str, object]] = {row.arm: {"train-iters": "3"} for row in table}
    found = study.Study(tmp_path / "x.yaml", arms, (1, 2), "topk")
    page.write(found, table, {"none seed 1": "<b>"}, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "a&lt;b" in text
    assert "a<b" not in text
    assert "<b>" not in text
    results.write_table(table, [1, 2], tmp_path / "table.csv")
    assert "none,0,,,0," in (tmp_path / "table.csv").read_text()


def test_the_step_that_warms_up_is_left_out_where_there_are_others() -> None:
    assert result("topk", 1, {1: 5.0, 2: 4.0}, 2.0).step_seconds == 2
    assert result("topk", 1, {1: 5.0}).step_seconds == 100
