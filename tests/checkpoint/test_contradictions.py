"""What the command line contradicts of what a checkpoint knows: refused or said, never silent.

Contract: every row of the tables is an argument of Megatron's with that flag, and fires; what a
model does not use, the layout, and a command given again fire nothing; ``--use-checkpoint-args``
restores what we say it does; a run's own checkpoint resumes under its own command without a word.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import io
import logging
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_default_moe import RouterGradientConfig, UserError
from megatron_default_moe.checkpoint import checks, contradictions, on_disk, schedule
from megatron_default_moe.checkpoint.contradictions import FUNCTION, OPTIMIZER, RUN, SHAPE, Row
from megatron_default_moe.cpu import flag_choices
from megatron_default_moe.loop import command_line

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path("run/iter_0000004")
TABLES = {"SHAPE": SHAPE, "FUNCTION": FUNCTION, "OPTIMIZER": OPTIMIZER, "RUN": RUN}
ROWS = [row for table in TABLES.values() for row in table]

TINY = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --mock-data"
    " --max-position-embeddings 8 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3"
    " --num-experts 4 --moe-router-topk 1 --moe-ffn-hidden-size 16 --disable-bias-linear"
    " --moe-router-pre-softmax --moe-router-load-balancing-type none --tokenizer-type NullTokenizer"
    " --vocab-size 63 --make-vocab-size-divisible-by 8 --position-embedding-type rope"
    " --untie-embeddings-and-output-weights --eval-interval 100 --eval-iters 0 --split 9,1,0"
    " --moe-token-dispatcher-type alltoall"
).split()
ITERS = ["--train-iters", "4"]
SAMPLES = ["--train-samples", "32"]

EVERYTHING: dict[str, Any] = {
    "num_layers": 4,
    "moe_layer_freq": 2,
    "group_query_attention": True,
    "multi_latent_attention": True,
    "use_mup": True,
    "use_rope_scaling": True,
    "mtp_num_layers": 1,
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_enable_expert_bias": True,
    "moe_expert_capacity_factor": 1.5,
    "position_embedding_type": "learned_absolute",
    "lr_decay_style": "WSD",
    "fp8": "hybrid",
    "optimizer": "muon-adam-sgd-lion",
}
"""Arguments of a model and optimizer that use every row of the tables."""


@functools.cache
def parser() -> argparse.ArgumentParser:
    return command_line.build_parser()


def validated(*argv: str) -> argparse.Namespace:
    """Megatron's arguments as they are when a checkpoint is looked at."""
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training import arguments

    words, _ = flag_choices.apply(parser(), [*TINY, *argv])
    args = parser().parse_args(words)
    args.rank, args.world_size = 0, int(os.environ.get("WORLD_SIZE", "1"))
    args._is_global_batch_size_explicitly_specified = True
    with contextlib.redirect_stdout(io.StringIO()):
        arguments.validate_args(args)
    args.padded_vocab_size = vocab_size_with_padding(args.vocab_size + 1, args, False)
    return args


@pytest.fixture(scope="module")
def everything() -> argparse.Namespace:
    args = validated(*ITERS)
    vars(args).update(EVERYTHING)
    return args


