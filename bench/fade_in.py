"""What switching a trained TopK model to default vectors does to its loss: ``bench/fade_in.py``.

Trains a TopK model of the quickstart's size for 300 steps (of a schedule of 500), gives it default
vectors (``default-moe calibrate``), and goes on from it in several ways over the same batches. The
table shows the validation loss after 0, 50 and 200 further steps. One process, no launcher. Parts
that are done are not done again; the logs are in the run's folder.

    python bench/fade_in.py
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys

from megatron_default_moe.data.corpus import prepare_stdlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
SWITCH, END = 300, 500
FURTHER = (0, 50, 200)
ARMS = {
    "topk, as it was": ("topk", "--moe-router-gradient", "topk"),
    "vectors from zeros, with the fade-in (the default of --default-vector-from-baseline)": (
        *("topk", "--default-vector-from-baseline"),
    ),
    "vectors from zeros, at once": (
        *("topk", "--default-vector-from-baseline", "--default-vector-fade-in", "0"),
    ),
    "calibrated, with the fade-in (the default of calibrate)": ("calibrated",),
    "calibrated, at once": ("calibrated", "--default-vector-fade-in", "0"),
}
"""The checkpoint to go on from, and flags."""
_LOSS = re.compile(r"validation loss at iteration (\d+)[^|]*\| lm loss value: ([\d.E+-]+)")


def flags(folder: pathlib.Path, seed: int) -> list[str]:
    """The quickstart's model, data and schedule, on one rank."""
    data = folder.parent / "data"
    return [
        *("--config", str(ROOT / "examples" / "quickstart.yaml"), "--seed", str(seed)),
        *("--expert-model-parallel-size", "1", "--train-iters", str(END)),
        *("--eval-iters", "32", "--eval-interval", "50", "--save-interval", "1000"),
        *("--tokenizer-model", str(data / "tokenizer.model")),
        *("--train-data-path", str(data / "train"), "--valid-data-path", str(data / "valid")),
        *("--data-cache-path", str(data / "cache")),
    ]


def run(log: pathlib.Path, *command: str) -> str:
    """Run a command of ``default-moe`` unless its log says that it was done; return its output."""
    if not log.is_file():
        print(f"{log.stem}: {' '.join(command)}", flush=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "megatron_default_moe", *command]
        part = log.with_suffix(".part")
        with part.open("w") as stream:
            done = subprocess.run(line, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"{part} ended with exit code {done.returncode}")
        part.rename(log)
    return log.read_text()


def losses(text: str) -> dict[int, float]:
    """Validation losses in a log, by step; of the last, before and after the end, the first."""
    return {int(step): float(loss) for step, loss in reversed(_LOSS.findall(text))}


def measure(folder: pathlib.Path, seed: int) -> dict[str, list[float]]:
    """Everything of one seed: per arm the losses after ``FURTHER`` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    common = flags(folder, seed)
    topk, calibrated = folder / "topk", folder / "calibrated"
    first = [*common, "--moe-router-gradient", "topk", "--eval-iters", "0"]
    leave = ["--save", str(topk), "--save-interval", str(SWITCH), "--exit-interval", str(SWITCH)]
    run(folder / "topk.log", "pretrain", *first, *leave)
    said = run(
        *(folder / "calibrate.log", "calibrate", *common),
        *("--load", str(topk), "--save", str(calibrated)),
    )
    print(next(line for line in said.splitlines() if "> calibrated on" in line), flush=True)
    found = {}
    for number, (name, (start, *own)) in enumerate(ARMS.items()):
        arm = [*common, *own, "--load", str(folder / start)]
        now = run(folder / f"arm-{number}-at-once.log", "pretrain", *arm, "--skip-train")
        later = run(folder / f"arm-{number}.log", "pretrain", *arm)
        by_step = {**losses(later), **losses(now)}
        found[name] = [by_step[SWITCH + further] for further in FURTHER]
    return found


def table(seeds: dict[int, dict[str, list[float]]]) -> str:
    """The losses of each arm, their mean and each seed's own."""
    head = "| went on with | " + " | ".join(f"after {further} steps" for further in FURTHER) + " |"
    lines = [head, "|---|" + "---|" * len(FURTHER)]
    for name in ARMS:
        cells = []
        for place in range(len(FURTHER)):
            values = [found[name][place] for found in seeds.values()]
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"**{statistics.fmean(values):.3f}** ({each})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=pathlib.Path, default=ROOT / "runs" / "fade_in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    prepare_stdlib(args.run_dir / "data")
    seeds = {seed: measure(args.run_dir / f"seed-{seed}", seed) for seed in args.seeds}
    print(table(seeds))


if __name__ == "__main__":
    main()
