"""Contract: what a rank started through ``multiprocessing`` ends with it, also after kill -9.

However it was started (fork, spawn, forkserver; from the main thread or another) and whoever
started it (the rank or such a child), and with it Python's resource tracker and fork server; but
not before, when only the thread that started it has ended.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import starting_children

SCRIPT = pathlib.Path(starting_children.__file__)
ROOT = pathlib.Path(__file__).parents[2]


def alive(session: int) -> dict[int, str]:
    """The processes of a session that have not ended, with their command lines."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes()  # empty for one that has ended
                if os.getsid(int(folder.name)) == session and line:
                    found[int(folder.name)] = line.replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process with children of every kind, in a session of its own."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *getattr(request, "param", [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    for pid in alive(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def kill_and_wait(rank: subprocess.Popen[str], seconds: float) -> dict[int, str]:
    """Kill it; what is left once nothing is, or after so many seconds."""
    rank.kill()
    rank.wait()
    limit = time.monotonic() + seconds
    while (left := alive(rank.pid)) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


def test_children_live_as_long_as_their_rank_and_no_longer(rank: subprocess.Popen[str]) -> None:
    assert rank.stdin is not None
    assert rank.stdout is not None
    pids = json.loads(rank.stdout.readline())
    assert set(pids) == {*starting_children.WAYS, "a manager"}
    # Beside the rank, its six children with one child each and the manager: Python's helpers.
    assert len(alive(rank.pid)) > 1 + 6 * 2 + 1
    time.sleep(0.5)  # The threads that started children have ended before.
    rank.stdin.write("\n")
    rank.stdin.flush()
    assert json.loads(rank.stdout.readline()) == list(starting_children.WAYS)
    assert kill_and_wait(rank, 10) == {}


@pytest.mark.parametrize("rank", [["uncovered"]], indirect=True)
def test_the_children_would_stay(rank: subprocess.Popen[str]) -> None:
    """What is checked above does not come by itself."""
    assert rank.stdout is not None
    pids = json.loads(rank.stdout.readline())
    left = kill_and_wait(rank, 1)
    assert {pid for way in pids.values() for pid in way} <= set(left)
