"""What a run wrote, as files a person reads: `metrics.csv`, `loss.png`, `experts.png`, a summary.

The source is the run's TensorBoard events (`scalars`), so the report also works for runs on a
cluster and while a run is under way.
"""

import csv
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_default_moe.report.scalars import (
    STEP_SECONDS,
    TEST_LOSS,
    TOKENS,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    Scalars,
    read_scalars,
)


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
        "experts.png": "load per expert, and default-vector norms per layer, over time",
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
    for what, tag in (("Validation", VALIDATION_LOSS), ("Test", TEST_LOSS)):
        if measured := column(tag):
            row, loss = measured[-1]
            lines.append(f"{what} loss {loss:.3f} at step {row['step']}.")
    seconds = [value for _, value in column(STEP_SECONDS)]
    if seconds and train and train[-1][0]["tokens"]:
        step_seconds = median(seconds)
        per_step = int(train[-1][0]["tokens"]) / int(train[-1][0]["step"])
        lines.append(
            f"Median step {step_seconds:.2f} s, {per_step / step_seconds:,.0f} tokens per second."
        )
    return lines
