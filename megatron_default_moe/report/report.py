"""What a run wrote, as files a person reads: `metrics.csv`, `loss.png`, `experts.png`, a summary.

The source is the run's TensorBoard events, so the report also works for runs on a cluster and while
a run is under way. A resumed run has several event files. For each tag the later file wins from the
first step that it holds, because what an earlier process logged beyond its last checkpoint belongs
to a branch of training that was given up.
"""

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from megatron_default_moe.errors import UserError

Series = dict[int, float]
"""Values of one tag by step, in order of steps."""

TRAIN_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
TOKENS = "consumed tokens"
STEP_SECONDS = "iteration-time"


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """All scalars of a run, and the number of tokens that belongs to a step."""

    series: dict[str, Series]
    """By TensorBoard tag; tags whose x axis is not the step (`... vs samples`) are left out."""
    tokens_per_step: float | None
    """From `consumed tokens`, else as the user gave it, else unknown."""

    def steps(self) -> list[int]:
        """Every step with a value, in order."""
        return sorted({step for values in self.series.values() for step in values})

    def tokens(self, step: int) -> int | None:
        """Tokens seen after `step`: as logged, else in proportion between logged steps."""
        logged = self.series.get(TOKENS, {})
        if self.tokens_per_step is None:
            return None
        if step in logged:
            return round(logged[step])
        before = max((known for known in logged if known < step), default=None)
        after = min((known for known in logged if known > step), default=None)
        if after is not None:
            # A batch size that ramps up makes the line through zero wrong: stay between neighbours.
            xs = [before or 0, after]
            ys = [logged[before] if before is not None else 0.0, logged[after]]
            return round(float(np.interp(step, xs, ys)))
        start = logged[before] if before is not None else 0.0
        return round(start + (step - (before or 0)) * self.tokens_per_step)


def read_scalars(folder: Path, tokens_per_step: int | None = None) -> Scalars:
    """Read every TensorBoard event file below `folder`.

    Args:
        folder: a TensorBoard log directory.
        tokens_per_step: global batch size times sequence length, for runs that do not log tokens.

    Raises:
        UserError: there is no event file with a scalar.
    """
    series: dict[str, Series] = {}
    for events in _event_files(folder):
        for tag, values in events.items():
            first = min(values)
            kept = {step: v for step, v in series.get(tag, {}).items() if step < first}
            series[tag] = kept | dict(sorted(values.items()))
    if not series:
        raise UserError(f"no TensorBoard scalars below {folder}; see --tensorboard-dir")
    per_step: float | None
    if logged := series.get(TOKENS):
        steps = list(logged)[-2:]
        taken = logged[steps[-1]] - (logged[steps[0]] if len(steps) == 2 else 0.0)
        per_step = taken / (steps[-1] - (steps[0] if len(steps) == 2 else 0))
    else:
        per_step = float(tokens_per_step) if tokens_per_step else None
    return Scalars(series=series, tokens_per_step=per_step)


def _event_files(folder: Path) -> list[dict[str, Series]]:
    """The scalars of each file, in the order in which the files were begun."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    found = []
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        # Never purge: several tags restart at lower steps legitimately, and tags are merged above.
        reader = EventAccumulator(str(path), {"scalars": 0}, purge_orphaned_data=False).Reload()
        tags = [tag for tag in reader.Tags()["scalars"] if not tag.endswith(" vs samples")]
        scalars: dict[str, Series] = {
            tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in tags
        }
        if scalars:
            begun = min(reader.Scalars(tag)[0].wall_time for tag in tags)
            found.append((begun, path.name, scalars))
    return [scalars for *_, scalars in sorted(found, key=lambda item: item[:2])]


def write_csv(scalars: Scalars, path: Path) -> None:
    """Write a row per logged step: step, tokens (empty when unknown), and a column per tag."""
    tags = sorted(set(scalars.series) - {TOKENS})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", *tags])
        for step in scalars.steps():
            values = (scalars.series[tag].get(step) for tag in tags)
            cells = ["" if value is None else f"{value:.7g}" for value in values]
            writer.writerow([step, scalars.tokens(step), *cells])


def write_report(
    run_dir: Path, *, tensorboard_dir: Path | None = None, tokens_per_step: int | None = None
) -> list[Path]:
    """Write `metrics.csv`, `loss.png` and `experts.png` into `run_dir`.

    Args:
        run_dir: the run's folder.
        tensorboard_dir: its events; `run_dir/tensorboard` by default.
        tokens_per_step: see `read_scalars`.

    Returns:
        The files written.
    """
    from megatron_default_moe.report import plots

    scalars = read_scalars(tensorboard_dir or run_dir / "tensorboard", tokens_per_step)
    files = [run_dir / name for name in ("metrics.csv", "loss.png", "experts.png")]
    run_dir.mkdir(parents=True, exist_ok=True)
    write_csv(scalars, files[0])
    plots.plot_loss(scalars, files[1])
    plots.plot_experts(scalars, files[2])
    return files


def latest_iteration(checkpoint_dir: Path) -> int | None:
    """The last iteration saved in a Megatron checkpoint folder, None where there is none."""
    try:
        return int((checkpoint_dir / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        return None


def summary(run_dir: Path) -> str:
    """A few lines for a person: what is in `run_dir` and what the numbers say.

    Args:
        run_dir: a folder that `write_report` wrote to; the checkpoint is `run_dir/checkpoint`.
    """
    lines = [f"Written to {run_dir}:"]
    iteration = latest_iteration(run_dir / "checkpoint")
    if iteration is not None:
        lines.append(f"  {'checkpoint/':<14}model, optimizer and data state at step {iteration}")
    for name, what in {
        "metrics.csv": "every logged number, a row per step",
        "loss.png": "train and validation loss against tokens",
        "experts.png": "load per expert and default-vector norms per layer over time",
        "tensorboard": "the events behind them",
    }.items():
        if (run_dir / name).exists():
            lines.append(f"  {name + '/' * (run_dir / name).is_dir():<14}{what}")
    if (run_dir / "metrics.csv").is_file():
        lines += _results(run_dir / "metrics.csv")
    return "\n".join(lines)


def _results(path: Path) -> list[str]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def column(tag: str) -> list[tuple[dict[str, Any], float]]:
        return [(row, float(row[tag])) for row in rows if row.get(tag)]

    lines = []
    if train := column(TRAIN_LOSS):
        (first, start), (last, _) = train[0], train[-1]
        recent = [loss for _, loss in train[-10:]]
        lines.append(
            f"Train loss {start:.3f} at step {first['step']}, {fmean(recent):.3f} at step "
            f"{last['step']} (mean of the last {len(recent)} logged)."
        )
        if last["tokens"]:
            lines[-1] += f" Tokens: {int(last['tokens']):,}."
    if validation := column(VALIDATION_LOSS):
        row, loss = validation[-1]
        lines.append(f"Validation loss {loss:.3f} at step {row['step']}.")
    seconds = [value for _, value in column(STEP_SECONDS)]
    if seconds and train and train[-1][0]["tokens"]:
        step_seconds = median(seconds)
        per_step = int(train[-1][0]["tokens"]) / int(train[-1][0]["step"])
        lines.append(
            f"Median step {step_seconds:.2f} s, {per_step / step_seconds:,.0f} tokens per second."
        )
    return lines
