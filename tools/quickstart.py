"""Train a small Default MoE on this machine from nothing: data, 2 ranks, report.

Prepares the corpus, runs the real entry under torchrun with `examples/quickstart.yaml`, and writes
metrics and plots. Started again it resumes from the last checkpoint; a finished run only gets its
report made anew. Flags after `--` go to the training, for example `-- --train-iters 800`.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_default_moe.data.corpus import prepare_stdlib
from megatron_default_moe.errors import UserError
from megatron_default_moe.report.report import latest_iteration, summary, write_report

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "quickstart.yaml"
RANKS = 2


def command(config: Path, run_dir: Path, extra: Sequence[str] = ()) -> list[str]:
    """The training command; the same for a new and for a resumed run."""
    data = run_dir / "data"
    return [
        *(str(_short(Path(sys.executable))), "-m", "torch.distributed.run"),
        *("--standalone", "--nproc-per-node", str(RANKS)),
        *("-m", "megatron_default_moe.pretrain", "--config", str(config)),
        *("--tokenizer-model", str(data / "tokenizer.model")),
        *("--train-data-path", str(data / "train"), "--valid-data-path", str(data / "valid")),
        *("--data-cache-path", str(data / "cache")),
        *("--save", str(run_dir / "checkpoint"), "--load", str(run_dir / "checkpoint")),
        *("--tensorboard-dir", str(run_dir / "tensorboard")),
        *extra,
    ]


def train(command: Sequence[str]) -> int:
    """Run the command with its output passed through, and return its exit code.

    Ctrl-C reaches torchrun too, which stops its ranks; here it only means: wait for that.
    """
    # The ranks share the cores: more threads than that only wait for each other.
    threads = str(max(1, (os.cpu_count() or 1) // RANKS))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(timeout=30)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "quickstart", help="default: %(default)s"
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: %(default)s")
    parser.add_argument("flags", nargs="*", help="after `--`: more flags for the training")
    args = parser.parse_args()
    try:
        return quickstart(args.config, args.run_dir.resolve(), args.flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def quickstart(config: Path, run_dir: Path, flags: Sequence[str]) -> int:
    """Prepare, train, report.

    Args:
        config: YAML file of flags; its `train-iters` says when the run is complete.
        run_dir: everything is written below it.
        flags: win over the file.

    Returns:
        The exit code of the training.
    """
    if not config.is_file():
        raise UserError(f"--config {config} is not a file")
    prepare_stdlib(run_dir / "data", say=lambda line: print(line, flush=True))

    goal = int(yaml.safe_load(config.read_text())["train-iters"])
    reached = latest_iteration(run_dir / "checkpoint")
    if reached is not None and reached >= goal and not flags:
        print(f"train: the checkpoint is at step {reached} of {goal}: nothing left to train")
        print(f"       (remove {_short(run_dir)} to start over)", flush=True)
    else:
        what = "starting" if reached is None else f"resuming at step {reached}"
        line = command(_short(config), _short(run_dir), flags)
        print(f"train: {what}, {RANKS} ranks\n  {shlex.join(line)}", flush=True)
        if code := train(line):
            print(f"train: ended with exit code {code}; run it again to resume", file=sys.stderr)
            return code

    write_report(run_dir)
    print(f"\n{summary(_short(run_dir))}")
    return 0


def _short(path: Path) -> Path:
    """The path as a person would type it, where it lies below the working folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
