"""Small training data on disk, and the arguments of a run over it, without Megatron's start."""

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from megatron_default_moe.data import checks, gpt_data, parts
from megatron_default_moe.data.corpus import write_documents
from megatron_default_moe.loop import command_line

VOCABULARY = 63
RUN = (
    "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1"
    " --num-experts 2 --global-batch-size 2 --train-iters 5 --eval-interval 2 --eval-iters 1"
    f" --tokenizer-type NullTokenizer --vocab-size {VOCABULARY}"
)


def write(prefix: pathlib.Path, lengths: Sequence[int], first: int = 0) -> str:
    """Write documents of consecutive ids, of these lengths, and return the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    documents, place = [], first
    for length in lengths:
        documents.append([[number % VOCABULARY for number in range(place, place + length)]])
        place += length
    write_documents(prefix, documents, VOCABULARY)
    return str(prefix)


@functools.cache
def parser() -> argparse.ArgumentParser:
    """Megatron's parser with this package's flags."""
    return command_line.build_parser()


def arguments(flags: str) -> Any:
    """Arguments as Megatron validates them, of one rank that has done nothing yet.

    Raises:
        UserError: no data is named, or twice.
    """
    args = parser().parse_args([*RUN.split(), *flags.split()])
    parts.refuse_unnamed(args)
    if args.data_path is not None and args.split is None:
        args.split = "969, 30, 1"
    for name in ("micro_batch_size", "global_batch_size"):
        if getattr(args, f"eval_{name}") is None:
            setattr(args, f"eval_{name}", getattr(args, name))
    later = {"rank": 0, "data_parallel_size": 1, "iteration": 0, "consumed_valid_samples": 0}
    for name, value in later.items():
        setattr(args, name, value)
    return args


def build(args: Any) -> Any:
    """Check the data and build Megatron's datasets of it, as a run does before its first step.

    Raises:
        UserError: the data is refused.
    """
    checks.check(args)
    train = args.train_iters * args.global_batch_size
    once = args.eval_iters * args.eval_global_batch_size
    points = 1 if args.skip_train else args.train_iters // args.eval_interval + 1
    valid = None if args.full_validation else points * once
    return gpt_data.build(args, [train, valid, once], lambda: True)
