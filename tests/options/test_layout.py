"""What has to divide what: one sentence with the flags, the same in training and in a plan.

Every rule is asked three ways: the pure function, the training entry on the way to Megatron, and
the planner, where the sentence is a LayoutError, which makes it look for another layout.
"""

import argparse
import sys

import pytest

from megatron_default_moe import UserError
from megatron_default_moe.cpu import runtime
from megatron_default_moe.loop import command_line
from megatron_default_moe.options import layout
from megatron_default_moe.options.config import options_from_args
from megatron_default_moe.options.settings import Settings
from megatron_default_moe.plan import arguments
from megatron_default_moe.plan.arguments import LayoutError
from megatron_default_moe.plan.cards import CARDS

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1"
    " --max-position-embeddings 64 --lr 0.1 --train-iters 2 --mock-data --num-experts 8"
    " --moe-router-topk 1 --moe-router-pre-softmax --tokenizer-type NullTokenizer --vocab-size 9"
    " --transformer-impl local --disable-bias-linear --sequence-parallel"
    " --no-gradient-accumulation-fusion --attention-dropout 0 --hidden-dropout 0"
)
FAULTS = [
    (
        "--tensor-model-parallel-size 3",
        8,
        "--tensor-model-parallel-size 3 does not divide the number of ranks, 8",
    ),
    (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2",
        12,
        "--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2 x"
        " --context-parallel-size 2 does not divide the number of ranks, 12",
    ),
    (
        "--global-batch-size 12 --micro-batch-size 2",
        4,
        "--global-batch-size 12 is not divisible by --micro-batch-size 2 x data parallelism 4",
    ),
    (
        "--expert-model-parallel-size 8",
        4,
        "--expert-model-parallel-size 8 does not divide the number of ranks, 4",
    ),
    (
        "--expert-model-parallel-size 4 --expert-tensor-parallel-size 2"
        " --pipeline-model-parallel-size 2",
        8,
        "--expert-model-parallel-size 4 x --expert-tensor-parallel-size 2 x"
        " --pipeline-model-parallel-size 2 does not divide the number of ranks, 8",
    ),
    (
        # Expert tensor parallelism is tensor parallelism unless it is given.
        "--expert-model-parallel-size 4 --tensor-model-parallel-size 2",
        4,
        "--expert-model-parallel-size 4 x --expert-tensor-parallel-size 2 does not divide the"
        " number of ranks, 4",
    ),
    (
        "--expert-model-parallel-size 3",
        6,
        "--expert-model-parallel-size 3 does not divide --num-experts 8",
    ),
    (
        "--tensor-model-parallel-size 8",
        8,
        "--tensor-model-parallel-size 8 does not divide --num-attention-heads 4",
    ),
    (
        "--tensor-model-parallel-size 4 --context-parallel-size 2 --seq-length 60",
        8,
        "--tensor-model-parallel-size 4 x --context-parallel-size 2 does not divide"
        " --seq-length 60",
    ),
]
ids = [f"{flags} on {ranks}" for flags, ranks, _ in FAULTS]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return command_line.build_parser()


def fault(parser: argparse.ArgumentParser, flags: str, ranks: int) -> str | None:
    args = parser.parse_args([*MODEL.split(), *flags.split()])
    return layout.fault(Settings(args, options_from_args(args)), ranks)


@pytest.mark.parametrize(("flags", "ranks", "sentence"), FAULTS, ids=ids)
def test_a_fault_is_one_sentence(
    parser: argparse.ArgumentParser, flags: str, ranks: int, sentence: str
) -> None:
    assert fault(parser, flags, ranks) == sentence


def on_gpus(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Be the first of this many ranks, and do not refuse what the CPU runtime cannot do."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    monkeypatch.setattr(runtime, "needed", lambda: False)


@pytest.mark.parametrize(("flags", "ranks", "sentence"), FAULTS, ids=ids)
def test_training_refuses_it_before_megatron_starts(
    monkeypatch: pytest.MonkeyPatch, flags: str, ranks: int, sentence: str
) -> None:
    on_gpus(monkeypatch, ranks)
    monkeypatch.setattr(command_line, "megatron_args", lambda argv: pytest.fail("too late"))
    with pytest.raises(UserError) as refused:
        command_line.prepare([*MODEL.split(), *flags.split()])
    assert str(refused.value).startswith(f"{sentence}: ")
    assert not isinstance(refused.value, LayoutError)


@pytest.mark.parametrize(("flags", "ranks", "sentence"), FAULTS, ids=ids)
def test_a_plan_says_the_same(flags: str, ranks: int, sentence: str) -> None:
    parsed = arguments.parse([*MODEL.split(), *flags.split()], ranks)
    with pytest.raises(LayoutError) as refused:
        arguments.check(parsed, CARDS["h100"])
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("", 1),
        ("--expert-model-parallel-size 8 --global-batch-size 16", 8),
        (
            "--tensor-model-parallel-size 4 --context-parallel-size 2"
            " --expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
            16,
        ),
        # Megatron leaves some of the batch out then.
        ("--global-batch-size 12 --micro-batch-size 2 --decrease-batch-size-if-needed", 4),
    ],
)
def test_what_divides_is_not_refused(
    parser: argparse.ArgumentParser, flags: str, ranks: int
) -> None:
    assert fault(parser, flags, ranks) is None


def test_spare_ranks_of_in_process_restarts_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 9)
    monkeypatch.setattr(command_line, "megatron_args", lambda argv: argv)
    monkeypatch.setattr(command_line.checks, "check", lambda args: None)
    flags = "--expert-model-parallel-size 8 --inprocess-restart --inprocess-active-world-size"
    command_line.prepare([*MODEL.split(), *flags.split(), "8"])
    with pytest.raises(UserError, match="does not divide the number of ranks, 9"):
        command_line.prepare([*MODEL.split(), *flags.split(), "9"])
