"""Which data a run reads for training, validation and test, as its flags say."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from megatron_default_moe.data import index_files
from megatron_default_moe.data.index_files import IndexFile
from megatron_default_moe.errors import UserError

NAMES = ("train", "valid", "test")
"""In the order of Megatron's `Split`."""

_REMOTE = ("s3://", "msc://")


@dataclasses.dataclass(frozen=True)
class Source:
    """Consecutive sequences of one prefix."""

    prefix: str
    index: IndexFile | None
    """None in object storage, where nothing is checked before Megatron reads it."""
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return 0 if self.index is None else self.index.tokens(self.begin, self.end)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one of the three parts reads."""

    name: str
    flag: str
    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None
    """None: in proportion to their lengths, each sequence at most once."""
    split: str | None = None
    """The value of --split, if it is a part of what the flag names."""

    @property
    def known(self) -> bool:
        """Whether its index files could be read here."""
        return all(source.index is not None for source in self.sources)

    @property
    def words(self) -> str:
        """How a sentence calls it."""
        kind = {"train": "training", "valid": "validation", "test": "test"}[self.name]
        return f"the {kind} part (--split {self.split})" if self.split else f"the {kind} data"


def refuse_unnamed(args: Any) -> None:
    """Refuse a run whose flags name no data, or contradict one another.

    Megatron takes a run without data for one with mock data, and --data-path over the others.

    Args:
        args: Megatron's arguments, parsed and not yet validated.

    Raises:
        UserError: with the flags.
    """
    together = _given(args, "data_path", "data_args_path")
    alone = _given(args, "train_data_path", "valid_data_path", "test_data_path")
    from_file = _given(args, "per_split_data_args_path")
    mock = ["--mock-data"] if args.mock_data else []
    ways = [way for way in (together, alone, from_file, mock) if way]
    both = [way[0] for way in ways] if len(ways) > 1 else together
    if len(both) > 1:
        raise UserError(f"{both[0]} and {both[1]} both name data: give one of them")
    if not ways:
        raise UserError(
            "no data is named: give --train-data-path PREFIX (default-moe preprocess makes it"
            " from JSONL), or --mock-data to try without"
        )
    if alone and not args.train_data_path and not args.skip_train:
        raise UserError(
            f"{alone[0]} alone leaves nothing to train on: give --train-data-path PREFIX too, or"
            " --skip-train to evaluate alone"
        )
    if args.split is not None and (alone or from_file):
        raise UserError(
            f"--split divides what --data-path names, and {(alone or from_file)[0]} names each part"
            " apart: leave --split out"
        )


def _given(args: Any, *names: str) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def parts(args: Any) -> dict[str, Part] | None:
    """Return the parts that the flags name, by name; None for mock data, which has all.

    Args:
        args: Megatron's validated arguments, which :func:`refuse_unnamed` accepted.

    Raises:
        UserError: a prefix, a weight, the split or a file with arguments cannot be used.
    """
    if args.mock_data:
        return None
    if args.data_path is not None:
        return _split_parts("--data-path", args.data_path, args.split)
    if args.data_args_path is not None:
        flag = f"--data-args-path {args.data_args_path}:"
        return _split_parts(flag, _text(flag, args.data_args_path).split(), args.split)
    named = {name: (_flag(name), getattr(args, f"{name}_data_path")) for name in NAMES}
    if args.per_split_data_args_path is not None:
        named = _named_in(args.per_split_data_args_path)
    return {
        name: Part(name, flag, tuple(_source(flag, prefix) for prefix in prefixes), weights)
        for name, (flag, words) in named.items()
        if words is not None
        for prefixes, weights in [_blend(flag, words)]
    }


def _flag(name: str) -> str:
    return f"--{name}-data-path"


def _text(flag: str, path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} the file cannot be read ({error})") from error


def _named_in(path: str) -> dict[str, tuple[str, list[str] | None]]:
    """The prefixes of each part in a file of ``--per-split-data-args-path``."""
    flag = f"--per-split-data-args-path {path}:"
    try:
        loaded = json.loads(_text(flag, path))
    except ValueError as error:
        raise UserError(f"{flag} not JSON ({error})") from error
    if not isinstance(loaded, dict) or not all(name in loaded for name in NAMES):
        raise UserError(f"{flag} the file must hold train, valid and test (null for none)")
    named: dict[str, tuple[str, list[str] | None]] = {}
    for name in NAMES:
        words = loaded[name]
        words = words.split() if isinstance(words, str) else words
        if words is not None and not (
            isinstance(words, list) and all(isinstance(word, str) for word in words)
        ):
            raise UserError(f"{flag} {name} must be text, a list of texts, or null")
        named[name] = (f"{flag} {name}", words)
    return named


def _blend(flag: str, words: list[str]) -> tuple[list[str], tuple[float, ...] | None]:
    """Prefixes and their weights: ``A B C``, or ``0.3 A 0.7 B`` as Megatron reads them."""
    words = [word.strip() for word in words]
    if not words:
        raise UserError(f"{flag} names no prefix")
    numbers = [_number(word) for word in words]
    if len(words) % 2 or not any(number is not None for number in numbers[::2]):
        return words, None
    weights = []
    for word, number, prefix in zip(words[::2], numbers[::2], words[1::2], strict=True):
        if number is None:
            raise UserError(
                f"{flag} has a prefix, {word}, where the weight of {prefix} should be: write"
                " WEIGHT PREFIX for each, or prefixes alone"
            )
        if not math.isfinite(number) or number <= 0:
            raise UserError(
                f"{flag} gives {prefix} the weight {word}: a weight must be above 0 (leave out what"
                " should not be read)"
            )
        weights.append(number)
    return words[1::2], tuple(weights)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _source(flag: str, prefix: str) -> Source:
    if prefix.startswith(_REMOTE):
        return Source(prefix, None, 0, 0)
    index = index_files.read(flag, prefix)
    return Source(prefix, index, 0, len(index))


def _split_parts(flag: str, words: list[str], split: str | None) -> dict[str, Part]:
    """Each part's share of every prefix, in Megatron's own arithmetic."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    if split is None:
        raise UserError(f"{flag} needs --split: for example 99,1,0, which leaves out a test part")
    shares = [_number(share) for share in split.replace("/", ",").split(",")]
    if (
        len(shares) > len(NAMES)
        or not all(share is not None and math.isfinite(share) and share >= 0 for share in shares)
        or not sum(share or 0 for share in shares)
    ):
        raise UserError(
            f"--split {split} must be up to three shares, of training, validation and test: for"
            " example 99,1,0"
        )
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    prefixes, weights = _blend(flag, words)
    whole = [_source(flag, prefix) for prefix in prefixes]
    found = {}
    for name, share in zip(NAMES, matrix, strict=True):
        if share is not None:
            sources = tuple(
                dataclasses.replace(
                    one,
                    begin=round(share[0] * float(one.end)),
                    end=round(share[1] * float(one.end)),
                )
                for one in whole
            )
            found[name] = Part(name, flag, sources, weights, split)
    return found
