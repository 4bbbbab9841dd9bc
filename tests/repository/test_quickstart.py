"""The quickstart's decisions: start, resume, nothing left to do, failure. Training is replaced."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import yaml

from megatron_default_moe.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOAL = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())["train-iters"]


@pytest.fixture
def quickstart(monkeypatch):
    """The tool as a module, with `trained` (commands run) and `exit_code` (of the training)."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "tools" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.trained, module.exit_code, module.reports = [], 0, []

    def train(command):
        module.trained.append(command)
        return module.exit_code

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "prepare_stdlib", lambda *_, **__: None)
    monkeypatch.setattr(module, "write_report", module.reports.append)
    return module


def checkpoint_at(run_dir, iteration):
    (run_dir / "checkpoint").mkdir()
    (run_dir / "checkpoint" / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def test_starts_and_resumes_with_the_same_command(quickstart, tmp_path, capsys):
    assert quickstart.quickstart(quickstart.CONFIG, tmp_path, []) == 0
    assert "train: starting" in capsys.readouterr().out
    checkpoint_at(tmp_path, 100)
    assert quickstart.quickstart(quickstart.CONFIG, tmp_path, []) == 0
    assert "train: resuming at step 100" in capsys.readouterr().out
    first, second = quickstart.trained
    assert first == second
    values = dict(itertools.pairwise(first))
    assert values["--save"] == values["--load"] == str(tmp_path / "checkpoint")
    assert quickstart.reports == [tmp_path, tmp_path]


def test_a_finished_run_only_gets_its_report(quickstart, tmp_path, capsys):
    checkpoint_at(tmp_path, GOAL)
    assert quickstart.quickstart(quickstart.CONFIG, tmp_path, []) == 0
    assert "nothing left to train" in capsys.readouterr().out
    assert (quickstart.trained, quickstart.reports) == ([], [tmp_path])


def test_a_finished_run_trains_on_when_asked_for_more_steps(quickstart, tmp_path):
    """Its schedule is another then, and Megatron has to be told so (the refusal is checks.py's)."""
    checkpoint_at(tmp_path, GOAL)
    more = ["--train-iters", "800"]
    for flags in (more, ["--train-iters=800"]):
        assert quickstart.quickstart(quickstart.CONFIG, tmp_path, flags) == 0
        command = quickstart.trained.pop()
        assert command[-len(flags) - 1 :] == [*flags, "--override-opt_param-scheduler"]
    (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("800")
    for flags in (more, []):
        assert quickstart.quickstart(quickstart.CONFIG, tmp_path, flags) == 0
    assert quickstart.trained == []


def test_a_run_of_another_method_has_a_folder_of_its_own(quickstart, monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "RUNS", tmp_path)
    for argv in ([], ["--", "--moe-router-gradient", "topk"], ["--", "--moe-router-gradient=topk"]):
        monkeypatch.setattr("sys.argv", ["quickstart.py", *argv])
        assert quickstart.main() == 0
    default, *topk = (dict(itertools.pairwise(one))["--save"] for one in quickstart.trained)
    assert default == str(tmp_path / "quickstart" / "checkpoint")
    assert topk == [str(tmp_path / "quickstart-topk" / "checkpoint")] * 2


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("flags", [["--moe-router-gradient", "topk"], ["--lr", "1e-3"]])
def test_a_folder_keeps_to_the_flags_its_run_began_with(quickstart, tmp_path, recorded, flags):
    if recorded:
        quickstart.quickstart(quickstart.CONFIG, tmp_path, ["--train-iters", "500"])
    checkpoint_at(tmp_path, GOAL)
    quickstart.trained.clear(), quickstart.reports.clear()
    with pytest.raises(UserError, match=r"begun with no flags after --: name another --run-dir"):
        quickstart.quickstart(quickstart.CONFIG, tmp_path, flags)
    assert (quickstart.trained, quickstart.reports) == ([], [])


def test_a_begun_run_goes_on_with_the_same_flags(quickstart, tmp_path):
    for flags in (["--lr", "1e-3"], ["--lr", "1e-3", "--train-iters", "800"]):
        assert quickstart.quickstart(quickstart.CONFIG, tmp_path, flags) == 0
        if not (tmp_path / "checkpoint").is_dir():
            checkpoint_at(tmp_path, 100)
    with pytest.raises(UserError, match=r"begun with --lr 1e-3:"):
        quickstart.quickstart(quickstart.CONFIG, tmp_path, [])


def test_a_failure_passes_through_without_a_report(quickstart, tmp_path):
    quickstart.exit_code = 3
    assert quickstart.quickstart(quickstart.CONFIG, tmp_path, []) == 3
    assert quickstart.reports == []


def test_a_missing_config_is_a_users_mistake(quickstart, tmp_path):
    with pytest.raises(UserError, match="--config"):
        quickstart.quickstart(tmp_path / "no.yaml", tmp_path, [])


def test_training_returns_the_exit_code_of_the_command(quickstart, monkeypatch):
    monkeypatch.undo()
    assert quickstart.train(["bash", "-c", "exit 7"]) == 7
