"""The runs of a study: each a folder, a command, a lock while it runs, and a mark once it is done.

A finished run is never repeated. One that was killed goes on from its checkpoint if its flags have
a ``save-interval``, and starts anew otherwise. Two commands over one study share the work.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_default_moe.compare import results
from megatron_default_moe.compare.study import OF_CORPUS, Study
from megatron_default_moe.errors import UserError
from megatron_default_moe.machine.ranks import NUMBERS, PLACE
from megatron_default_moe.options.flags import Truth, text_of
from megatron_default_moe.report.report import latest_iteration

SAY_EVERY = 30.0
"""Seconds between two lines about runs under way."""
PATIENCE = 30.0
"""Seconds that a run has to end by itself when it is told to."""
_STEP = re.compile(rb"iteration\s+(\d+)/\s*\d+ \|")
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: pathlib.Path
    config: str
    """The text of its file of flags: what makes it this run and no other."""
    command: tuple[str, ...]
    steps: int
    ranks: int

    def __str__(self) -> str:
        """Return its name."""
        return f"{self.arm} seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return (self.folder / "done.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether training it anew would lose something."""
        return self.done or latest_iteration(self.folder / "checkpoint") is not None

    def result(self) -> results.Result:
        """What it measured.

        Raises:
            UserError: it did not come to its end.
        """
        return results.read(self.arm, self.seed, self.folder / "tensorboard", self.steps)


def runs_of(study: Study, out: pathlib.Path) -> list[Run]:
    """Every run of a study, all arms of a seed before the next seed.

    Raises:
        UserError: a folder holds what was trained with other flags.
    """
    runs = [_run(study, out, arm, seed) for arm, seed in study.pairs]
    for run in runs:
        file = run.folder / "config.yaml"
        before = file.read_text() if file.is_file() else run.config
        if run.begun and before != run.config:
            changed = set(before.splitlines()) ^ set(run.config.splitlines())
            names = sorted({line.split(":")[0] for line in changed})
            raise UserError(
                f"{run.folder} was trained with another {', '.join(names[:5])}: name another --out"
                " for the changed study, or remove that folder to train it again"
            )
    return runs


def _run(study: Study, out: pathlib.Path, arm: str, seed: int) -> Run:
    folder = out / "runs" / arm / f"seed-{seed}"
    lines = study.arms[arm]
    start = [sys.executable, "-m"]
    if study.ranks > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(study.ranks)]
        start += [*launcher, "-m"]
    words = ["--config", str(folder / "config.yaml"), "--tensorboard-dir"]
    words += [str(folder / "tensorboard")]
    if "save-interval" in lines:
        words += ["--save", str(folder / "checkpoint"), "--load", str(folder / "checkpoint")]
    if "data-cache-path" not in lines and "mock-data" not in lines:
        # Runs side by side would write the same files.
        words += ["--data-cache-path", str(folder / "cache")]
    if study.corpus:
        for flag, name in zip(OF_CORPUS, ("tokenizer.model", "train", "valid"), strict=True):
            words += [f"--{flag}", str(out / "data" / name)]
    return Run(
        arm=arm,
        seed=seed,
        folder=folder,
        config=text_of({"log-timers-to-tensorboard": Truth(True, "true"), **lines, "seed": seed}),
        command=(*start, "megatron_default_moe", "pretrain", *words),
        steps=study.steps,
        ranks=study.ranks,
    )


@dataclasses.dataclass
class _Active:
    run: Run
    process: subprocess.Popen[bytes]
    started: float
    log_start: int
    """Size of the log when this attempt began."""
    first: int
    """The step that it goes on from."""

    def step(self) -> int:
        """The last step in the log."""
        found = _STEP.findall(_log(self.run, self.log_start)[-20000:])
        return int(found[-1]) if found else self.first


def _log(run: Run, start: int) -> bytes:
    with (run.folder / "log.txt").open("rb") as file:
        file.seek(start)
        return file.read()


