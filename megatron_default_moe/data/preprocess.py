"""JSONL to Megatron's `.bin/.idx`, with any tokenizer Megatron knows.

The megatron-core wheel trains on such files but does not carry the tool that makes them. Flags and
output names are those of Megatron-LM's `tools/preprocess_data.py`. ``default-moe preprocess`` runs
it.
"""

import contextlib
import json
import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import batched
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megatron_default_moe import errors
from megatron_default_moe.data import index_files, tokenizers
from megatron_default_moe.data.corpus import quiet_imports
from megatron_default_moe.data.index_writer import IndexWriter, dtype_of
from megatron_default_moe.errors import UserError

Line = tuple[int, bytes]
"""Its number in the file, from 1, and its bytes."""

Encoded = tuple[int, str, list[tuple[bytes, list[int]]]]
"""Number of the line; why it is bad, or ""; by JSON key the ids and the sequences' lengths."""

_NAMED = 10
"""Bad lines that are named; the others are counted."""
_CHUNK = 32
"""Lines that a worker takes at once."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the tool and Megatron's own tokenizer flags."""
    with quiet_imports():
        from megatron.training.argument_utils import ArgumentGroupFactory
        from megatron.training.config import TokenizerConfig

    group = parser.add_argument_group("input and output")
    group.add_argument("--input", type=Path, required=True, help="JSONL file: one object per line")
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], help="keys to take, default: text"
    )
    group.add_argument(
        "--output-prefix",
        type=Path,
        required=True,
        help="writes PREFIX_KEY_document.bin and .idx (PREFIX_KEY_sentence with sentences)",
    )
    group.add_argument(
        "--append-eod", action="store_true", help="close each document with the tokenizer's EOD"
    )
    group.add_argument(
        "--split-sentences", action="store_true", help="one item per sentence (nltk's punkt)"
    )
    group.add_argument("--lang", default="english", help="of the sentences, default: %(default)s")
    group.add_argument(
        "--keep-empty",
        action="store_true",
        help="keep documents without a token in the index, as Megatron-LM's tool does",
    )
    group.add_argument("--strict", action="store_true", help="stop at the first bad line")
    group.add_argument(
        "--overwrite", action="store_true", help="replace files of this prefix that are there"
    )
    group.add_argument("--workers", type=int, default=1, help="processes, default: %(default)s")
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")


def preprocess(args: Namespace, say: Callable[[str], None] = print) -> dict[str, int]:
    """Tokenize `args.input` and write one `.bin/.idx` pair per key.

    A bad line is left out of every key; it is named with its number, or ends the work with
    `--strict`. The files get their names when all of them are whole.

    Args:
        args: what a parser with `add_arguments` returns.
        say: takes a line per file written, and per bad line.

    Returns:
        Number of tokens by JSON key.

    Raises:
        UserError: a file, key, tokenizer or nltk resource is not there; nothing would be written;
            files of this prefix are there.
    """
    prefixes = _prefixes(args)
    dtype = _Encoder(args).dtype  # a wrong flag fails here, not in a worker
    with contextlib.ExitStack() as stack:
        try:
            args.output_prefix.parent.mkdir(parents=True, exist_ok=True)
            writers = [IndexWriter(prefix, dtype) for prefix in prefixes]
            for writer in writers:
                stack.callback(writer.discard)
            bad = _write(args, writers, say)
            for writer in writers:
                _refuse_without_tokens(args, writer, bad)
                writer.finish()
            for writer in writers:
                writer.publish()
        except OSError as error:
            raise UserError(
                f"--input {args.input} to --output-prefix {args.output_prefix}: {error}"
            ) from error
    for writer in writers:
        left = "kept" if args.keep_empty else "left out"
        empty = f", {writer.empty:,} empty documents {left}" if writer.empty else ""
        say(f"{writer.prefix}.bin, {writer.prefix.name}.idx: {writer.tokens:,} tokens{empty}")
    if bad:
        say(f"{len(bad):,} bad lines of {args.input} left out (--strict stops at the first)")
    return {key: writer.tokens for key, writer in zip(args.json_keys, writers, strict=True)}


def _prefixes(args: Namespace) -> list[Path]:
    """Check the flags; return the prefixes that will be written, by key."""
    if not args.tokenizer_type:
        raise UserError("--tokenizer-type is missing; SentencePieceTokenizer, for example")
    if not args.input.is_file():
        raise UserError(f"--input {args.input} is not a file")
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    if len(set(args.json_keys)) < len(args.json_keys):
        raise UserError(f"--json-keys {' '.join(args.json_keys)} names a key twice")
    level = "sentence" if args.split_sentences else "document"
    prefixes = [Path(f"{args.output_prefix}_{key}_{level}") for key in args.json_keys]
    for prefix in prefixes:
        for ending in (".bin", ".idx"):
            if Path(f"{prefix}{ending}").exists() and not args.overwrite:
                raise UserError(
                    f"--output-prefix {args.output_prefix}: {prefix}{ending} is there; choose"
                    " another prefix, or give --overwrite"
                )
    return prefixes


