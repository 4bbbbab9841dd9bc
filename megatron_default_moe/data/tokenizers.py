"""Megatron's tokenizers: built in one sentence, and how many ids one has."""

import dataclasses
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from megatron_default_moe.data.corpus import quiet_imports
from megatron_default_moe.errors import UserError
from megatron_default_moe.text import recipes
from megatron_default_moe.text.recipes import HuggingFace, Recipe, Tokenize

_HUGGING_FACE = (
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
)
_PROBE = (
    "The  cat's 1,234 hats:\n\t\u00e9\u00df \u6f22\u5b57 \U0001f600 <s> </s> [MASK] <|endoftext|> "
)
"""Runs of spaces, accents, names of special tokens: where wrappers differ from the library."""


def build(args: Namespace) -> Any:
    """Build the tokenizer that the flags name, and change nothing in them.

    Args:
        args: with the flags of Megatron's tokenizers.

    Raises:
        UserError: there is no such tokenizer, or a file or a flag of it is missing.
    """
    with quiet_imports():
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    if args.tokenizer_type in ("NullTokenizer", "NullMultimodalTokenizer") and not args.vocab_size:
        raise UserError(f"--tokenizer-type {args.tokenizer_type} needs --vocab-size N")
    # No padded vocabulary: that depends on the run that will read the data.
    flags = Namespace(**{**vars(args), "pad_vocab_size": False})
    try:
        return build_tokenizer(flags)
    except Exception as error:  # as many kinds as there are libraries behind it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--tokenizer-type {args.tokenizer_type}: {reason}") from error


def end_of_document(tokenizer: Any) -> int | None:
    """The id of the token that ends a document, or None if the tokenizer has none."""
    try:
        eod = tokenizer.eod
    except (AttributeError, NotImplementedError, KeyError, IndexError, TypeError):
        return None
    # SentencePiece says -1 for a piece that a model does not have.
    return int(eod) if isinstance(eod, int) and eod >= 0 else None


def vocabulary(tokenizer: Any, padded: int | None) -> int:
    """Return how many token ids there are: a model's padded rows beyond them are never trained.

    Args:
        tokenizer: Megatron's.
        padded: rows of the model's embedding, where they are known.
    """
    size = int(tokenizer.vocab_size)
    eod = end_of_document(tokenizer)
    # --null-tokenizer-eod-id may be beyond the size that the tokenizer tells.
    size = max(size, size if eod is None else eod + 1)
    return size if padded is None else min(size, padded)


@dataclasses.dataclass(frozen=True)
class Megatron:
    """A tokenizer that only Megatron's own wrapper knows: each process imports Megatron."""

    args: Namespace
    vocabulary: int
    eod: int | None

    def build(self) -> Tokenize:
        """Build Megatron's tokenizer."""
        tokenize: Tokenize = build(self.args).tokenize
        return tokenize


def recipe(args: Namespace) -> Recipe:
    """How a process comes by the tokenizer that the flags name, if possible without Megatron.

    What transformers makes of a folder or name is asked in a process of its own, which imports
    Megatron and torch, and ends.

    Args:
        args: with the flags of Megatron's tokenizers.

    Raises:
        UserError: as :func:`build`.
    """
    found = recipes.direct(args)
    if found is None and args.tokenizer_type in _HUGGING_FACE and not args.trust_remote_code:
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found = pool.submit(from_transformers, args).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--tokenizer-type {args.tokenizer_type}: the process that reads it ended (is"
                " there memory for it?)"
            ) from error
    if found is not None:
        return found
    tokenizer = build(args)
    return Megatron(args, vocabulary(tokenizer, None), end_of_document(tokenizer))


def from_transformers(args: Namespace) -> HuggingFace | None:
    """Read the ``tokenizers`` object out of Megatron's wrapper; None if it alone gives other ids.

    Raises:
        UserError: as :func:`build`.
    """
    tokenizer = build(args)
    inner: Any = getattr(tokenizer, "_tokenizer", None)
    theirs = getattr(inner, "tokenizer", None)
    backend: Any = getattr(theirs, "backend_tokenizer", None)
    if not hasattr(backend, "to_str") or getattr(theirs, "split_special_tokens", False):
        return None
    found = HuggingFace(
        backend.to_str(),
        bool(inner.include_special_tokens),
        vocabulary(tokenizer, None),
        end_of_document(tokenizer),
    )
    encode = found.build()
    same = all(encode(text) == list(tokenizer.tokenize(text)) for text in (_PROBE, "", " a"))
    return found if same else None
