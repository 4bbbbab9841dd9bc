"""What is checked of a run's data before its first step, on every rank alike.

Each part that the run will read must yield as many samples as the run takes, and be of the model's
vocabulary. Megatron counts repetitions up without an end where there is no token, asserts where a
sequence is too short, runs out of samples in the middle of a run, and looks up any id.

The ids are read here up to ``IDS`` tokens, larger files in places spread evenly; every sample is
looked at again when it is read (``checked_dataset.py``).
"""

import math
from typing import Any

from megatron_default_moe.data import evaluation, tokenizers
from megatron_default_moe.data.parts import NAMES, Part, Source, parts
from megatron_default_moe.errors import UserError

IDS = 1 << 25
"""Token ids that are looked at before the first step, in all files together."""
_LEAST_IDS = 1 << 18
"""The same in each file."""

MOST_EPOCHS = 1_000_000
"""Repetitions of a part. Megatron's loop over them takes seconds from here on."""


def check(args: Any) -> None:
    """Refuse data that the run cannot take as its flags say.

    Args:
        args: Megatron's validated arguments; a tokenizer has not been built yet.

    Raises:
        UserError: one sentence, with the flag and the way out.
    """
    found = parts(args)
    if found is not None and "train" not in found and not args.skip_train:
        flag = next(part.flag for part in found.values())
        raise UserError(
            f"{flag} leaves nothing to train on: give the training part data (the first share of"
            " --split), or --skip-train to evaluate alone"
        )
    evaluation.refuse_impossible(args, found)
    tokenizer = tokenizers.build(args)
    if found is None:
        return
    read = {name: part for name, part in found.items() if name in wanted(args, found)}
    for part in read.values():
        refuse_too_short(args, part, _samples(args)[part.name])
    vocabulary = tokenizers.vocabulary(tokenizer, args.padded_vocab_size)
    _refuse_foreign(args, list(read.values()), vocabulary)


def wanted(args: Any, found: dict[str, Part] | None) -> set[str]:
    """Return the names of the parts that the run reads.

    A test part of ``--split`` without a sequence is left out: most runs that name one did not ask
    for a test set, it is in Megatron's default.
    """
    names = set() if args.skip_train else {"train"}
    if evaluation.evaluates(args):
        names |= {"valid", "test"}
    test = (found or {}).get("test")
    if test is not None and test.split and test.known and not any(s.tokens for s in test.sources):
        names.discard("test")
    return names if found is None else names & set(found)


def _samples(args: Any) -> dict[str, int | None]:
    """How many samples Megatron asks of each part; None for all there are, once."""
    batch, eval_batch = args.global_batch_size, args.eval_global_batch_size
    train = args.train_samples or args.train_iters * batch
    if args.full_validation:
        return dict(zip(NAMES, (train, None, 0), strict=True))
    once = args.eval_iters * eval_batch
    times = evaluation.times(args, train // batch)
    return dict(zip(NAMES, (train, times * once, once), strict=True))


def refuse_too_short(args: Any, part: Part, samples: int | None) -> None:
    """Refuse a part that cannot yield the samples.

    Args:
        args: Megatron's validated arguments.
        part: what is read.
        samples: how many are needed; None for one pass over it.

    Raises:
        UserError: it holds too little, or would be repeated beyond reason.
    """
    if not part.known:
        return
    length = args.seq_length
    if samples is None:
        _refuse_short_sets(args, part)
        return
    if part.weights is None and len(part.sources) > 1:
        _refuse_short_blend(part, length, samples)
        return
    total = sum(part.weights or (1.0,))
    for source, weight in zip(part.sources, part.weights or (1.0,), strict=True):
        needed = math.ceil(samples * weight / total) * length + 1
        _refuse_empty(part, source)
        epochs = math.ceil(needed / source.tokens)
        if epochs > MOST_EPOCHS:
            raise UserError(
                f"{part.flag} {source.prefix} has {source.tokens:,} tokens for {part.words}, which"
                f" the run would read {epochs:,} times: give more data or a shorter run"
            )


def _refuse_empty(part: Part, source: Source) -> None:
    if source.tokens:
        return
    if part.split and source.index is not None:
        of = f"of the {len(source.index)} sequences of {part.flag} {source.prefix} none is left for"
        raise UserError(f"{of} {part.words}: give more data, or another --split{_without(part)}")
    raise UserError(f"{part.flag} {source.prefix} holds no token")


def _without(part: Part) -> str:
    """The way out that is there for validation and test data alone."""
    return "" if part.name == "train" else ", or --eval-iters 0 to train without evaluation"


def _once(source: Source, length: int) -> int:
    """Samples of one pass over it; a sample is one token longer than a sequence."""
    return max(0, (source.tokens - 1) // length)


def _refuse_short_blend(part: Part, length: int, samples: int) -> None:
    """Without weights, Megatron reads each prefix once at most."""
    for source in part.sources:
        if not _once(source, length):
            raise UserError(
                f"{part.flag} {source.prefix} has {source.tokens} tokens for {part.words}, less"
                f" than one sample of --seq-length {length}: leave it out, or give each prefix a"
                " weight"
            )
    there = sum(_once(source, length) for source in part.sources)
    if there < samples:
        raise UserError(
            f"{part.flag} yields {there:,} samples of --seq-length {length} for {part.words} and"
            f" the run takes {samples:,}: give each prefix a weight, so that they are repeated,"
            f" more data or a shorter run{_without(part)}"
        )


def _refuse_short_sets(args: Any, part: Part) -> None:
    """With ``--full-validation`` every data-parallel rank needs a sample of its own in each set."""
    ranks = args.data_parallel_size
    sets = [part.sources] if part.split else [(source,) for source in part.sources]
    for sources in sets:
        if len(sources) > 1 and not all(_once(source, args.seq_length) for source in sources):
            _refuse_short_blend(part, args.seq_length, 0)
        there = sum(_once(source, args.seq_length) for source in sources)
        if there < ranks:
            raise UserError(
                f"{part.flag} {sources[0].prefix} yields {there} samples of --seq-length"
                f" {args.seq_length} for {part.words}, and --full-validation needs one for each of"
                f" the {ranks} data-parallel ranks: give more data, or --eval-iters N instead"
            )


def _refuse_foreign(args: Any, read: list[Part], vocabulary: int) -> None:
    files = {
        source.prefix: (part.flag, source.index)
        for part in read
        for source in part.sources
        if source.index is not None
    }
    for prefix, (flag, index) in files.items():
        found = index.first_outside(vocabulary, max(_LEAST_IDS, IDS // len(files)))
        if found is not None:
            raise UserError(foreign_id(args, f"{flag} {prefix}", found, vocabulary))


def foreign_id(args: Any, where: str, found: int, vocabulary: int) -> str:
    """The sentence about a token id that the model does not have.

    Args:
        args: Megatron's arguments.
        where: the flag and the prefix.
        found: the id.
        vocabulary: number of ids.
    """
    return (
        f"{where} holds the token id {found} and --tokenizer-type {args.tokenizer_type} has the ids"
        f" 0 to {vocabulary - 1}: give the tokenizer that made the data (--tokenizer-type,"
        " --tokenizer-model, --vocab-size), or preprocess it again"
    )
