"""The state of every estimator, in a checkpoint and in the run that loads it.

Contract: whatever two runs differ in of what their routers keep ends in one sentence that names the
flag and the way out, or goes on with one warning where that was asked for; the way out is one.
Training on from such checkpoints is in tests/distributed/test_estimator_runs.py.
"""

import argparse
import itertools
import pathlib
from typing import Any

import pytest

from megatron_default_moe import RouterGradientConfig, UserError
from megatron_default_moe.checkpoint import states
from megatron_default_moe.checkpoint.on_disk import Source
from megatron_default_moe.options.estimators import ESTIMATORS, STATES, named

FOLDER = pathlib.Path("/runs/iter_0000007")
PLAIN = {"decoder.layers.mlp.router.weight", "optimizer.state.exp_avg.decoder.weight"}
ONES = [one.name for one in ESTIMATORS]
PAIRS = list(itertools.permutations(ONES, 2))


def names_of(gradient: str, bias: bool = False) -> set[str]:
    """Names in a checkpoint of a run with this estimator."""
    options = RouterGradientConfig(gradient=gradient, loss_free_bias=0.01 if bias else None)
    return PLAIN | {f"decoder.layers.mlp.router.{name}" for name in options.checkpointed}


def settle(
    gradient: str, names: set[str] | None, *, pretrained: bool = False, **given: Any
) -> RouterGradientConfig:
    weights_only = {"finetune", "no_load_optim", "skip_train"}
    args = argparse.Namespace(**{name: given.pop(name, False) for name in weights_only})
    options = RouterGradientConfig(gradient=gradient, **given)
    return states.settle(args, options, Source("--load /runs", FOLDER, pretrained), names)


def refusal(gradient: str, names: set[str], **given: Any) -> str:
    with pytest.raises(UserError) as refused:
        settle(gradient, names, **given)
    sentence = str(refused.value)
    assert sentence.startswith(f"--load /runs: the checkpoint {FOLDER} has ")
    assert "\n" not in sentence
    return sentence


def test_every_state_has_a_name_for_the_user() -> None:
    kept = {name for one in ESTIMATORS for name in one.checkpointed}
    assert kept | {"choice_bias"} == set(STATES)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gradient", ONES)
def test_its_own_checkpoint_is_loaded_whole(
    gradient: str, bias: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with the flag that let the run begin: a restarted command loads what it saved."""
    rate = 0.01 if bias else None
    for flag in (False, True):
        found = settle(gradient, names_of(gradient, bias), loss_free_bias=rate, from_baseline=flag)
        assert not found.from_baseline
        assert found.absent == ()
    assert not caplog.records


@pytest.mark.parametrize(("saved", "now"), PAIRS)
def test_another_estimators_checkpoint_is_refused_with_a_way_out_that_is_one(
    saved: str, now: str, caplog: pytest.LogCaptureFixture
) -> None:
    keeps, had = set(named(now).checkpointed), set(named(saved).checkpointed)
    names = names_of(saved)
    if keeps <= had and (now == "topk" or had <= keeps):
        found = settle(now, names, no_load_optim=True)
        assert found.absent == ()
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == (had != keeps), "what is dropped is said once"
        assert all(STATES[name] in lines[0] for name in had - keeps)
        return
    sentence = refusal(now, names)
    assert f"--moe-router-gradient {saved if had else 'topk'}" in sentence
    if keeps <= had:
        assert "--default-vector-override" in sentence
        settle(now, names, override=True, no_load_optim=True)
        settle(now, names, finetune=True)
        return
    assert "--default-vector-from-baseline" in sentence
    found = settle(now, names, from_baseline=True, no_load_optim=True)
    assert set(found.absent) == keeps - had, "what the checkpoint has is loaded"
    assert found.from_baseline


def test_a_plain_checkpoint_has_a_guess_and_calibration_is_named_for_vectors() -> None:
    assert "(a plain Megatron checkpoint?)" in refusal("remoe", PLAIN)
    assert "default-moe calibrate" in refusal("default", PLAIN)
    assert "default-moe calibrate" not in refusal("remoe", PLAIN)


@pytest.mark.parametrize("gradient", ["topk", "default", "dense", "expert-group"])
def test_a_bias_comes_and_goes_with_consent_alone(
    gradient: str, caplog: pytest.LogCaptureFixture
) -> None:
    sentence = refusal(gradient, names_of(gradient), loss_free_bias=0.01)
    assert sentence.endswith("or drop --moe-loss-free-bias")
    found = settle(gradient, names_of(gradient), loss_free_bias=0.01, from_baseline=True)
    assert found.absent == ("choice_bias",), "the vectors stay"
    sentence = refusal(gradient, names_of(gradient, bias=True))
    assert f"{'' if gradient == 'default' else 'topk'} --moe-loss-free-bias" in sentence
    for consent in ({"override": True}, {"finetune": True}, {"pretrained": True}):
        found = settle(gradient, names_of(gradient, bias=True), **consent)
        assert found.absent == ()
    assert all(STATES["choice_bias"] in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("saved", "now"), [("sparsemixer", "topk"), ("topk", "sparsemixer")])
def test_the_optimizer_of_other_parameters_is_not_loaded(saved: str, now: str) -> None:
    names = names_of(saved)
    with pytest.raises(UserError, match=r"omega .*--no-load-optim"):
        settle(now, names, from_baseline=True)
    for flag in ("finetune", "no_load_optim", "skip_train"):
        settle(now, names, from_baseline=True, **{flag: True})
    settle(now, names, from_baseline=True, pretrained=True)
    weights = {name for name in names if not name.startswith("optimizer")}
    settle(now, weights, from_baseline=True)


def test_what_cannot_be_looked_into_is_taken_at_the_users_word() -> None:
    for flag in (False, True):
        assert settle("remoe", None, from_baseline=flag).from_baseline == flag


def test_what_starts_anew_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    source = Source("--load /runs", FOLDER)
    for gradient, said in (("default", "they start at zeros"), ("sparsemixer", "omega")):
        caplog.clear()
        options = settle(gradient, PLAIN, from_baseline=True, loss_free_bias=None, finetune=True)
        states.say_what_starts(options, source)
        (record,) = caplog.records
        assert said in record.getMessage()
    caplog.clear()
    states.say_what_starts(settle("dense", PLAIN), source)
    assert not caplog.records
