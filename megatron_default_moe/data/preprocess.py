"""Text to Megatron's `.bin/.idx`, with any tokenizer Megatron knows.

The megatron-core wheel trains on such files but does not carry the tool that makes them. Flags and
output names are those of Megatron-LM's `tools/preprocess_data.py`. ``default-moe preprocess`` runs
it. Neither this process nor a worker imports torch or Megatron, but for the tokenizers that only
Megatron's wrappers know (``tokenizers.recipe``).
"""

import contextlib
import functools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_default_moe import exits
from megatron_default_moe.data import tokenizers
from megatron_default_moe.data.index_writer import IndexWriter
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.flags import OneSentenceParser
from megatron_default_moe.text import sources, tokenizer_flags
from megatron_default_moe.text.encoder import Encoder, sentence_splitter
from megatron_default_moe.text.ids import dtype_of
from megatron_default_moe.text.workers import encoded

_NAMED = 10
"""Bad lines that are named; the others are counted."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the tool and Megatron's own tokenizer flags."""
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input",
        type=Path,
        required=True,
        help="JSONL, or by its ending .txt (empty lines part documents), each also .gz or .zst;"
        " .parquet",
    )
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
    tokenizer_flags.add_arguments(parser)


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
    make, dtype = _encoder(args)
    with contextlib.ExitStack() as stack:
        try:
            args.output_prefix.parent.mkdir(parents=True, exist_ok=True)
            writers = [IndexWriter(prefix, dtype) for prefix in prefixes]
            for writer in writers:
                stack.callback(writer.discard)
            bad = _write(args, make, writers, say)
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


def _encoder(args: Namespace) -> tuple[Callable[[], Encoder], str]:
    """What makes an encoder in any process, and the dtype of its ids.

    Raises:
        UserError: a flag is wrong, which is found here and not in a worker.
    """
    recipe = tokenizers.recipe(args)
    if args.append_eod and recipe.eod is None:
        raise UserError(
            f"--append-eod: the tokenizer of --tokenizer-type {args.tokenizer_type} has no"
            " end-of-document token; take a tokenizer that has one, or leave the flag out"
        )
    language = args.lang if args.split_sentences else None
    if language is not None:
        sentence_splitter(language)
    make = functools.partial(Encoder, recipe, args.json_keys, args.append_eod, language)
    return make, dtype_of(recipe.vocabulary)


def _write(
    args: Namespace,
    make: Callable[[], Encoder],
    writers: list[IndexWriter],
    say: Callable[[str], None],
) -> list[int]:
    """Write every line's documents; return the numbers of the bad lines."""
    bad: list[int] = []
    unit = sources.unit(args.input)
    with (
        sources.lines(args.input, args.json_keys) as source,
        contextlib.closing(encoded(make, args.workers, source)) as lines,
    ):
        for number, reason, documents in lines:
            if reason:
                if args.strict:
                    raise UserError(f"--input {args.input}, {unit} {number}: {reason}")
                bad.append(number)
                if len(bad) <= _NAMED:
                    say(f"{args.input}, {unit} {number}: {reason}; left out")
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


def run(argv: list[str]) -> None:
    """Preprocess as the flags say.

    Args:
        argv: the command line, without the program's name.

    Raises:
        UserError: a mistake in the flags or files.
    """
    parser = OneSentenceParser(
        prog="default-moe preprocess",
        description="Turn a JSONL file into Megatron's `.bin/.idx` training data.",
    )
    add_arguments(parser)
    exits.add_flag(parser)
    preprocess(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exits.exit_code`."""
    return exits.exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
