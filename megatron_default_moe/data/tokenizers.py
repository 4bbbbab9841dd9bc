"""Megatron's tokenizers: built in one sentence, and how many ids one has."""

from argparse import Namespace
from typing import Any

from megatron_default_moe.data.corpus import quiet_imports
from megatron_default_moe.errors import UserError


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
