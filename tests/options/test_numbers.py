"""Numbers with which no run can work are refused before Megatron sees them.

Contract: every number of the table has its least value, below which the flag, what Megatron would
do and the way out are one sentence, in training and in plans; a flag that a run may leave out gets
the value that Megatron documents for it.
"""

import argparse
from typing import Any

import pytest

from megatron_default_moe import UserError
from megatron_default_moe.loop import command_line
from megatron_default_moe.options import numbers
from megatron_default_moe.plan import arguments

NAMES = [(name, rule) for rule in numbers.LEAST for name in rule.names]
RUN = (
    "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1"
    " --num-experts 2 --train-iters 10 --eval-interval 5"
)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return command_line.build_parser()


def parsed(parser: argparse.ArgumentParser, line: str) -> Any:
    return parser.parse_args(line.split())


@pytest.mark.parametrize(("name", "rule"), NAMES, ids=[name for name, _ in NAMES])
def test_less_than_the_least_is_refused(
    parser: argparse.ArgumentParser, name: str, rule: numbers.Least
) -> None:
    flag = f"--{name.replace('_', '-')}"
    numbers.refuse_impossible(parsed(parser, f"{flag} {rule.least}"))
    words = f"{flag} must be at least {rule.least}, not {rule.least - 1}: "
    for refuse in (
        lambda: numbers.refuse_impossible(parsed(parser, f"{flag}={rule.least - 1}")),
        lambda: arguments.parse([f"{flag}={rule.least - 1}"], 1),
    ):
        with pytest.raises(UserError) as refused:
            refuse()
        assert str(refused.value).startswith(words)
        assert rule.way_out in str(refused.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--seed 4294967296", r"--seed 4294967296 is too large"),
        ("--moe-layer-freq [0,0]", r"--moe-layer-freq \[0, 0\] leaves no MoE layer"),
        ("--moe-layer-freq [1,2]", r"a pattern holds 1 for an MoE layer"),
        ("--moe-layer-freq [[1,0]]", r"a pattern holds 1 for an MoE layer"),
        ("--moe-layer-freq 0", r"--moe-layer-freq must be at least 1, not 0"),
        ("--moe-layer-freq [1,0", r"argument --moe-layer-freq: invalid"),
        ("--moe-layer-freq [1]*[1]", r"argument --moe-layer-freq: invalid"),
        ("--moe-layer-freq [1](2)", r"argument --moe-layer-freq: invalid"),
        ("--moe-layer-freq 1.5", r"argument --moe-layer-freq: invalid"),
        ("--moe-layer-freq ([1],[0])", r"is neither a number nor a list"),
        ("--moe-layer-freq all", r"argument --moe-layer-freq: invalid"),
    ],
)
def test_what_is_no_number_and_no_pattern(
    parser: argparse.ArgumentParser, line: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        numbers.refuse_impossible(parsed(parser, f"{RUN} {line}"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pattern", ["1", "2", "9", "[1,0]", "[0]+[1]", "[1]*2"])
def test_patterns_with_an_moe_layer(parser: argparse.ArgumentParser, pattern: str) -> None:
    numbers.refuse_impossible(parsed(parser, f"{RUN} --moe-layer-freq {pattern}"))


@pytest.mark.parametrize(
    ("gone", "line", "words"),
    [
        ("--micro-batch-size", "", "--micro-batch-size is missing"),
        ("--seq-length", "", "--seq-length is missing"),
        ("--num-layers", "", "--num-layers is missing"),
        ("--train-iters", "", "nothing says how long to train"),
        ("--train-iters", "--train-samples 3 --global-batch-size 4", "less than one step"),
        ("", "--save folder", "--save needs --save-interval"),
    ],
)
def test_what_a_training_run_must_say(
    parser: argparse.ArgumentParser, gone: str, line: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        numbers.complete_training(parsed(parser, f"{without(gone)} {line}"))


@pytest.mark.parametrize(
    ("gone", "line", "added"),
    [
        ("", "", []),
        ("--eval-interval", "", ["--eval-interval", "11"]),
        ("--train-iters", "--train-samples 64", []),
        ("--train-iters", "--skip-train", ["--train-iters", "1"]),
    ],
)
def test_what_a_run_may_leave_out(
    parser: argparse.ArgumentParser, gone: str, line: str, added: list[str]
) -> None:
    assert numbers.complete_training(parsed(parser, f"{without(gone)} {line}")) == added


def without(flag: str) -> str:
    words = RUN.split()
    if flag:
        place = words.index(flag)
        del words[place : place + 2]
    return " ".join(words)
