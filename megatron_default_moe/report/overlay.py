"""Several runs in one picture: loss and load against tokens, and numbers by layer.

A line is a run, or the mean of runs that differ in their seed, in a band from the least to the
greatest of them.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_default_moe.errors import UserError
from megatron_default_moe.report.plots import absent, running_mean, token_axis
from megatron_default_moe.report.scalars import (
    STEP_SECONDS,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    Scalars,
    Series,
    read_scalars,
)

Groups = Mapping[str, Sequence[Scalars]]
"""Runs by the name of their line; an empty group is left out."""

ENTROPY, LOAD, DEAD = "router entropy", "load max/mean", "dead experts"
FIDELITY = "router-gradient cosine"
BALANCE = {
    LOAD: "busiest expert / fair share",
    DEAD: "experts without a token, all layers",
    ENTROPY: "router entropy (nats)",
    FIDELITY: "cosine to the dense router gradient",
}
"""Tags of the panels of load and router, and what they show."""


class Axis:
    """Where a step of a run lies: at its tokens if every run logged them, else at its number."""

    def __init__(self, groups: Groups) -> None:
        runs = [run for group in groups.values() for run in group]
        self.by_tokens = all(run.tokens_per_step is not None for run in runs)
        largest = max((self._of(run, run.steps()[-1]) for run in runs), default=1.0)
        self.scale, self.label = token_axis(largest) if self.by_tokens else (1.0, "step")

    def _of(self, run: Scalars, step: int) -> float:
        tokens = run.tokens(step) if self.by_tokens else None
        return float(step if tokens is None else tokens)

    def places(self, run: Scalars, steps: Sequence[int]) -> Any:
        """Return x of these steps: [steps] float64."""
        return np.array([self._of(run, step) for step in steps]) / self.scale


def color(place: int) -> str:
    """The color of a line by its place among the groups."""
    return f"C{place % 10}"


def style(place: int) -> str:
    """The dashes of a line by its place: beyond ten, colors come again."""
    return ("-", "--", ":", "-.")[place // 10 % 4]


def common(group: Sequence[Scalars], tag: str) -> tuple[list[int], Any]:
    """The steps at which every run of a group logged a tag, and its values.

    Returns:
        Steps in order, and [runs, steps] float64.
    """
    series = [run.series.get(tag, {}) for run in group]
    steps = sorted(set.intersection(*(set(one) for one in series))) if series else []
    return steps, np.array([[one[step] for step in steps] for one in series])


def draw_bands(axes: Axes, groups: Groups, tag: str, smooth: bool = False) -> None:
    """Draw a tag of every group against tokens, with a legend; say so if nobody logged it.

    Args:
        axes: the panel.
        groups: runs by line.
        tag: TensorBoard's.
        smooth: whether to draw a running mean, for what is noisy from step to step.
    """
    axis = Axis(groups)
    for place, (name, group) in enumerate(groups.items()):
        steps, values = common(group, tag)
        if not steps:
            continue
        window = max(1, len(steps) // 40) if smooth else 1
        values = np.array([running_mean(row, window) for row in values])
        x = axis.places(group[0], steps)
        look: dict[str, Any] = {"color": color(place), "linestyle": style(place)}
        marker = "o" if len(steps) <= 40 and not smooth else None
        label = name if len(group) == 1 else f"{name} ({len(group)} seeds)"
        axes.plot(x, values.mean(0), marker=marker, markersize=3, label=label, **look)
        if len(group) > 1:
            axes.fill_between(
                x, values.min(0), values.max(0), color=look["color"], alpha=0.18, linewidth=0
            )
    if axes.lines:
        axes.legend()
        axes.grid(alpha=0.3)
        axes.set_xlabel(axis.label)
    else:
        absent(axes, f"no scalar '{tag}'")


def losses(groups: Groups) -> Figure:
    """Validation and training loss against tokens."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for axes, tag, smooth, title in zip(
        figure.subplots(1, 2),
        (VALIDATION_LOSS, TRAIN_LOSS),
        (False, True),
        ("Validation loss", "Training loss (running mean)"),
        strict=True,
    ):
        draw_bands(axes, groups, tag, smooth)
        axes.set(title=title, ylabel="loss (nats per token)")
    return figure


