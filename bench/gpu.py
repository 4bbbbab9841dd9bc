"""Everything that needs a GPU, in one command: tests, kernels, whole steps; ``make gpu``.

    python bench/gpu.py [--minutes 9] [--out DIR]

Needs no environment of its own: the torch, Megatron-Core, Transformer Engine and pytest of the
Python that runs it. Every program is bounded in time and in a process group of its own; what one
does not use, the next may; one that fails or is ended costs the others nothing. The tests only
prove, so they run beside each other; the benches run alone. Writes gpu.md, gpu_kernels.md and
gpu_step.md to docs/results or to DIR, each as soon as it has something to say.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import gpu_page
import pairs
import step

ROOT = pairs.ROOT
NEEDS_DEVICE = "bench/gpu.py needs a CUDA device, and there is none"
NEEDS_PACKAGE = (
    "bench/gpu.py runs with the packages of its own Python, and this one has no {}: name another,"
    " make gpu PYTHON=..."
)
SHARES = (0.43, 0.65, 0.98)
"""When the tests, the kernels and the steps must have ended, of the whole time."""
GRACE = 30.0
"""Seconds for what was begun before the end: the slowest test, writing a page."""


WELL = "ended well"
MARKERS = {
    gpu_page.LAYER: "gpu",
    gpu_page.TRAINING: "gpu",
    gpu_page.ESTIMATORS: "gpu",
    gpu_page.KERNELS: "",
}
"""Files of tests, and the marker of those to run."""


class Part(NamedTuple):
    """A program."""

    name: str
    command: Sequence[str]
    """After the name of the Python."""
    end: float
    """It is ended then (``time.monotonic``)."""


def parts_of_tests(
    records: pathlib.Path, end: float, markers: Mapping[str, str] = MARKERS
) -> list[Part]:
    """The tests, a process for each of their files; each records to a file of its name."""
    # Without the options of pyproject.toml, so that pytest needs no plugins.
    common = "-m pytest -o addopts= -q -rfE -p no:cacheprovider -p recording --tb short".split()
    until = str(max(end - GRACE, 0.0))
    return [
        Part(
            path,
            [
                *(*common, path, "-m", marker, "--until", until),
                *("--record", str(records / f"{pathlib.Path(path).stem}.jsonl")),
            ],
            end,
        )
        for path, marker in markers.items()
    ]


def run_together(parts: Sequence[Part], logs: pathlib.Path) -> list[str]:
    """Run programs beside each other; how each of them ended, in one line."""
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda part: _run(part, logs), parts))


def _run(part: Part, logs: pathlib.Path) -> str:
    paths = [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    begun, log = time.monotonic(), logs / f"{pathlib.Path(part.name).stem}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(part.end - begun, 0.0))
    code = process.poll()
    # Also what a program that has ended may have left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    after = f"after {time.monotonic() - begun:.0f} s"
    if code == 0:
        return f"{part.name}: {WELL} {after}"
    tail = log.read_text(errors="replace")[-3000:]
    print(f"--- the end of {log.name}\n{tail}", flush=True)
    if code is None:
        return f"{part.name}: stopped for want of time {after}"
    return f"{part.name}: {pairs.anonymous(step.reason(code, tail))} {after}"


def read(records: pathlib.Path) -> list[gpu_page.Result]:
    """What the tests recorded, complete lines only."""
    results = []
    for path in sorted(records.glob("*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                result = json.loads(line)
                results.append({**result, "reason": pairs.anonymous(result["reason"])})
    return results


def measured(minutes: float) -> str:
    """Hardware, versions and command, for the page."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    at = f", commit {commit.stdout.strip()}" if commit.returncode == 0 else ""
    return f"`make gpu MINUTES={minutes:g}`{at}. {pairs.versions()}"


def run_all(minutes: float, out: pathlib.Path) -> bool:
    """Run all parts and write all pages; whether every program ended well."""
    begun = time.monotonic()
    tests_end, kernels_end, steps_end = (begun + 60 * minutes * share for share in SHARES)
    logs = (ROOT / "runs" if out == pairs.RESULTS else out) / "gpu-logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.jsonl"):
        old.unlink()

    ended: list[str] = []
    about = measured(minutes)
    for parts in (
        lambda: parts_of_tests(logs, tests_end),
        lambda: [bench("bench/kernels.py", out, kernels_end)],
        lambda: [bench("bench/step.py", out, steps_end)],
    ):
        ended += run_together(parts(), logs)
        pairs.write(out / gpu_page.PAGE, gpu_page.lines(read(logs), about, ended))
        print("\n".join(ended), flush=True)
    return all(WELL in line for line in ended)


def bench(path: str, out: pathlib.Path, end: float) -> Part:
    """A bench, which is told to have finished a little before its end."""
    seconds = max(end - time.monotonic() - GRACE / 2, 1.0)
    return Part(path, [path, "--out", str(out), "--seconds", f"{seconds:.0f}"], end)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="all of it takes no longer (9; with 40, tests and benches take all they want)",
    )
    pairs.add_out(parser)
    given = parser.parse_args()
    for package in ("torch", "megatron"):
        if importlib.util.find_spec(package) is None:
            print(NEEDS_PACKAGE.format(package), file=sys.stderr)
            sys.exit(2)
    import torch

    if not torch.cuda.is_available():
        print(NEEDS_DEVICE, file=sys.stderr)
        sys.exit(2)
    sys.exit(not run_all(given.minutes, given.out))


if __name__ == "__main__":
    main()
