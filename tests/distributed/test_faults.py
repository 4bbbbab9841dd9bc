"""What a run survives: killed ranks, interrupted and failing saves, numbers that are not finite.

Contract: after kill -9 of any rank at any moment, the restarted run repeats and continues the
uninterrupted one to the last bit, losses and vectors, and no process of a killed rank stays; the
checkpoint that is named the latest is whole at every moment; NaN and Inf never reach the vectors; a
step that is run again counts once; a full disk ends the run and leaves the old checkpoint. ``make
test`` kills twice, ``-m full`` twenty times; docs/results/faults.md has the numbers.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from launching import HERE, ROOT, TINY, record, steps_of, torchrun

from megatron_default_moe.checkpoint import on_disk

pytestmark = [pytest.mark.launch, pytest.mark.timeout(3600)]

EP2 = [*TINY, "--expert-model-parallel-size", "2"]
MANY = [*EP2, "--train-iters", "120"]
SAVING = ["--save-interval", "3", "--moe-router-topk", "2"]
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()


def command(folder: pathlib.Path, restarts: int, extra: list[str]) -> list[str]:
    if "--alone" in extra:  # No torchrun, which ends the children of the ranks that it started.
        extra = [flag for flag in extra if flag != "--alone"]
        flags = [*MANY, *SAVING, *extra, "--expert-model-parallel-size", "1"]
        return [sys.executable, str(HERE / "recorded_pretrain.py"), *flags, "--save", str(folder)]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", str(restarts), str(HERE / "recorded_pretrain.py")),
        *(*MANY, *SAVING, *extra, "--save", str(folder), "--load", str(folder)),
    ]


def start(folder: pathlib.Path, restarts: int = 0, extra: list[str] | None = None) -> Any:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "RECORD": str(folder) + ".steps"}
    with open(f"{folder}.log", "w") as log:
        return subprocess.Popen(
            command(folder, restarts, extra or []),
            env={**os.environ, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def lines_of(folder: pathlib.Path, rank: int) -> list[list[str]]:
    file = pathlib.Path(f"{folder}.steps.{rank}")
    if not file.exists():
        return []
    # A killed process may leave part of a line.
    return [line.split(" ") for line in file.read_text().splitlines() if line.count(" ") == 2]


def workers_of(launcher: Any) -> list[int]:
    """Process numbers of the two ranks."""
    path = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    children = [int(word) for word in path.read_text().split()]
    return [pid for pid in children if b"recorded_pretrain" in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def left_of(folder: pathlib.Path) -> list[str]:
    """Command lines of the processes of a run, whoever their parent is now."""
    mark, found = f"RECORD={folder}.steps".encode(), []
    for process in pathlib.Path("/proc").iterdir():
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(_command_line(int(process.name)).decode())
        except (OSError, ValueError):
            continue
    return [line for line in found if line]


def nothing_stays_of(folder: pathlib.Path) -> bool:
    """Whether all processes of a run that is over end within ten seconds."""
    limit = time.monotonic() + 10
    while left_of(folder) and time.monotonic() < limit:
        time.sleep(0.1)
    return not left_of(folder)


def latest_is_whole(folder: pathlib.Path) -> bool:
    """Whether the checkpoint that a restart would load is complete (or there is none yet)."""
    latest = on_disk.folder_of(folder)
    return latest is None or on_disk.damage(latest) is None


class Killer:
    """Kills a random rank of a run again and again, at a random step or while it saves."""

    def __init__(self, launcher: Any, folder: pathlib.Path, seed: int) -> None:
        self.launcher, self.folder = launcher, folder
        self.random = random.Random(seed)

    def kill(self, while_saving: bool) -> None:
        seen = len(lines_of(self.folder, 0))
        more = self.random.randint(2, 9)
        self._wait(lambda: len(lines_of(self.folder, 0)) >= seen + more)
        if while_saving:
            before = set(self.folder.glob("iter_*"))
            self._wait(lambda: set(self.folder.glob("iter_*")) != before)
            time.sleep(self.random.uniform(0, 0.08))
        victim = self.random.choice(workers_of(self.launcher))
        os.kill(victim, signal.SIGKILL)
        self._wait(lambda: not _command_line(victim))
        assert latest_is_whole(self.folder)

    def _wait(self, happened: Any) -> None:
        limit = time.monotonic() + 120
        while not happened():
            assert self.launcher.poll() is None, "the run ended early"
            assert time.monotonic() < limit, "the run does not go on"
            time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Loss and vectors of every step of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    launcher = start(folder)
    assert launcher.wait(timeout=600) == 0, pathlib.Path(f"{folder}.log").read_text()[-3000:]
    steps = {line[0]: line[1:] for line in lines_of(folder, 0)}
    assert len(steps) == 120
    return steps


@pytest.mark.parametrize(
    ("kills", "extra"),
    [
        pytest.param(2, [], id="2"),
        pytest.param(20, [], id="20", marks=pytest.mark.full),
        pytest.param(
            *(6, ASYNC),
            id="6-async",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_killed_run_goes_on_to_the_bit(
    whole: dict[str, list[str]], tmp_path: pathlib.Path, kills: int, extra: list[str]
) -> None:
    folder = tmp_path / "run"
    launcher = start(folder, restarts=kills + 1, extra=extra)
    killer = Killer(launcher, folder, seed=kills)
    try:
        for number in range(kills):
            killer.kill(while_saving=number % 2 == 1)
        assert launcher.wait(timeout=600) == 0, pathlib.Path(f"{folder}.log").read_text()[-3000:]
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert nothing_stays_of(folder)
    for rank in (0, 1):
        lines = lines_of(folder, rank)
        assert {line[0] for line in lines} == set(whole)
        for step, *values in lines:
            assert values == whole[step], f"rank {rank}, step {step}"
    repeated = len(lines_of(folder, 0)) - len(whole)
    print(f"{kills} kills, {repeated} steps run again, all {len(whole)} steps equal to the bit")
    assert pathlib.Path(f"{folder}.log").read_text().count("no CUDA device") == kills + 1


def test_what_a_killed_process_started_ends_with_it(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    launcher = start(folder, extra=["--alone", *ASYNC])
    try:
        limit = time.monotonic() + 120
        while not (folder / on_disk.TRACKER).exists():
            assert launcher.poll() is None, pathlib.Path(f"{folder}.log").read_text()[-3000:]
            assert time.monotonic() < limit
            time.sleep(0.05)
        # The writer, the manager of its results and the tracker of what they share.
        assert len(left_of(folder)) >= 4
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        assert nothing_stays_of(folder), left_of(folder)
    finally:
        os.killpg(launcher.pid, signal.SIGKILL) if left_of(folder) else None


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs with numbers that are not finite, or with steps run twice, in one launch."""
    out = tmp_path_factory.mktemp("poisoned")
    careless = [*EP2, "--no-check-for-nan-in-loss-and-grad", "--rerun-mode", "disabled"]
    backward_only = [*careless, "--no-default-vector-in-forward"]
    fp16 = [*EP2, "--fp16", "--initial-loss-scale", "256", "--loss-scale-window", "1000"]
    cases: dict[str, dict[str, Any]] = {
        "plain": {"argv": EP2},
        "rerun": {"argv": EP2, "rerun": True},
        "plain-fp16": {"argv": fp16},
        "fp16-gradient": {"argv": fp16, "poison": ["gradient", 3, "inf"]},
    }
    for value in ("nan", "inf"):
        cases[f"expert-{value}"] = {"argv": backward_only, "poison": ["expert", 3, value]}
        cases[f"gradient-{value}"] = {"argv": careless, "poison": ["gradient", 3, value]}
    return record(out, 2, cases)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_experts_bad_output_never_reaches_the_vectors(
    poisoned: dict[str, Any], value: str
) -> None:
    """Expert 0 of the first rank puts out one bad row in layer 1 at step 3."""
    steps = steps_of(poisoned[f"expert-{value}"])
    before, at = steps[1]["layers"][1], steps[2]["layers"][1]
    assert torch.equal(at["vectors"][0], before["vectors"][0])
    assert at["updates"][0] == before["updates"][0]
    assert (at["updates"][1:] == before["updates"][1:] + 1).all(), "only that expert is left out"
    assert at["rejected"] == before["rejected"] + 1
    assert len(steps) == 8
    for step in steps:
        for layer in step["layers"].values():
            assert layer["vectors"].isfinite().all()
    # The weights are lost: from then on every update is rejected.
    assert steps[-1]["layers"][1]["rejected"] > at["rejected"]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_bad_gradients_never_reach_the_vectors(poisoned: dict[str, Any], value: str) -> None:
    """Nothing stops this run (the check is off): the weights are lost, the vectors are not."""
    steps = steps_of(poisoned[f"gradient-{value}"])
    assert not all(layer["router_grad"].isfinite().all() for layer in steps[2]["layers"].values())
    assert all(layer["vectors"].isfinite().all() for s in steps for layer in s["layers"].values())


