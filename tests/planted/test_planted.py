"""The planted task: what is known of the estimators there holds, with wide margins."""

import dataclasses
import pathlib

import pytest
import torch

from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.planted import command, fidelity, named, training
from megatron_default_moe.planted.report import mean
from megatron_default_moe.planted.settings import SETTINGS

STEPS, SEEDS = 700, [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Small tensors: threads only cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_dense_and_backward_only_default_are_far_below_topk() -> None:
    setting = dataclasses.replace(SETTINGS["cells"], steps=STEPS)
    arms = {name: named.ARMS[name] for name in ("topk", "dense", "default-backward")}
    found = training.train(setting, arms, SEEDS)
    topk = mean(found["topk"].fvu)
    assert mean(found["dense"].fvu) < topk - 0.10
    assert mean(found["default-backward"].fvu) < topk - 0.10


def test_default_is_topk_where_means_say_nothing_and_linear_is_not() -> None:
    setting = dataclasses.replace(SETTINGS["cells-no-means"], steps=1000)
    arms = {name: named.ARMS[name] for name in ("topk", "default-backward", "default-linear")}
    arms["dense"] = RouterGradientConfig(gradient="dense")
    found = fidelity.measure(setting, arms, SEEDS, [200])
    cosine = {name: mean(probes[0][0]) for name, probes in found.items()}
    assert cosine["default-backward"] == pytest.approx(cosine["topk"], abs=0.02)
    assert cosine["default-linear"] > cosine["topk"] + 0.1
    assert cosine["dense"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.full
def test_eight_seeds_of_a_whole_training() -> None:
    arms = {name: named.ARMS[name] for name in ("topk", "dense", "default-backward")}
    found = training.train(SETTINGS["cells"], arms, list(range(8)))
    for name in ("dense", "default-backward"):
        assert mean(found[name].fvu) < mean(found["topk"].fvu) - 0.10
        assert all(a < b for a, b in zip(found[name].fvu, found["topk"].fvu, strict=True))


def test_a_seed_is_the_same_alone_and_beside_others() -> None:
    setting = dataclasses.replace(SETTINGS["cells"], steps=25)
    for name, options in named.ARMS.items():
        (alone,) = training.train(setting, {name: options}, [1])[name].fvu
        beside = training.train(setting, {name: options}, [0, 1])[name].fvu[1]
        assert alone == pytest.approx(beside, rel=1e-4), name


def test_the_command_writes_its_files_and_trains_nothing_twice(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--steps", "25", "--seeds", "2", "--out", str(tmp_path), "--arms", "dense"]
    assert command.main(line) == 0
    first = capsys.readouterr().out
    assert "| dense" in first
    assert {one.name for one in tmp_path.iterdir()} == {
        *("cells.json", "planted.md", "planted.png", "results.csv"),
    }
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(fidelity, "measure", None)
    assert command.main(line) == 0
    assert capsys.readouterr().out == first
    assert command.main([*line, "--first-seed", "5"]) == 2
    assert "give another folder with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--settings", "sells"], "--settings sells is not known"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--steps", "3"], "--steps must be at least 25"),
        (["--first-seed", "-1"], "--first-seed must be at least 0"),
        (["--arm", "beta 0.5"], "must be a name, a colon and flags"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert command.main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert not (tmp_path / "out").exists()