def another(value: Any) -> Any:
    """A value that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "another" if value is None else [*value, "x"] if isinstance(value, list) else None


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    rooms = (contradictions.__name__, schedule.__name__, checks.__name__)
    return [record.getMessage() for record in caplog.records if record.name in rooms]


def test_every_row_is_an_argument_of_megatrons_with_that_flag() -> None:
    actions = parser()._option_string_actions
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        action = actions[row.option]
        assert action.dest == row.name
        assert row.inverse == (action.const is False and action.nargs == 0)


FREE = {"fade_in", "in_eval", "init", "kernels", "from_baseline", "override", "fidelity_interval"}
"""Our options that a resume may change."""


def test_every_option_of_our_own_is_compared_or_free() -> None:
    fields = {field.name for field in contradictions.chosen_by_flags()}
    assert fields == set(contradictions.OWN) | FREE


def test_what_use_checkpoint_args_restores_is_what_upstream_restores() -> None:
    from megatron.training.checkpointing import load_args_from_checkpoint

    source = inspect.getsource(load_args_from_checkpoint)
    forced = set(re.findall(r"_set_arg\('(\w+)', force=True\)", source))
    assert set(contradictions.RESTORED) == forced & {row.name for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_fires(
    row: Row, everything: argparse.Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    args, saved = copy.copy(everything), copy.copy(everything)
    if row.name == "num_experts":
        args.moe_layer_freq = saved.moe_layer_freq = 1
    setattr(saved, row.name, another(getattr(args, row.name)))
    if row in RUN:
        contradictions.refuse(args, saved, FOLDER, weights_only=False)
        contradictions.say(args, saved, FOLDER)
        (line,) = said(caplog)
        assert f"{row.option} " in line
        return
    with pytest.raises(UserError) as refusal:
        contradictions.refuse(args, saved, FOLDER, weights_only=False)
    message = str(refusal.value)
    assert message.startswith(f"{row.option} is ")
    assert str(FOLDER) in message
    assert ("--use-checkpoint-args" in message) == (
        row.name in contradictions.RESTORED and getattr(saved, row.name) is not None
    )


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.used is not contradictions._always], ids=lambda row: row.name
)
def test_what_the_model_does_not_use_is_not_compared(row: Row) -> None:
    args = validated(*ITERS)
    args.optimizer = "another"
    args.moe_router_enable_expert_bias = False
    if row.name in ("global_batch_size", "num_experts"):
        args.step_batch_size_schedule = "0:4"
    if "rotary" in row.name or row.used is contradictions._rotates:
        args.position_embedding_type = "none"
    if row.name == "moe_layer_freq":
        args.num_experts = None
    saved = copy.copy(args)
    setattr(saved, row.name, another(getattr(args, row.name)))
    assert not list(contradictions.differences([row], args, saved))


NEUTRAL = (
    "--recompute-granularity selective",
    "--micro-batch-size 2",
    "--log-interval 1",
    "--num-workers 0",
    "--save-interval 7",
    "--expert-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--use-distributed-optimizer",
    "--moe-layer-freq [1,1]",
    "--ffn-hidden-size 48",
    "--rotary-base 10000",
    "--default-vector-beta 0.99",
    "--moe-token-dispatcher-type allgather",
    "--default-vector-init gaussian",
)
"""Flags that make no other run of it: layout, cost, what is not used, what was so anyway."""


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=st.sets(st.sampled_from(NEUTRAL)), now=st.sets(st.sampled_from(NEUTRAL)))
def test_the_same_run_in_another_layout_is_no_contradiction(
    before: set[str], now: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WORLD_SIZE", "4")
        saved, args = (
            validated(*ITERS, "--global-batch-size", "8", *" ".join(sorted(flags)).split())
            for flags in (before, now)
        )
    contradictions.refuse(args, saved, FOLDER, weights_only=False)
    contradictions.say(args, saved, FOLDER)
    assert not said(caplog)


def refusal(now: list[str], saved: list[str], weights_only: bool = False) -> str:
    try:
        contradictions.refuse(validated(*now), validated(*saved), FOLDER, weights_only)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--default-vector-beta", "0.9"),
        ("--default-vector-weighting", "uniform"),
        ("--default-vector-order", "before-use"),
        ("--no-default-vector-in-forward", None),
        ("--default-vector-bias-correction", None),
        ("--moe-router-gradient", "topk"),
        ("--paper-default-moe", None),
    ],
)
def test_our_own_options_are_the_checkpoints_or_overridden(flag: str, value: str | None) -> None:
    words = [flag] if value is None else [flag, value]
    message = refusal([*ITERS, *words], ITERS)
    assert "--default-vector-override" in message
    assert message.startswith("--")
    assert not refusal([*ITERS, *words], [*ITERS, *words])
    assert not refusal([*ITERS, *words, "--default-vector-override"], ITERS)
    assert not refusal([*ITERS, *words, "--finetune"], ITERS, weights_only=True)


def test_what_another_gradient_uses_is_not_compared() -> None:
    group = ["--moe-router-gradient", "expert-group", "--expert-group-size"]
    assert not refusal([*ITERS, "--expert-group-size", "3"], ITERS)
    assert refusal([*ITERS, *group, "3"], [*ITERS, *group, "2"]).startswith("--expert-group-size ")


def test_vectors_for_a_checkpoint_without_them_are_another_checks() -> None:
    topk = ["--moe-router-gradient", "topk"]
    assert not refusal([*ITERS, "--default-vector-beta", "0.5"], [*ITERS, *topk])
    beta = ["--default-vector-beta", "0.5"]
    assert not refusal([*ITERS, *topk], [*ITERS, *topk, *beta]), "topk has no vectors"


def test_a_bias_that_starts_anew_is_another_checks() -> None:
    bias = ["--moe-loss-free-bias", "0.001"]
    assert not refusal([*ITERS, *bias], ITERS)
    assert refusal([*ITERS, *bias, "--default-vector-beta", "0.9"], ITERS)
    for saved, now in ((bias, []), (bias, ["--moe-loss-free-bias", "0.002"])):
        assert refusal([*ITERS, *now], [*ITERS, *saved]).startswith("--moe-loss-free-bias is ")


def test_an_evaluation_computes_the_same_function() -> None:
    changed = [*ITERS, "--rotary-base", "5000"]
    evaluated = refusal([*changed, "--skip-train"], ITERS, weights_only=True)
    assert evaluated.startswith("--rotary-base is 5000, but the checkpoint")
    assert "with 10000: give that value (or --use-checkpoint-args)" in evaluated
    assert not refusal([*changed, "--finetune"], ITERS, weights_only=True)
    assert not refusal([*changed, "--finetune", "--skip-train"], ITERS, weights_only=True)


def test_a_switch_is_named_as_given_or_missing() -> None:
    tied = validated(*ITERS)
    tied.untie_embeddings_and_output_weights = False
    with pytest.raises(UserError, match=r"^--untie-\S+ is missing, .* was saved with it: add it"):
        contradictions.refuse(tied, validated(*ITERS), FOLDER, weights_only=True)
    biased = validated(*ITERS)
    biased.add_bias_linear = True
    with pytest.raises(UserError, match=r"^--disable-bias-linear is given, .* without it: drop it"):
        contradictions.refuse(validated(*ITERS), biased, FOLDER, weights_only=True)


def test_a_vocabulary_of_another_size_is_refused_and_padding_is_not() -> None:
    assert "vocabulary has 56 tokens" in refusal([*ITERS, "--vocab-size", "50"], ITERS)
    assert not refusal([*ITERS, "--make-vocab-size-divisible-by", "128"], ITERS)
    assert not refusal([*ITERS, "--vocab-size", "60"], ITERS), "said: the embedding is the same"


# What is left to train


def left(
    caplog: pytest.LogCaptureFixture, now: list[str], saved: list[str], done: int, batch: int = 4
) -> list[str]:
    """What is said of a checkpoint after some iterations of a batch."""
    before = validated(*saved)
    before.consumed_train_samples = done * batch
    state = {"args": before, "iteration": done}
    caplog.clear()
    schedule.check_what_is_left(validated(*now), state, FOLDER)
    return said(caplog)


@pytest.mark.parametrize("flags", [ITERS, SAMPLES])
def test_a_finished_run_says_so(caplog: pytest.LogCaptureFixture, flags: list[str]) -> None:
    total = 4 if flags is ITERS else 8
    assert not left(caplog, flags, flags, total - 1)
    (line,) = left(caplog, flags, flags, total)
    assert line.startswith("nothing is left to train: ")
    assert f"raise {flags[0]} " in line


@pytest.mark.parametrize("batch", ["8", "2"])
def test_samples_with_another_batch_size_are_all_trained_or_refused(
    caplog: pytest.LogCaptureFixture, batch: str
) -> None:
    changed = [*SAMPLES, "--global-batch-size", batch]
    with pytest.raises(
        UserError, match=rf'give 4, or .*--step-batch-size-schedule "0:4 128:{batch}"'
    ):
        left(caplog, changed, SAMPLES, 4)


def test_a_schedule_of_batch_sizes_is_given_again(caplog: pytest.LogCaptureFixture) -> None:
    stepped = ["--step-batch-size-schedule", "0:2 128:4"]
    saved = validated(*SAMPLES)
    saved.step_batch_size_schedule, saved.consumed_train_samples = stepped[1], 16
    with pytest.raises(UserError, match='give --step-batch-size-schedule "0:2 128:4" again'):
        schedule.check_what_is_left(validated(*SAMPLES), {"args": saved, "iteration": 8}, FOLDER)
    args = validated(*SAMPLES)
    args.step_batch_size_schedule = stepped[1]
    schedule.check_what_is_left(args, {"args": saved, "iteration": 8}, FOLDER)
    assert not said(caplog)


# A checkpoint as Megatron saves it


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a run that was stopped after two of its iterations."""
    folder = tmp_path_factory.mktemp("saved")
    flags = [*TINY, *ITERS, "--save", str(folder), "--save-interval", "2", "--exit-interval", "2"]
    subprocess.run(
        [sys.executable, "-m", "megatron_default_moe.pretrain", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
        capture_output=True,
    )
    return folder


def resumed(saved: pathlib.Path, *flags: str) -> RouterGradientConfig:
    args = validated(*ITERS, "--load", str(saved), *flags)
    return checks.prepare_load(args, contradictions.options_from_args(args))


def test_a_run_resumes_under_its_own_command_without_a_word(
    saved: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = on_disk.common_state(saved / "iter_0000002")
    assert state["args"].adam_beta2 == 0.999
    assert resumed(saved) == RouterGradientConfig()
    assert not said(caplog)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--adam-beta2 0.95", "--adam-beta2 is 0.95, .* with 0.999: give that value"),
        ("--weight-decay 0.1", "--weight-decay makes start_wd of the schedule 0.1"),
        ("--norm-epsilon 1e-6", "--norm-epsilon is 1e-06, .* with 1e-05: give that value"),
        ("--swiglu", "--swiglu is given, .* without it: drop it"),
        ("--global-batch-size 8", "--global-batch-size is 8, .* saved with 4"),
        ("--default-vector-beta 0.5", "--default-vector-beta is 0.5, .* with 0.99"),
    ],
)
def test_what_a_saved_run_is_contradicted_in(
    saved: pathlib.Path, flags: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        resumed(saved, *flags.split())


def test_what_only_makes_another_run_is_said_in_one_line(
    saved: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    resumed(saved, "--seed", "7", "--clip-grad", "0.5", "--eod-mask-loss")
    (line,) = said(caplog)
    assert line.endswith("--seed 7 (was 1234), --clip-grad 0.5 (was 1.0), --eod-mask-loss (new)")