def test_a_step_that_the_scaler_skips_leaves_no_trace(poisoned: dict[str, Any]) -> None:
    plain, steps = steps_of(poisoned["plain-fp16"]), steps_of(poisoned["fp16-gradient"])
    assert [step["skipped"] for step in steps] == [False, False, True, *[False] * 5]
    assert not any(step["skipped"] for step in plain)
    for number, layer in steps[2]["layers"].items():
        assert torch.equal(layer["vectors"], steps[1]["layers"][number]["vectors"])
        assert torch.equal(layer["updates"], steps[1]["layers"][number]["updates"])


def test_a_step_that_is_run_again_counts_once(poisoned: dict[str, Any]) -> None:
    plain, again = steps_of(poisoned["plain"]), steps_of(poisoned["rerun"])
    assert len(again) == len(plain) == 8
    assert [step["runs"] for step in again] == [2] * 8
    assert [step["runs"] for step in plain] == [1] * 8
    for one, other in zip(again, plain, strict=True):
        assert one["loss"] == other["loss"]
        for number, layer in one["layers"].items():
            for part in ("vectors", "updates", "router_grad"):
                assert torch.equal(layer[part], other["layers"][number][part])


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Any:
    """A file system that holds two checkpoints of the tiny model, and not three."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "none", str(disk)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("no permission to mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_the_old_checkpoint(small_disk: pathlib.Path) -> None:
    flags = [*EP2, "--save", str(small_disk), "--save-interval", "2"]
    done = torchrun(2, ["-m", "megatron_default_moe.pretrain", *flags], timeout=300)
    assert done.returncode != 0
    assert " GB free in --save " in done.stdout
    step = int((small_disk / on_disk.TRACKER).read_text())
    assert on_disk.damage(small_disk / f"iter_{step:07d}") is None
    assert sorted(small_disk.glob("iter_*"))[-1].name != f"iter_{step:07d}", "nothing failed"
    for folder in small_disk.glob("iter_*"):  # the user makes room, and goes on
        if folder.name != f"iter_{step:07d}":
            shutil.rmtree(folder)
    resume = [*EP2, "--load", str(small_disk)]
    done = torchrun(2, ["-m", "megatron_default_moe.pretrain", *resume], timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"iteration        {step + 1}/       8" in done.stdout