def balance(groups: Groups) -> Figure:
    """Load and router against tokens, a panel for each of `BALANCE` that any run logged."""
    found = [tag for tag in BALANCE if _logged(groups, tag)] or [LOAD]
    figure = Figure(figsize=(6 * min(2, len(found)), 4 * -(-len(found) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(found) // 2), min(2, len(found)), squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place >= len(found):
            axes.set_axis_off()
            continue
        draw_bands(axes, groups, found[place], smooth=True)
        axes.set(title=found[place], ylabel=BALANCE[found[place]])
    return figure


def _logged(groups: Groups, tag: str) -> bool:
    return any(run.series.get(tag) for group in groups.values() for run in group)


def by_layer(groups: Groups) -> Figure | None:
    """Numbers of each layer at the end of training; None if no run logged layers.

    Each is a mean over the last tenth of what was logged, and over the runs of a group.
    """
    tags = [tag for tag in (ENTROPY, LOAD, FIDELITY) if _layers(groups, tag)]
    if not tags:
        return None
    figure = Figure(figsize=(5 * len(tags) + 1, 4), layout="constrained")
    for axes, tag in zip(figure.subplots(1, len(tags), squeeze=False).flat, tags, strict=True):
        for place, (name, group) in enumerate(groups.items()):
            layers = _layers({name: group}, tag)
            values = [
                np.mean([_late(run.series[f"moe/{tag}_layer_{layer}"]) for run in group])
                for layer in layers
            ]
            if layers:
                axes.plot(layers, values, f"o{style(place)}", color=color(place), label=name)
                axes.set_xticks(layers)
        axes.set(title=f"{tag}, at the end", xlabel="layer", ylabel=BALANCE[tag])
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def _layers(groups: Groups, tag: str) -> list[int]:
    """Layers of which every run of some group logged the tag."""
    form = re.compile(rf"moe/{re.escape(tag)}_layer_(\d+)")
    found: set[int] = set()
    for group in groups.values():
        each = [{int(m[1]) for name in run.series if (m := form.fullmatch(name))} for run in group]
        found |= set.intersection(*each) if each else set()
    return sorted(found)


def _late(series: Series) -> float:
    values = list(series.values())
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def write(run_dirs: Sequence[Path], folder: Path, tokens_per_step: int | None = None) -> str:
    """Write ``loss.png``, ``router.png`` and, where layers were logged, ``layers.png``.

    Args:
        run_dirs: the runs' folders, or their events'.
        folder: where to write.
        tokens_per_step: see ``read_scalars``.

    Returns:
        A table of the runs.

    Raises:
        UserError: a run is there twice, or has no events.
    """
    groups = {
        name: [read_scalars(events, tokens_per_step)]
        for name, events in zip(names(run_dirs), map(_events, run_dirs), strict=True)
    }
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"loss.png": losses(groups), "router.png": balance(groups)}
    if (layers := by_layer(groups)) is not None:
        figures["layers.png"] = layers
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=130)
    width = max(len(name) for name in groups)
    rows = [f"{name:<{width}}  {_ended(runs[0])}" for name, runs in groups.items()]
    return "\n".join([*rows, f"Written to {folder}: {', '.join(figures)}"])


def names(run_dirs: Sequence[Path]) -> list[str]:
    """A name for each run: what their paths do not share.

    Raises:
        UserError: a run is there twice.
    """
    paths = [path.resolve() for path in run_dirs]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"{twice[0]} is given twice: name different runs to draw over one another")
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):  # What all begin with, then what all end with.
        while min(map(len, parts)) > 1 and len({one[end] for one in parts}) == 1:
            for one in parts:
                del one[end]
    return ["/".join(one) for one in parts]


def _events(run_dir: Path) -> Path:
    inside = run_dir / "tensorboard"
    return inside if inside.is_dir() else run_dir


def _ended(run: Scalars) -> str:
    """What a run's last numbers are."""
    parts = []
    for what, tag in (("train", TRAIN_LOSS), ("validation", VALIDATION_LOSS)):
        if series := run.series.get(tag):
            step = max(series)
            parts.append(f"{what} loss {series[step]:.4f} at step {step}")
    if seconds := list(run.series.get(STEP_SECONDS, {}).values()):
        parts.append(f"median step {statistics.median(seconds):.3g} s")
    return ", ".join(parts)
