"""What the runs of a study measured, and its tables: ``table.csv`` and ``metrics.csv``."""

import csv
import dataclasses
import functools
import pathlib
import statistics as of_python
from collections.abc import Sequence
from typing import Any

from megatron_default_moe.compare.statistics import Mean, mean_of, tokens_to
from megatron_default_moe.errors import UserError
from megatron_default_moe.report.scalars import (
    STEP_SECONDS,
    TOKENS,
    VALIDATION_LOSS,
    Scalars,
    read_scalars,
)

MEMORY = "mem-max-allocated-bytes"


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished run."""

    arm: str
    seed: int
    scalars: Scalars
    steps: int

    @property
    def final(self) -> float:
        """Validation loss after the last step."""
        return self.scalars.series[VALIDATION_LOSS][self.steps]

    @functools.cached_property
    def curve(self) -> list[tuple[float, float]]:
        """Tokens (steps, where no tokens were logged) and validation loss."""
        series = self.scalars.series[VALIDATION_LOSS]
        return [(float(self.scalars.tokens(step) or step), loss) for step, loss in series.items()]

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step; the first logged one warms up, and is left out of several."""
        seconds = list(self.scalars.series.get(STEP_SECONDS, {}).values())
        return of_python.median(seconds[1:] or seconds) if seconds else None

    @property
    def memory(self) -> float | None:
        """Most bytes allocated on the GPU, where that was logged."""
        return max(self.scalars.series.get(MEMORY, {}).values(), default=None)


def read(arm: str, seed: int, events: pathlib.Path, steps: int) -> Result:
    """Read a run's events.

    Raises:
        UserError: no validation loss was logged after the last step.
    """
    scalars = read_scalars(events)
    losses = scalars.series.get(VALIDATION_LOSS, {})
    if steps not in losses:
        last = max(scalars.steps())
        why = f"it ended at step {last} of {steps}" if last < steps else "see eval-iters"
        raise UserError(f"no validation loss was logged after step {steps}: {why}")
    return Result(arm, seed, scalars, steps)


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm in the table."""

    arm: str
    results: dict[int, Result]
    """By seed; those that are finished."""
    final: Mean | None
    difference: Mean | None
    """Final loss less the baseline's of the same seed; None for the baseline."""
    reached: int
    """In how many paired seeds the baseline's final loss was reached."""
    paired: int
    """Seeds that the baseline finished, too."""
    tokens: Mean | None
    """Tokens to the baseline's final loss; where every paired seed reached it."""
    tokens_ratio: Mean | None
    """The same over the baseline's."""
    step_time_ratio: Mean | None
    memory: float | None


def rows(arms: Sequence[str], baseline: str, results: Sequence[Result]) -> list[Row]:
    """Compare every arm with the baseline, in pairs of the same seed.

    Args:
        arms: names in order.
        baseline: one of them.
        results: the finished runs.
    """
    by_arm = {arm: {one.seed: one for one in results if one.arm == arm} for arm in arms}
    return [_row(arm, by_arm[arm], by_arm[baseline], arm == baseline) for arm in arms]


def _row(arm: str, own: dict[int, Result], base: dict[int, Result], is_base: bool) -> Row:
    pairs = [(own[seed], base[seed]) for seed in sorted(own) if seed in base]
    needed = [(tokens_to(one.curve, of.final), tokens_to(of.curve, of.final)) for one, of in pairs]
    reached = [(mine, theirs) for mine, theirs in needed if mine is not None and theirs is not None]
    everywhere = reached if len(reached) == len(pairs) else []
    ratios = [
        one.step_seconds / of.step_seconds
        for one, of in pairs
        if one.step_seconds is not None and of.step_seconds is not None
    ]
    return Row(
        arm=arm,
        results=own,
        final=mean_of([own[seed].final for seed in sorted(own)]),
        difference=None if is_base else mean_of([one.final - of.final for one, of in pairs]),
        reached=len(reached),
        paired=len(pairs),
        tokens=mean_of([mine for mine, _ in everywhere]),
        tokens_ratio=mean_of([mine / theirs for mine, theirs in everywhere]),
        step_time_ratio=mean_of(ratios),
        memory=max((one.memory for one in own.values() if one.memory is not None), default=None),
    )


def write_table(table: Sequence[Row], seeds: Sequence[int], path: pathlib.Path) -> None:
    """Write ``table.csv``: a row an arm; a cell is empty where nothing can be said."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        head = (
            "arm,finished_seeds,final_loss_mean,final_loss_standard_error,paired_seeds,"
            "difference_mean,difference_low_95,difference_high_95,reached_baseline_loss,"
            "tokens_to_baseline_loss,tokens_ratio,step_time_ratio,memory_bytes"
        )
        writer.writerow([*head.split(","), *(f"final_loss_seed_{seed}" for seed in seeds)])
        for row in table:
            final, difference = row.final, row.difference
            numbers = [
                *(final and final.mean, final and final.error, row.paired),
                *(difference and difference.mean, difference and difference.low),
                *(difference and difference.high, row.reached),
                *(row.tokens and row.tokens.mean, row.tokens_ratio and row.tokens_ratio.mean),
                *(row.step_time_ratio and row.step_time_ratio.mean, row.memory),
                *(row.results[seed].final if seed in row.results else None for seed in seeds),
            ]
            writer.writerow([row.arm, len(row.results), *map(_cell, numbers)])


def write_metrics(results: Sequence[Result], path: pathlib.Path) -> None:
    """Write ``metrics.csv``: a row for each arm, seed and logged step, a column per tag."""
    tags = sorted({tag for one in results for tag in one.scalars.series} - {TOKENS})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "step", "tokens", *tags])
        for one in results:
            for step in one.scalars.steps():
                values = [one.scalars.series.get(tag, {}).get(step) for tag in tags]
                start = [one.arm, one.seed, step, one.scalars.tokens(step)]
                writer.writerow([*start, *map(_cell, values)])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.7g}"


def text(table: Sequence[Row]) -> str:
    """The table for a terminal."""
    lines = [
        f"{'arm':<24}{'seeds':>6}{'final loss':>12}{'std. err.':>11}"
        f"{'difference [95 %]':>32}{'tokens':>9}{'step time':>11}"
    ]
    for row in table:
        final, apart = row.final, row.difference
        shown = "" if apart is None else f"{apart.mean:+.4f}"
        if apart is not None and apart.low is not None:
            shown += f" [{apart.low:+.4f}, {apart.high:+.4f}]"
        lines.append(
            f"{row.arm:<24}{len(row.results):>6}"
            f"{'-' if final is None else f'{final.mean:.4f}':>12}"
            f"{'-' if final is None or final.error is None else f'{final.error:.4f}':>11}"
            f"{shown or '-':>32}{ratio(row.tokens_ratio):>9}{ratio(row.step_time_ratio):>11}"
        )
    return "\n".join(lines)


def ratio(mean: Mean | None) -> str:
    """A ratio for a person."""
    return "-" if mean is None else f"{mean.mean:.2f} x"
