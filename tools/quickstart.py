"""Train a small Default MoE on this machine from nothing: data, 2 ranks, report.

Prepares the corpus, runs the real entry under torchrun with `examples/quickstart.yaml`, and writes
metrics and plots. Started again it resumes from the last checkpoint; a finished run only gets its
report made anew. Flags after `--` go to the training: `-- --train-iters 800` trains on, from a
finished run too; `-- --moe-router-gradient topk` trains stock Megatron, in a folder of its own
(`runs/quickstart-topk`). A folder keeps to the flags that its run began with.
"""

import argparse
import json
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
RUNS = ROOT / "runs"
RANKS = 2
BEGUN_WITH = "flags.json"
"""The file in a run's folder that holds the flags that it was begun with."""


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
        "--run-dir",
        type=Path,
        help=f"default: {RUNS / 'quickstart'}, with -- --moe-router-gradient X quickstart-X",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: %(default)s")
    parser.add_argument("flags", nargs="*", help="after `--`: more flags for the training")
    args = parser.parse_args()
    try:
        run_dir = args.run_dir or RUNS / folder_name(args.config, args.flags)
        return quickstart(args.config, run_dir.resolve(), args.flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def value_of(name: str, config: Path, flags: Sequence[str]) -> str | None:
    """What the command line, else the file, gives for the flag ``--name``."""
    value = yaml.safe_load(config.read_text()).get(name)
    for place, flag in enumerate(flags):
        if flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
        elif flag == f"--{name}" and place + 1 < len(flags):
            value = flags[place + 1]
    return None if value is None else str(value)


def folder_name(config: Path, flags: Sequence[str]) -> str:
    """The folder of a run by its method, so that one never writes into another's."""
    method = value_of("moe-router-gradient", config, flags) if config.is_file() else None
    return "quickstart" if method in (None, "default") else f"quickstart-{method}"


def keep_to_its_flags(run_dir: Path, config: Path, flags: Sequence[str], begun: bool) -> None:
    """Refuse to go on with another run's flags in its folder; only its length may change.

    Args:
        run_dir: the folder.
        config: the file of flags.
        flags: the training's.
        begun: whether a checkpoint is in the folder.
    """
    own = [flag for flag in flags if not flag.startswith("--train-iters=")]
    while "--train-iters" in own:
        place = own.index("--train-iters")
        del own[place : place + 2]
    record = run_dir / BEGUN_WITH
    before = json.loads(record.read_text()) if record.is_file() else None
    now = {"config": str(config.resolve()), "flags": own}
    if begun and (before or {**now, "flags": []}) != now:
        line = shlex.join((before or {"flags": []})["flags"]) or "no flags after --"
        raise UserError(
            f"--run-dir {_short(run_dir)} holds a run that was begun with {line}"
            f"{' and another --config' if before and before['config'] != now['config'] else ''}:"
            " name another --run-dir for this one"
        )
    record.write_text(json.dumps(now, indent=1) + "\n")


def quickstart(config: Path, run_dir: Path, flags: Sequence[str]) -> int:
    """Prepare, train, report.

    Args:
        config: YAML file of flags; its `train-iters`, or the flags', say when the run is complete.
        run_dir: everything is written below it.
        flags: win over the file.

    Returns:
        The exit code of the training.
    """
    if not config.is_file():
        raise UserError(f"--config {config} is not a file")
    goal = value_of("train-iters", config, flags)
    if goal is None or not goal.isdecimal():
        raise UserError(f"--train-iters must be a number of steps, not {goal}")
    run_dir.mkdir(parents=True, exist_ok=True)
    reached = latest_iteration(run_dir / "checkpoint")
    keep_to_its_flags(run_dir, config, flags, begun=reached is not None)
    prepare_stdlib(run_dir / "data", say=lambda line: print(line, flush=True))
    if reached is not None and reached >= int(goal):
        print(f"train: the checkpoint is at step {reached} of {goal}: nothing left to train")
        print(f"       (remove {_short(run_dir)} to start over)", flush=True)
    else:
        what = "starting" if reached is None else f"resuming at step {reached}"
        # Another length is another schedule, which Megatron takes on resuming only when told to.
        longer = reached is not None and any(flag.startswith("--train-iters") for flag in flags)
        schedule = ["--override-opt_param-scheduler"] if longer else []
        line = command(_short(config), _short(run_dir), [*flags, *schedule])
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
