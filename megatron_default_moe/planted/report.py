"""Tables and the picture of a study of planted experts."""

import csv
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_default_moe.planted import measures
from megatron_default_moe.planted.store import Results
from megatron_default_moe.planted.training import EVERY, Outcome

BASELINE = "topk"


def mean(values: Sequence[float]) -> float:
    """The mean over the seeds."""
    return sum(values) / len(values)


def difference(results: Results, name: str) -> measures.Interval:
    """FVU of an arm less that of TopK, over the seeds."""
    return measures.paired_interval(results.outcomes[name].fvu, results.outcomes[BASELINE].fvu)


def interval_text(interval: measures.Interval) -> str:
    """A difference with its interval; a star where zero is outside of it."""
    half = "" if math.isinf(interval.half) else f" +- {interval.half:.3f}"
    star = "*" if interval.excludes_zero else ""
    return f"{interval.mean:+.3f}{half}{star}"


def wins(results: Results, name: str) -> str:
    """How often an arm's FVU is below TopK's."""
    pairs = zip(results.outcomes[name].fvu, results.outcomes[BASELINE].fvu, strict=True)
    won = sum(a < b for a, b in pairs)
    return f"{won}/{len(results.seeds)}"


def reached_text(outcome: Outcome) -> str:
    """How many seeds reached the threshold, and when."""
    steps = [step for step in outcome.reached if step is not None]
    return f"{len(steps)}/{len(outcome.reached)}" + (f" @{mean(steps):.0f}" if steps else "")


def fidelity_text(results: Results, name: str) -> str:
    """Cosine / norm ratio at each probed step."""
    probes = results.fidelity.get(name, [])
    return ", ".join(f"{mean(one[0]):.2f}/{mean(one[1]):.2f}" for one in probes)


COLUMNS = (
    *("arm", "FVU", "less TopK's", "wins", "NMI", "load", "dead", "reached"),
    "gradient",
)


def cells(results: Results, name: str) -> list[str]:
    """One arm's row of the table."""
    outcome = results.outcomes[name]
    against = name != BASELINE
    return [
        name,
        f"{mean(outcome.fvu):.3f}",
        interval_text(difference(results, name)) if against else "",
        wins(results, name) if against else "",
        f"{mean(outcome.nmi):.2f}",
        f"{mean(outcome.load):.2f}",
        f"{mean(outcome.dead):.1f}",
        reached_text(outcome),
        fidelity_text(results, name),
    ]


def table(results: Results, names: Sequence[str]) -> str:
    """The table of one setting, in Markdown that is also readable as it stands."""
    rows = [list(COLUMNS), *(cells(results, name) for name in names)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def legend(results: Results) -> str:
    """What the columns are."""
    probed = ", ".join(str(step) for step in results.probed) or "none"
    return (
        "FVU: variance of the teacher that is unexplained on held-out tokens. Less TopK's: paired"
        " over the seeds, +- 95 % (Student's t), * where zero is outside. NMI: of the router's"
        " choice with the hidden experts. Load: of the busiest expert, 1 is fair. Dead: experts"
        f" below a tenth of it. Reached: seeds with FVU below {results.setting.threshold}, @ mean"
        " step of those. Gradient: cosine/norm ratio of the router gradient to the dense one, on"
        f" TopK's weights at steps {probed}."
    )


def write_csv(file: pathlib.Path, studies: dict[str, Results]) -> None:
    """Write a row for each setting, arm and seed."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["setting", "arm", "seed", "fvu", "nmi", "load", "dead", "reached"])
        for setting, results in studies.items():
            for name, one in results.outcomes.items():
                for place, seed in enumerate(results.seeds):
                    numbers = [one.fvu, one.nmi, one.load, one.dead]
                    shown = [f"{values[place]:.6g}" for values in numbers]
                    writer.writerow([setting, name, seed, *shown, one.reached[place]])


def draw(file: pathlib.Path, studies: dict[str, Results], names: list[str]) -> None:
    """Draw FVU against steps and the differences to TopK, a row for each setting.

    Args:
        file: the PNG to write.
        studies: results by the name of the setting.
        names: the arms, in their order.
    """
    height = 1.2 + max(2.2, 0.3 * len(names))
    figure = Figure(figsize=(11, height * len(studies)), layout="constrained")
    grid = figure.subplots(len(studies), 2, squeeze=False, width_ratios=[3, 2])
    for (setting, results), (left, right) in zip(studies.items(), grid, strict=True):
        _curves(left, results, names)
        left.set_title(f"{setting}: unexplained variance against training")
        _differences(right, results, names)
        right.set_title(f"{setting}: less TopK's, 95 %")
    grid[0][0].legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=130)


def _curves(axes: Axes, results: Results, names: list[str]) -> None:
    for place, name in enumerate(names):
        curve_SP = np.array(results.outcomes[name].curve)
        steps_P = EVERY * (1 + np.arange(curve_SP.shape[1]))
        middle_P = curve_SP.mean(0)
        axes.plot(steps_P, middle_P, color=f"C{place}", label=name, linewidth=1.5)
        if len(curve_SP) > 1:
            # The seeds' own spread: the paired differences are in the other panel.
            half_P = curve_SP.std(0, ddof=1) / math.sqrt(len(curve_SP))
            axes.fill_between(
                steps_P, middle_P - half_P, middle_P + half_P, color=f"C{place}", alpha=0.15
            )
    axes.set(xlabel="step", ylabel="FVU (standard error over seeds)", ylim=(0, None))
    axes.grid(alpha=0.3)


def _differences(axes: Axes, results: Results, names: list[str]) -> None:
    for place, name in enumerate(names):
        interval = measures.Interval(0.0, 0.0)
        if name != BASELINE:
            interval = difference(results, name)
        half = interval.half if math.isfinite(interval.half) else 0.0
        axes.errorbar(
            interval.mean, place, xerr=half, fmt="o", color=f"C{place}", capsize=3, markersize=4
        )
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("FVU - FVU of TopK")
    axes.grid(alpha=0.3, axis="x")
