"""JSONL to Megatron's `.bin/.idx`, with any tokenizer Megatron knows.

The megatron-core wheel trains on such files but does not carry the tool that makes them. Flags and
output names are those of Megatron-LM's `tools/preprocess_data.py`. ``default-moe preprocess`` runs
it.
"""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_default_moe import errors
from megatron_default_moe.data.corpus import quiet_imports, write_documents
from megatron_default_moe.errors import UserError

Document = dict[str, list[list[int]]]
"""Per JSON key the items (the sentences, or the whole text as one) of one line."""


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
    group.add_argument("--workers", type=int, default=1, help="processes, default: %(default)s")
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")


def preprocess(args: Namespace, say: Callable[[str], None] = print) -> dict[str, int]:
    """Tokenize `args.input` and write one `.bin/.idx` pair per key.

    Args:
        args: what a parser with `add_arguments` returns.
        say: takes a line per file written.

    Returns:
        Number of tokens by JSON key.

    Raises:
        UserError: a file, key, tokenizer or nltk resource is not there.
    """
    if not args.tokenizer_type:
        raise UserError("--tokenizer-type is missing; SentencePieceTokenizer, for example")
    if not args.input.is_file():
        raise UserError(f"--input {args.input} is not a file")
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    vocab_size = _Encoder(args).tokenizer.vocab_size  # a wrong flag fails here, not in a worker

    args.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    level = "sentence" if args.split_sentences else "document"
    written = {}
    # One pass per key: a builder wants its documents as one stream.
    for key in args.json_keys:
        prefix = Path(f"{args.output_prefix}_{key}_{level}")
        documents = (document[key] for document in _documents(args) if document[key])
        partial = prefix.with_name(prefix.name + ".partial")
        written[key] = write_documents(partial, documents, vocab_size)
        for ending in (".bin", ".idx"):
            os.replace(f"{partial}{ending}", f"{prefix}{ending}")
        say(f"{prefix}.bin, {prefix.name}.idx: {written[key]:,} tokens")
    return written


class _Encoder:
    """Turns a line into items of token ids; lives once in each worker."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.tokenizer = _tokenizer(args)
        self.split: Callable[[str], list[str]] = lambda text: [text]
        if args.split_sentences:
            self.split = _sentence_splitter(args.lang)

    def __call__(self, numbered: tuple[int, str]) -> Document:
        number, line = numbered
        where = f"--input {self.args.input}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        document = {}
        for key in self.args.json_keys:
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise UserError(f"{where}: no text under the key {key!r}; see --json-keys")
            ids = (list(self.tokenizer.tokenize(part)) for part in self.split(record[key]))
            items = [item for item in ids if item]
            if items and self.args.append_eod:
                items[-1].append(self.tokenizer.eod)
            document[key] = items
        return document


def _documents(args: Namespace) -> Iterator[Document]:
    with ExitStack() as stack:
        lines = stack.enter_context(args.input.open(encoding="utf-8"))
        numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
        if args.workers == 1:
            yield from map(_Encoder(args), numbered)
        else:
            # spawn: the parent has imported torch, whose threads do not survive a fork.
            pool = stack.enter_context(
                get_context("spawn").Pool(args.workers, _start_worker, (args,))
            )
            yield from pool.imap(_encode_in_worker, numbered, chunksize=32)


def _start_worker(args: Namespace) -> None:
    global _encoder
    _encoder = _Encoder(args)


def _encode_in_worker(numbered: tuple[int, str]) -> Document:
    return _encoder(numbered)


_encoder: _Encoder


def _tokenizer(args: Namespace) -> Any:
    with quiet_imports():
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    # No padded vocabulary: that depends on the run that will read the files.
    flags = Namespace(**{**vars(args), "pad_vocab_size": False})
    try:
        return build_tokenizer(flags)
    except (ValueError, OSError, TypeError) as error:
        raise UserError(f"--tokenizer-type {args.tokenizer_type}: {error}") from error


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
