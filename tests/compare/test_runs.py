"""A whole study through the training entry: paired, killed and gone on with, failing in part.

Contract: runs of a seed begin with the same weights and batches; a finished run is never repeated,
a killed one goes on or starts anew; a failed one is named and the rest goes on.
"""

import csv
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import studies

from megatron_default_moe.compare import results, runs, study
from megatron_default_moe.compare.command import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.launch
ARMS = {"topk": "moe-router-gradient: topk", "dense": "moe-router-gradient: dense"}


def table_of(out: pathlib.Path) -> dict[str, dict[str, str]]:
    with (out / "table.csv").open(newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def started(out: pathlib.Path) -> dict[str, int]:
    """How often each run's training began, by its log."""
    logs = sorted(out.glob("runs/*/*/log.txt"))
    return {
        f"{log.parent.parent.name} {log.parent.name}": log.read_text().count("router gradient: ")
        for log in logs
    }


def killed_half_way(file: pathlib.Path, out: pathlib.Path) -> None:
    """Start the study in a process of its own; kill -9 it in the first steps of its second run."""
    command = [sys.executable, "-m", "megatron_default_moe", "compare", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--out", str(out)], env=environment)
    try:
        deadline = time.monotonic() + 120
        log = out / "runs/dense/seed-1/log.txt"
        while not (log.is_file() and re.search(r"iteration +1/", log.read_text())):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study of two arms and two seeds, killed in its second run, and gone on with."""
    folder = tmp_path_factory.mktemp("study")
    file, out = folder / "study.yaml", folder / "out"
    studies.write(file, ARMS)
    killed_half_way(file, out)
    before = (out / "runs/topk/seed-1/done.json").stat().st_mtime_ns
    code = main([str(file), "--out", str(out), "--parallel", "2"])
    after = (out / "runs/topk/seed-1/done.json").stat().st_mtime_ns
    return file, out, code, before == after


def test_a_killed_study_goes_on_and_repeats_nothing(compared: Any) -> None:
    _, out, code, untouched = compared
    assert (code, untouched) == (0, True)
    assert started(out) == {
        **{"dense seed-1": 2, "dense seed-2": 1},
        **{"topk seed-1": 1, "topk seed-2": 1},
    }
    # The run that was killed ended with its study, and began anew: each step is logged once.
    events = out / "runs/dense/seed-1/tensorboard"
    assert len(list(events.glob("events.*"))) == 1


def test_a_finished_study_is_not_trained_again(
    compared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, *_ = compared
    before = started(out)
    assert main([str(file), "--out", str(out)]) == 0
    assert started(out) == before
    assert "4 runs, 4 of them finished before" in capsys.readouterr().out


def test_arms_of_a_seed_begin_alike_and_seeds_do_not(compared: Any) -> None:
    file, out, *_ = compared
    found = {
        (run.arm, run.seed): run.result().scalars.series["lm loss"]
        for run in runs.runs_of(study.read(file), out)
    }
    for seed in (1, 2):
        assert found["topk", seed][1] == found["dense", seed][1]
        assert found["topk", seed][6] != found["dense", seed][6]
    assert found["topk", 1][1] != found["topk", 2][1]


def test_the_table_is_what_the_runs_measured(compared: Any) -> None:
    file, out, *_ = compared
    losses = {}
    for run in runs.runs_of(study.read(file), out):
        said = re.findall(
            r"validation loss at iteration 6[^|o]*\| lm loss value: ([\d.E+-]+)",
            (run.folder / "log.txt").read_text(),
        )
        losses[run.arm, run.seed] = float(said[0])
    table = table_of(out)
    apart = [losses["dense", seed] - losses["topk", seed] for seed in (1, 2)]
    mean, half = sum(apart) / 2, abs(apart[0] - apart[1]) / 2
    dense = table["dense"]
    assert float(dense["difference_mean"]) == pytest.approx(mean, abs=2e-6)
    # Of two seeds the standard error is half of their distance; t of one degree is 12.706.
    assert float(dense["difference_low_95"]) == pytest.approx(mean - 12.7062 * half, abs=3e-5)
    assert float(dense["final_loss_seed_2"]) == pytest.approx(losses["dense", 2], abs=2e-6)
    assert float(dense["step_time_ratio"]) > 0
    assert (table["topk"]["difference_mean"], table["topk"]["tokens_ratio"]) == ("", "1")
    with (out / "metrics.csv").open(newline="") as metrics:
        rows = [row for row in csv.DictReader(metrics) if row["lm loss"]]
    assert len(rows) == 4 * 6
    assert {int(row["tokens"]) for row in rows} == {step * 4 * 32 for step in range(1, 7)}


def test_a_failed_run_is_named_and_the_rest_goes_on(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    broken = f"{ARMS['dense']}, moe-pad-expert-input-to-capacity: true"
    studies.write(file, {"broken": broken, "topk": ARMS["topk"]}, seeds="[3]")
    assert main([str(file), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert re.search(r"FAILED: broken seed 3: exit code 2: .*capacity", printed.err)
    assert "topk seed 3: done in" in printed.out
    table = table_of(out)
    assert (table["broken"]["finished_seeds"], table["topk"]["finished_seeds"]) == ("0", "1")
    # The trained arm keeps to its flags; the failed one may be mended.
    studies.write(
        file, {"broken": ARMS["dense"], "topk": "moe-router-gradient: topk, lr: 2"}, "[3]"
    )
    assert main([str(file), "--out", str(out), "--report"]) == 2
    assert re.search(r"topk/seed-3 was trained with another lr: name", capsys.readouterr().err)
    studies.write(file, {"broken": ARMS["dense"], "topk": ARMS["topk"]}, seeds="[3]")
    assert len(runs.runs_of(study.read(file), out)) == 2


def test_a_run_that_another_process_is_at_is_left_alone(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    file = tmp_path / "study.yaml"
    studies.write(file, ARMS, seeds="[1]")
    planned = runs.runs_of(study.read(file), tmp_path)[:1]
    planned[0].folder.mkdir(parents=True)
    with (planned[0].folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = runs.run_all(planned, 1, print)
    assert failed == {"topk seed 1": "another process is at it"}
    assert not (planned[0].folder / "config.yaml").exists()


def test_a_run_that_ends_early_is_not_finished(compared: Any) -> None:
    file, out, *_ = compared
    run = runs.runs_of(study.read(file), out)[0]
    with pytest.raises(results.UserError, match=r"after step 7: it ended at step 6 of 7"):
        results.read(run.arm, run.seed, run.folder / "tensorboard", 7)
