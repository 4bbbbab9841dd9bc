"""Run many command lines of the package, each in a process of its own that has nothing to import.

A server process imports torch and Megatron once and forks a child for every rank of every case; the
child runs ``default-moe`` as a user's process would, to the end of its interpreter. A case takes
what its work takes, instead of five seconds more.

    with forking.Server() as server:
        ends = server.run([forking.Case(["pretrain", "--help"], folder)])

A rank that fails ends the others, as under torchrun; a case that takes too long is killed, and so
is whatever it started.
"""

import atexit
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, Never

ROOT = pathlib.Path(__file__).parents[2]
GIB = 1 << 30

BROKEN_PIPE, FULL = "a pipe that nobody reads", "/dev/full"
"""Where the output of a case may go, beside into a file."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line."""

    argv: Sequence[str]
    """Behind ``default-moe``."""
    folder: str
    """An empty folder for this case alone: it runs there."""
    ranks: int = 1
    seconds: float = 60.0
    output: str = "a file"
    interrupt_at: str | None = None
    """Ctrl-C as soon as this was printed."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class End:
    """How it ended."""

    code: int | None
    """Exit code of the first rank that failed, else 0; None: it was still running."""
    out: str
    err: str
    seconds: float


class Server:
    """The server, from the side of a test."""

    def __enter__(self) -> "Server":
        """Start it."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(self, cases: Sequence[Case], at_once: int = 2) -> list[End]:
        """Run the cases, some at once, and return their ends in the same order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"cases": [dataclasses.asdict(case) for case in cases], "at_once": at_once}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server ended"
        return [End(**end) for end in json.loads(answer)]


# The server's side


class _Running:
    """A case whose ranks are processes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.begun = time.monotonic()
        self.interrupted = False
        self.failed: tuple[int, float] | None = None
        port = _free_port() if case.ranks > 1 else 0
        self.ranks = {_fork(case, rank, port): rank for rank in range(case.ranks)}
        self.alive = set(self.ranks)

    def look(self) -> bool:
        """Reap what has ended, end what has to; whether the case is over."""
        for pid in list(self.alive):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.alive.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                if code and self.failed is None:
                    self.failed = (code, time.monotonic())
        now = time.monotonic()
        late = now - self.begun > self.case.seconds
        if late and self.alive and self.failed is None:
            self.failed = (0, now)
        for pid in self.alive if self.failed else ():
            # As torchrun: all are asked, and killed where they do not end.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL if late else signal.SIGTERM)
        mark = None if self.interrupted else self.case.interrupt_at
        if mark is not None and mark in self._text("out") + self._text("err"):
            self.interrupted = True
            for pid in self.alive:
                os.kill(pid, signal.SIGINT)
        if self.alive:
            return False
        for pid in self.ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        return True

    def end(self) -> dict[str, Any]:
        """The end, as JSON takes it."""
        code = 0 if self.failed is None else self.failed[0] or None
        seconds = time.monotonic() - self.begun
        return {
            "code": code, "out": self._text("out"), "err": self._text("err"), "seconds": seconds
        }  # fmt: skip

    def _text(self, stream: str) -> str:
        folder = pathlib.Path(self.case.folder)
        files = [folder / f"{stream}.{rank}" for rank in range(self.case.ranks)]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _fork(case: Case, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    # From here on this is a user's process: what is raised ends it, in Python's own way.
    os.setsid()
    os.chdir(case.folder)
    resource.setrlimit(resource.RLIMIT_DATA, (12 * GIB, 12 * GIB))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(case.environment)
    if case.ranks > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": case.ranks}
        numbers = {**where, "LOCAL_WORLD_SIZE": case.ranks, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in numbers.items()})
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(_output(case, rank), 1)
    os.dup2(_new_file(f"err.{rank}"), 2)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = ["default-moe", *case.argv]
    raise _Child(case.argv)


def _new_file(name: str) -> int:
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)


def _output(case: Case, rank: int) -> int:
    if case.output == BROKEN_PIPE:
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return os.open(FULL, os.O_WRONLY) if case.output == FULL else _new_file(f"out.{rank}")


class _Child(BaseException):
    """Unwinds a forked child's stack, down to the beginning of its program."""


def _schedule(cases: Sequence[Case], at_once: int) -> Iterator[tuple[int, dict[str, Any]]]:
    waiting = list(enumerate(cases))
    running: dict[int, _Running] = {}
    while waiting or running:
        while waiting and sum(one.case.ranks for one in running.values()) < at_once:
            number, case = waiting.pop(0)
            running[number] = _Running(case)
        for number, one in list(running.items()):
            if one.look():
                yield number, running.pop(number).end()
        time.sleep(0.02)


def _serve() -> None:
    from megatron_default_moe.cpu import runtime
    from megatron_default_moe.loop import command_line

    command_line.quiet_expected_warnings()
    runtime.install()
    _import_everything()
    # What is shared with the children stays shared.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        cases = [Case(**case) for case in request["cases"]]
        ends = dict(_schedule(cases, request["at_once"]))
        print(json.dumps([ends[number] for number in range(len(cases))]), flush=True)
    os._exit(0)  # At once: there is nothing to take apart.


def _import_everything() -> None:
    import importlib

    from megatron_default_moe.commands.table import COMMANDS

    for name in ("tensorboard.backend.event_processing.event_accumulator", "matplotlib.pyplot"):
        importlib.import_module(name)
    for module in ("loop.entry", "data.gpt_data", "report.report", "plan.planner", "plan.page"):
        importlib.import_module(f"megatron_default_moe.{module}")
    for command in COMMANDS:
        importlib.import_module(command.module)
    importlib.import_module("megatron.training.training")
    importlib.import_module("torch.utils.tensorboard")


def _end_as_python_does(code: int) -> Never:
    """End without taking apart what was imported, which takes longer than most cases."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        os.write(2, f"Exception ignored in: {error!r}\n".encode())
        code = 120
    os._exit(code)


if __name__ == "__main__":
    try:
        _serve()
    except _Child as child:
        words = list(child.args[0])
    from megatron_default_moe.commands.line import main

    try:
        code: Any = main(words)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    _end_as_python_does(code or 0)