def _write(args: Namespace, writers: list[IndexWriter], say: Callable[[str], None]) -> list[int]:
    """Write every line's documents; return the numbers of the bad lines."""
    bad: list[int] = []
    with args.input.open("rb") as file, contextlib.closing(_encoded(args, file)) as encoded:
        for number, reason, documents in encoded:
            if reason:
                if args.strict:
                    raise UserError(f"--input {args.input}, line {number}: {reason}")
                bad.append(number)
                if len(bad) <= _NAMED:
                    say(f"{args.input}, line {number}: {reason}; left out")
                continue
            for writer, (ids, lengths) in zip(writers, documents, strict=True):
                writer.empty += not lengths
                if lengths or args.keep_empty:
                    writer.add(ids, lengths)
    return bad


def _refuse_without_tokens(args: Namespace, writer: IndexWriter, bad: list[int]) -> None:
    if not writer.tokens:
        which = f" ({len(bad):,} bad lines, the first is line {bad[0]})" if bad else ""
        raise UserError(
            f"--input {args.input} gives no token for {writer.prefix.name}{which}: nothing is"
            " written; see --json-keys"
        )


class _Encoder:
    """Turns a line into token ids; lives once in each worker."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.tokenizer = tokenizers.build(args)
        self.vocabulary = tokenizers.vocabulary(self.tokenizer, None)
        self.dtype = dtype_of(self.vocabulary)
        self.eod = tokenizers.end_of_document(self.tokenizer)
        if args.append_eod and self.eod is None:
            raise UserError(
                f"--append-eod: the tokenizer of --tokenizer-type {args.tokenizer_type} has no"
                " end-of-document token; take a tokenizer that has one, or leave the flag out"
            )
        self.split: Callable[[str], list[str]] = lambda text: [text]
        if args.split_sentences:
            self.split = _sentence_splitter(args.lang)

    def __call__(self, lines: Iterable[Line]) -> list[Encoded]:
        return [self._line(number, line) for number, line in lines]

    def _line(self, number: int, line: bytes) -> Encoded:
        try:
            texts = _texts(line, self.args.json_keys)
            return number, "", [self._document(text) for text in texts]
        except _BadLineError as error:
            return number, str(error), []

    def _document(self, text: str) -> tuple[bytes, list[int]]:
        try:
            items = [item for part in self.split(text) if (item := self._ids(part))]
        except Exception as error:  # as many kinds as there are libraries behind it
            raise _BadLineError(
                f"the tokenizer refuses it ({' '.join(str(error).split())})"
            ) from None
        if items and self.args.append_eod:
            items[-1].append(self.eod)
        ids = np.array([token for item in items for token in item], np.int64)
        foreign = index_files.outside(ids, self.vocabulary)
        if foreign is not None:
            raise _BadLineError(
                f"token id {foreign} is not among the tokenizer's {self.vocabulary} ids"
            )
        return ids.astype(self.dtype).tobytes(), [len(item) for item in items]

    def _ids(self, text: str) -> list[Any]:
        return list(self.tokenizer.tokenize(text))


class _BadLineError(Exception):
    """The line cannot be used; the message says why."""


def _texts(line: bytes, keys: list[str]) -> list[str]:
    """Return what stands under the keys."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _BadLineError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"not JSON ({error})") from None
    texts = []
    for key in keys:
        text = record.get(key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise _BadLineError(f"no text under the key {key!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{ord(text[error.start]):04x}"
            raise _BadLineError(
                f"the text under {key!r} has half a character (\\u{half} alone)"
            ) from None
        texts.append(text)
    return texts


def _numbered(lines: Iterable[bytes]) -> Iterator[Line]:
    """The lines that hold more than white space."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _encoded(args: Namespace, lines: Iterable[bytes]) -> Generator[Encoded, None, None]:
    """Every line encoded, in order; a few chunks for each worker are on their way at a time."""
    chunks = batched(_numbered(lines), _CHUNK)
    if args.workers == 1:
        encode = _Encoder(args)
        for chunk in chunks:
            yield from encode(chunk)
        return
    # spawn: the parent has imported torch, whose threads do not survive a fork.
    pool = ProcessPoolExecutor(args.workers, get_context("spawn"), _start_worker, (args,))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= 8 * args.workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers {args.workers}: a worker ended (is there memory for so many?); take fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(args: Namespace) -> None:
    global _encoder
    _encoder = _Encoder(args)


def _encode_in_worker(lines: tuple[Line, ...]) -> list[Encoded]:
    return _encoder(lines)


_encoder: _Encoder


def _sentence_splitter(language: str) -> Callable[[str], list[str]]:
    try:
        from nltk.tokenize import PunktTokenizer
    except ImportError:
        raise UserError("--split-sentences needs nltk; install it with the extra [data]") from None
    try:
        punkt = PunktTokenizer(language)
    except LookupError:
        raise UserError(
            f"--split-sentences: nltk has no punkt data for {language!r}; "
            "run `python -m nltk.downloader punkt_tab`"
        ) from None
    return lambda text: list(punkt.tokenize(text))


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = ArgumentParser(
        prog="default-moe preprocess",
        description="Turn a JSONL file into Megatron's `.bin/.idx` training data.",
    )
    add_arguments(parser)
    try:
        preprocess(parser.parse_args(argv))
    except UserError as error:
        return errors.report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