def run_all(runs: Sequence[Run], parallel: int, say: Callable[[str], None]) -> dict[str, str]:
    """Run what is not done, `parallel` at a time.

    Args:
        runs: all runs of the study.
        parallel: how many at a time.
        say: takes one line of progress.

    Returns:
        By the run's name, why it failed; the others went on meanwhile.
    """
    waiting = [run for run in runs if not run.done]
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before")
    active: list[_Active] = []
    failed: dict[str, str] = {}
    give_up: dict[Run, float] = {}
    pace = _Pace(len(runs), len(waiting))
    threads = max(1, (os.cpu_count() or 1) // (parallel * runs[0].ranks))
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or active:
            for run in list(waiting):
                if len(active) == parallel:
                    break
                if (started := _start(run, threads)) is not None:
                    active.append(started)
                    where = f" from step {started.first}" if started.first else ""
                    say(f"{run}: started{where}, log in {run.folder / 'log.txt'}")
                elif run.done:
                    pace.finished += 1
                    say(f"{run}: done before")
                elif active or time.monotonic() < give_up.setdefault(
                    run, time.monotonic() + PATIENCE
                ):
                    # Who holds it may be about to end: its study was killed a moment ago.
                    continue
                else:
                    failed[str(run)] = "another process is at it"
                    say(f"{run}: another process is at it")
                waiting.remove(run)
            for one in [one for one in active if one.process.poll() is not None]:
                active.remove(one)
                said = _end(one, failed)
                pace.ended(one, str(one.run) in failed)
                say(f"{one.run}: {said}; {pace.line(active, len(waiting))}")
            if active and pace.is_time():
                say(pace.line(active, len(waiting)))
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(active)
    return failed


def _start(run: Run, threads: int) -> _Active | None:
    """Start a run, or None where another process is at it or has finished it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = (run.folder / "lock").open("w")
    with lock, (run.folder / "log.txt").open("ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if run.done:
            return None
        first = latest_iteration(run.folder / "checkpoint") or 0
        if first >= run.steps and _has_ended(run):
            return None
        if not first:
            shutil.rmtree(run.folder / "tensorboard", ignore_errors=True)
        (run.folder / "config.yaml").write_text(run.config)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
        for name in (*NUMBERS, *PLACE):
            environment.pop(name, None)
        process = subprocess.Popen(
            run.command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # Ctrl-C reaches this process alone, which stops the runs.
            start_new_session=True,
            # The lock is the run's as well: it is held for as long as either is there.
            pass_fds=(lock.fileno(),),
            preexec_fn=_end_with_its_parent,
        )
        return _Active(run, process, time.monotonic(), log.tell(), first)


def _end_with_its_parent() -> None:
    """In the child: a run must not outlive, unseen, who would write down that it is done."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(one: _Active, failed: dict[str, str]) -> str:
    """Write down that a run is done, or why it failed; say which."""
    seconds = time.monotonic() - one.started
    reason, loss = "", 0.0
    if one.process.returncode:
        reason = f"exit code {one.process.returncode}: {_last_words(_log(one.run, one.log_start))}"
    else:
        try:
            loss = one.run.result().final
        except UserError as error:
            reason = str(error)
    if reason:
        failed[str(one.run)] = reason
        return f"FAILED ({reason})"
    _mark_done(one.run, loss)
    return f"done in {_time(seconds)}, validation loss {loss:.4f}"


def _has_ended(run: Run) -> bool:
    """Whether a run was stopped after its last evaluation; it is done then, and written down.

    Started again at its last step, it would be evaluated once more, on other batches.
    """
    try:
        _mark_done(run, run.result().final)
    except UserError:
        return False
    return True


def _mark_done(run: Run, loss: float) -> None:
    mark = run.folder / "done.json"
    part = mark.with_suffix(".part")
    part.write_text(json.dumps({"final validation loss": loss}) + "\n")
    part.replace(mark)


def _last_words(log: bytes) -> str:
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing was logged"])[-1].removeprefix("error: ")


def _stop(active: Sequence[_Active]) -> None:
    for one in active:
        _signal(one, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for one in active:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(one, signal.SIGKILL)
            one.process.wait()


def _signal(one: _Active, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, number)


class _Pace:
    """How far the study is and how long it will take, at the pace of this command so far."""

    def __init__(self, runs: int, waiting: int) -> None:
        self.runs, self.finished = runs, runs - waiting
        self.began = self.said = time.monotonic()
        self.work = 0.0

    def ended(self, one: _Active, failed: bool) -> None:
        """Count a run that ended."""
        self.finished += not failed
        self.work += self._worked(one) if failed else 1 - one.first / one.run.steps

    def is_time(self) -> bool:
        """Whether nothing was said for a while."""
        return time.monotonic() - self.said >= SAY_EVERY

    def line(self, active: Sequence[_Active], waiting: int) -> str:
        """One line: what is finished, what is under way, and the time left."""
        self.said = time.monotonic()
        under_way = sum(self._worked(one) for one in active)
        left = waiting + sum(1 - one.step() / one.run.steps for one in active)
        at = ", ".join(f"{one.run} at step {one.step()} of {one.run.steps}" for one in active)
        work = self.work + under_way
        eta = _time(left * (self.said - self.began) / work) if work else "unknown"
        return f"{self.finished} of {self.runs} finished{at and ', '}{at}; ETA {eta}"

    @staticmethod
    def _worked(one: _Active) -> float:
        return (one.step() - one.first) / one.run.steps


def _time(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=round(seconds))


def prepare(study: Study, out: pathlib.Path, say: Callable[..., Any]) -> None:
    """Make the data that the runs share."""
    if study.corpus:
        from megatron_default_moe.data.corpus import prepare_stdlib

        prepare_stdlib(out / "data", say=say)
