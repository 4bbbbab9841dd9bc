"""A TopK checkpoint gets its default vectors from forward batches alone.

Contract: the vectors are those that one training step over the same batches would set with beta 0,
in any layout; iteration, weights and optimizer are as before; nothing is overwritten.
"""

import argparse
import pathlib
import re
from typing import Any

import pytest
import torch
from launching import ROOT, TINY, record, steps_of, torchrun

from megatron_default_moe import RouterGradientConfig, UserError

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]

K2 = [*TINY, "--moe-router-topk", "2", "--lr-warmup-iters", "2"]
EP2 = [*K2, "--expert-model-parallel-size", "2"]
TOOL = str(ROOT / "tools" / "calibrate.py")
BATCHES = 3


def without_schedule(flags: list[str]) -> list[str]:
    """The same without what the schedule of the run is: the checkpoint knows it."""
    asked = [flags.index(flag) for flag in ("--lr", "--train-iters", "--lr-warmup-iters")]
    return [word for i, word in enumerate(flags) if i not in asked and i - 1 not in asked]


def calibrate(topk: pathlib.Path, new: pathlib.Path, *extra: str) -> Any:
    argv = [*without_schedule(EP2), "--load", str(topk), "--save", str(new), *extra]
    return torchrun(2, [TOOL, *argv, "--calibration-batches", str(BATCHES)], timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def runs(folder: pathlib.Path) -> dict[str, Any]:
    topk, new = folder / "topk", folder / "new"
    save = ["--save", str(topk), "--save-interval", "4", "--exit-interval", "4"]
    trained = {"topk": {"argv": [*EP2, "--moe-router-gradient", "topk", *save]}}
    found = record(folder, 2, trained)
    done = calibrate(topk, new)
    assert done.returncode == 0, done.stdout[-4000:]
    one_step = [
        *("--load", str(topk), "--default-vector-from-baseline", "--default-vector-beta", "0"),
        *("--global-batch-size", str(8 * BATCHES), "--override-opt_param-scheduler"),
    ]
    switched, at_once = ["--load", str(new)], ["--default-vector-fade-in", "0"]
    cases = {
        "one-step": {"argv": [*EP2, *one_step]},
        "switched": {"argv": [*EP2, *switched]},
        "at-once": {"argv": [*EP2, *switched, *at_once]},
        "stays-topk": {
            "argv": [
                *(*EP2, "--moe-router-gradient", "topk", *switched),
                "--default-vector-override",
            ]
        },
        "went-on": {"argv": [*EP2, "--moe-router-gradient", "topk", "--load", str(topk)]},
    }
    return {**found, **record(folder, 2, cases), "said": done.stdout}


def test_the_vectors_are_the_mean_outputs_of_the_batches(runs: dict[str, Any]) -> None:
    reference, first = steps_of(runs["one-step"])[0], steps_of(runs["switched"])[0]
    assert first["layers"].keys() == reference["layers"].keys()
    for number, layer in first["layers"].items():
        expected = reference["layers"][number]["vectors"]
        assert expected.norm() > 0
        assert (layer["before"] - expected).norm() < 1e-5 * expected.norm()


def test_the_losses_with_and_without_the_vectors_are_said(runs: dict[str, Any]) -> None:
    line = re.search(
        rf"> calibrated on {BATCHES} batches of 8 sequences, lm loss ([\d.]+) without the vectors"
        r" and ([\d.]+) with all of them at once; saved to",
        runs["said"],
    )
    assert line is not None, runs["said"][-4000:]
    assert line[1] != line[2]
    assert "over 200 steps, as the checkpoint says (--default-vector-fade-in)" in runs["said"]


def test_the_switch_is_gentle_unless_told_otherwise(runs: dict[str, Any]) -> None:
    """The first loss is TopK's to the bit; with all of the vectors at once it is another."""
    topk, gentle, at_once = (
        steps_of(runs[name])[0]["loss"] for name in ("went-on", "switched", "at-once")
    )
    assert gentle == topk
    assert at_once != topk


def test_the_run_goes_on_where_it_was(runs: dict[str, Any]) -> None:
    """Weights, optimizer, data: the TopK run continues from either checkpoint to the bit."""
    one, other = steps_of(runs["stays-topk"]), steps_of(runs["went-on"])
    assert [step["loss"] for step in one] == [step["loss"] for step in other]
    assert len(one) == 4
    for step, same in zip(one, other, strict=True):
        for number, layer in step["layers"].items():
            assert torch.equal(layer["router_weight"], same["layers"][number]["router_weight"])


def test_vectors_that_are_there_are_not_made_again(
    runs: dict[str, Any], folder: pathlib.Path
) -> None:
    assert runs
    done = calibrate(folder / "new", folder / "again")
    assert done.returncode != 0
    assert f"error: --load {folder / 'new'} has default vectors already" in done.stdout
    assert not [*(folder / "again").glob("iter_*")]


def test_nothing_is_overwritten(runs: dict[str, Any], folder: pathlib.Path) -> None:
    assert runs
    done = calibrate(folder / "topk", folder / "topk")
    assert done.returncode != 0
    assert f"error: --save {folder / 'topk'} already holds checkpoints" in done.stdout


@pytest.mark.full
def test_a_finished_run_with_the_flags_of_a_large_one(folder: pathlib.Path) -> None:
    """Pipeline stages, bf16, distributed optimizer, background saves; no batch left of its own."""
    flags = [
        *(*K2, "--pipeline-model-parallel-size", "2", "--bf16", "--use-distributed-optimizer"),
        *("--save-interval", "8", "--async-save", "--use-persistent-ckpt-worker"),
        *("--async-strategy", "mcore", "--eval-global-batch-size", "4"),
    ]
    topk, new = folder / "finished", folder / "finished-new"
    train = ["-m", "megatron_default_moe.pretrain", *flags, "--moe-router-gradient", "topk"]
    assert torchrun(2, [*train, "--save", str(topk)], timeout=300).returncode == 0
    argv = [*flags, "--load", str(topk), "--save", str(new), "--calibration-batches", "2"]
    argv += ["--default-vector-fade-in", "0"]
    done = torchrun(2, [TOOL, *argv], timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "> calibrated on 2 batches of 8 sequences, lm loss " in done.stdout
    assert "--default-vector-fade-in 0: training on" in done.stdout
    switched = [*flags, "--load", str(new), "--train-iters", "10", "--override-opt_param-scheduler"]
    steps = steps_of(record(folder, 2, {"on": {"argv": switched}})["on"])
    assert len(steps) == 2
    for layer in steps[0]["layers"].values():
        assert (layer["before"].norm(dim=-1) > 0).all()


def test_what_is_said_is_of_the_estimator(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_default_moe.loop import calibrate as command

    args = argparse.Namespace(save="new")
    with pytest.raises(UserError, match="gradient remoe has no default vectors"):
        command._check(args, RouterGradientConfig(gradient="remoe"))
    command._advise(args, RouterGradientConfig(gradient="default-linear"), 0)
    assert not capsys.readouterr().out, "nothing of it comes into the forward"
    command._advise(args, RouterGradientConfig(), 0)
    assert "all of them at once" in capsys.readouterr().out
