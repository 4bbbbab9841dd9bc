"""A whole study through the training entry: paired, killed and gone on with, failing in part.

Contract: runs of a seed begin with the same weights and batches; a finished run is never repeated,
a killed one goes on or starts anew; a failed one is named and the rest goes on.
"""

import base64
import csv
import fcntl
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import studies

from megatron_default_moe.compare import runs, study
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


def test_a_failed_run_is_named_the_rest_goes_on_and_both_can_be_gone_on_with(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    command = [str(file), "--out", str(out), "--parallel", "2"]
    # It ends by itself after four of six steps, and would not where it begins at the fourth.
    half = f"{ARMS['topk']}, save-interval: 2, exit-interval: 4"
    broken = f"{ARMS['dense']}, moe-pad-expert-input-to-capacity: true"
    studies.write(file, {"half": half, "broken": broken, "topk": ARMS["topk"]}, seeds="[3]")
    assert main(command) == 1
    printed = capsys.readouterr()
    assert re.search(r"FAILED: broken seed 3: exit code 2: .*capacity", printed.err)
    assert "half seed 3: no validation loss was logged after step 6: it ended at" in printed.err
    assert "topk seed 3: done in" in printed.out
    assert [row["finished_seeds"] for row in table_of(out).values()] == ["0", "0", "1"]
    assert "Failed: broken seed 3: exit code 2" in (out / "report.html").read_text()
    # What was trained keeps to its flags; what failed before step 1 may be mended.
    studies.write(file, {"half": half, "broken": ARMS["dense"], "topk": "lr: 2"}, seeds="[3]")
    assert main(command) == 2
    assert "topk/seed-3 was trained with another lr, moe-router-gradient: name" in (
        capsys.readouterr().err
    )
    studies.write(file, {"half": half, "broken": "lr: 2", "topk": ARMS["topk"]}, seeds="[3]")
    assert main(command) == 0
    assert "half seed 3: started from step 4" in capsys.readouterr().out
    assert started(out) == {"half seed-3": 2, "broken seed-3": 1, "topk seed-3": 1}
    table = table_of(out)
    # Stopped and gone on with, it is the run of the same flags to the bit.
    assert table["half"]["final_loss_mean"] == table["topk"]["final_loss_mean"]
    assert float(table["topk"]["difference_mean"]) == 0
    # Stopped after its last evaluation and before that was written down: not evaluated again.
    (out / "runs/half/seed-3/done.json").unlink()
    assert main(command) == 0
    assert "half seed 3: done before" in capsys.readouterr().out
    assert started(out)["half seed-3"] == 2
    assert table_of(out) == table


def test_the_page_is_one_file_that_says_what_the_table_says(compared: Any) -> None:
    _, out, *_ = compared
    text = (out / "report.html").read_text()
    addresses = re.findall(r"(?:src|href)=\"?([^\" >]+)", text)
    assert len(addresses) == 4
    for address in addresses:
        head, _, data = address.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)
    dense = table_of(out)["dense"]
    shown = re.search(r"<tr><td>dense</td>(.*?)</tr>", text)
    assert shown is not None
    assert f"<td>{float(dense['final_loss_mean']):.4f}</td>" in shown[1]
    assert f"<td>{float(dense['difference_mean']):+.4f}</td>" in shown[1]
    assert "4 of 4 runs are finished, each of 6 steps" in text
    assert "topk: moe-router-gradient: topk\ndense: moe-router-gradient: dense\nseeds: 1, 2" in text


@pytest.mark.parametrize("ends", [False, True])
def test_a_run_that_another_process_is_at_is_left_alone(
    ends: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other may be about to end: a run of a study that was killed a moment ago."""
    monkeypatch.setattr(runs, "PATIENCE", 60.0 if ends else 0.3)
    file = tmp_path / "study.yaml"
    studies.write(file, ARMS, seeds="[1]")
    planned = runs.runs_of(study.read(file), tmp_path)[:1]
    folder = planned[0].folder
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def end() -> None:
            (folder / "done.json").write_text("{}")
            fcntl.flock(lock, fcntl.LOCK_UN)

        other = threading.Timer(0.5, end)
        if ends:
            other.start()
        failed = runs.run_all(planned, 1, print)
    assert failed == ({} if ends else {"topk seed 1": "another process is at it"})
    assert not (folder / "config.yaml").exists()


def test_a_task_of_a_slurm_array_is_one_run(
    compared: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SLURM starts it: with the batch script, elsewhere, and a number in the environment."""
    file, before, *_ = compared
    out = tmp_path / "a copy"
    shutil.copytree(before, out)
    for seed in (1, 2):
        shutil.rmtree(out / f"runs/topk/seed-{seed}")
    assert main([str(file), "--out", str(out), "--slurm", "--parallel", "3"]) == 0
    script = out / "study.sbatch"
    assert capsys.readouterr().out.endswith(f"submit it with sbatch {script}\n")
    assert "#SBATCH --array=0-3%3\n" in script.read_text()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_ARRAY_TASK_ID": "2"}
    subprocess.run(["bash", script], env=environment, cwd=tmp_path, check=True, timeout=120)
    assert (out / "runs/topk/seed-2/done.json").is_file()
    assert not (out / "runs/topk/seed-1").exists()
    assert main([str(file), "--out", str(out), "--report"]) == 0
    dense, topk = table_of(out)["dense"], table_of(out)["topk"]
    assert (dense["finished_seeds"], dense["paired_seeds"], topk["final_loss_seed_1"]) == (
        *("2", "1", ""),
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--report", "--slurm"], "--report and --slurm are two commands"),
        (["--run", "4"], "--run must be from 0 to 3, not 4"),
        (["--parallel", "0"], "--parallel must be at least 1, not 0"),
        (["--report", "--out", "nowhere"], "no run below nowhere is finished"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    file = tmp_path / "study.yaml"
    studies.write(file, ARMS)
    assert main([str(file), "--out", str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [file]
