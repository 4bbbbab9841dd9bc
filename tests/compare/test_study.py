"""A study's file: what it means, and every mistake in one sentence before anything runs."""

import pathlib
import re
from collections.abc import Callable

import pytest
import studies

from megatron_default_moe.compare import checks, study
from megatron_default_moe.compare.command import main
from megatron_default_moe.errors import UserError
from megatron_default_moe.options import flags

GOOD = """
flags: {train-iters: 4, num_layers: 2, bf16: false, layernorm-epsilon: 1.10e-5}
seeds: [1, 2]
baseline: topk
arms:
  topk: {moe-router-gradient: topk}
  longer: {moe-router-gradient: default, lr: 8, num-layers: null}
"""
ROOT = pathlib.Path(__file__).resolve().parents[2]
Read = Callable[[str], study.Study]


@pytest.fixture
def read(tmp_path: pathlib.Path) -> Read:
    def read(text: str) -> study.Study:
        file = tmp_path / "study.yaml"
        file.write_text(text)
        return study.read(file)

    return read


def test_arms_win_over_what_all_runs_share(read: Read) -> None:
    found = read(GOOD)
    assert found.pairs == [("topk", 1), ("longer", 1), ("topk", 2), ("longer", 2)]
    assert found.steps == 4
    assert found.arms["topk"]["layernorm-epsilon"] == "1.10e-5"
    assert "num-layers" in found.arms["topk"]
    assert "num-layers" not in found.arms["longer"]


def test_the_config_is_beside_the_study_and_may_be_a_single_runs(
    read: Read, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "base.yaml").write_text("seed: 7\nsave: x\nload: x\nlr: 0.1\ntrain-iters: 3\n")
    found = read(GOOD + "config: base.yaml")
    assert found.arms["topk"]["lr"] == "0.1"
    assert not {"seed", "save", "load"} & set(found.arms["topk"])
    assert found.steps == 4


def test_what_a_run_is_given_reads_as_it_was_written(tmp_path: pathlib.Path) -> None:
    first, again = tmp_path / "first.yaml", tmp_path / "again.yaml"
    first.write_text(
        'a: [1.10, yes, "no"]\nb: true\nc: "it\'s \\"x\\" \\\\${y}"\nd: 0123\ne: null\n'
    )
    again.write_text(flags.text_of(flags.lines_of(first)))
    lines = flags.lines_of(first)
    assert lines.pop("e") is None
    assert flags.lines_of(again) == lines
    assert lines["c"] == 'it\'s "x" ${y}'


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds:", "seed:", "seed is not a line of a study; did you mean seeds?"),
        ("seeds: [1, 2]", "seeds: 3", "seeds must be a list of numbers"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "a seed is listed twice"),
        ("seeds: [1, 2]", "seeds: [-1]", "a seed must be a whole number of at least 0, not -1"),
        ("baseline: topk", "baseline: tpk", "baseline must be one of the arms, topk, longer"),
        ("baseline: topk", "", "baseline must be one of the arms"),
        ("  longer: {", "  # ", "arms must hold at least two arms"),
        ("longer:", "lo/nger:", "an arm's name is a folder's"),
        ("longer:", "TOPK:", "arms topk and TOPK would share a folder"),
        ("topk}", "topk, seed: 3}", "arm topk: seed is set for each run; list it in seeds"),
        ("topk}", "topk, load: x}", "arm topk: load is set for each run"),
        ("train-iters: 4,", "", "arm topk: train-iters (steps of a run) must be a whole number"),
        ("topk}\n", "topk}\n  same: {moe-router-gradient: topk}\n", "have the same flags"),
        ("lr: 8", "train_iters: 8", "arms topk and longer differ in train-iters, and would not"),
        ("lr: 8", "eval-iters: 8", "arms topk and longer differ in eval-iters"),
        ("seeds:", "corpus: mine\nseeds:", "corpus can be stdlib alone"),
        ("seeds:", "ranks: 0\nseeds:", "ranks must be a whole number of at least 1, not 0"),
        ("seeds:", "config: gone/x.yaml\nseeds:", "gone/x.yaml"),
        ("num_layers: 2", "num_layers: 2, num-layers: 3", "num-layers is there twice"),
        ("num_layers: 2", "num_layers: 2, mock-data: true}\ncorpus: stdlib\n#", "both name data"),
        ("seeds: [1, 2]", "seeds: [1, 2", "not a valid YAML file"),
    ],
)
def test_a_mistake_is_one_sentence(read: Read, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        read(GOOD.replace(old, new, 1))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("moe-router-gradiant: topk", "arm wrong: moe-router-gradiant is not a flag; did you"),
        ("num-layers: two", "arm wrong: argument --num-layers: invalid int value"),
        ("expert-model-parallel-size: 2", "arm wrong: "),
        ("save-interval: 0", "arm wrong: --save-interval must be at least 1"),
    ],
)
def test_every_arms_flags_are_checked_before_the_first_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], flag: str, says: str
) -> None:
    file = tmp_path / "study.yaml"
    studies.write(file, {"topk": "moe-router-gradient: topk", "wrong": flag})
    assert main([str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "examples/studies").glob("*.yaml")))
def test_the_studies_that_come_along_are_accepted(file: pathlib.Path) -> None:
    found = study.read(file)
    assert found.baseline == "topk"
    assert len(found.seeds) >= 3
    checks.check(found)


@pytest.mark.parametrize(
    ("more", "says"),
    [("eval-iters: 0", "eval-iters is 0"), ("mock-data: false", "arm topk: no data is named")],
)
def test_flags_of_all_arms_are_checked_too(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], more: str, says: str
) -> None:
    file = tmp_path / "study.yaml"
    studies.write(file, {"topk": "moe-router-gradient: topk", "dense": ""})
    name = more.split(":")[0]
    file.write_text(re.sub(rf"{name}: \w+", more, file.read_text()))
    assert main([str(file), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_a_warning_of_every_arm_is_said_once(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    checks.check(study.read(ROOT / "examples/studies/quickstart.yaml"))
    said = [record.getMessage() for record in caplog.records]
    assert said
    assert len(said) == len(set(said))
