"""How a process comes by a tokenizer: what is passed to it, and what it builds from that.

The ids are Megatron's: each recipe repeats the wrapper of its kind in
``megatron/core/tokenizers/text/libraries``, and a test compares the files written.
"""

import base64
import dataclasses
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

Tokenize = Callable[[str], list[int]]

SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


class Recipe(Protocol):
    """A tokenizer that another process can build; pickled, it is small."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""

    @property
    def eod(self) -> int | None:
        """The id that ends a document, if there is one."""

    def build(self) -> Tokenize:
        """Return what turns a text into ids."""


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model by its path."""

    path: str
    vocabulary: int
    eod: int | None

    @classmethod
    def of(cls, path: str) -> "SentencePiece":
        """Read how many ids the model has, and its end."""
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=path)
        end = processor.eos_id()
        return cls(path, processor.get_piece_size(), end if end >= 0 else None)

    def build(self) -> Tokenize:
        """Load the model."""
        from sentencepiece import SentencePieceProcessor

        encode: Tokenize = SentencePieceProcessor(model_file=self.path).encode_as_ids
        return encode


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A tokenizer of the ``tokenizers`` library, as transformers set it up."""

    text: str
    """Its ``tokenizer.json``."""
    around: bool
    """Whether the ids have what the tokenizer puts around a text."""
    vocabulary: int
    eod: int | None

    def build(self) -> Tokenize:
        """Parse the JSON text."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.text)
        tokenizer.no_truncation()
        tokenizer.no_padding()

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=self.around).ids
            return ids

        return encode


_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""Megatron's, by ``--tiktoken-pattern``."""
_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


@dataclasses.dataclass(frozen=True)
class Tiktoken:
    """A tiktoken vocabulary (a JSON list of ranks) behind Megatron's special tokens."""

    path: str
    pattern: str
    special: tuple[str, ...]
    reserved: int
    """Ids before the first of the vocabulary."""
    vocabulary: int

    @property
    def eod(self) -> int:
        """Megatron ends documents with the end of a sequence."""
        return self.special.index("</s>")

    def build(self) -> Tokenize:
        """Read the vocabulary.

        Raises:
            ValueError: there are fewer tokens than the vocabulary has ids.
        """
        import tiktoken

        entries = json.loads(Path(self.path).read_text())[: self.vocabulary - self.reserved]
        ranks = {
            base64.b64decode(entry["token_bytes"]): rank
            for rank, entry in enumerate(entries, self.reserved)
        }
        if len(ranks) != self.vocabulary - self.reserved:
            raise ValueError("the file has fewer tokens than the vocabulary")
        names = (
            *self.special,
            *(f"<SPECIAL_{i}>" for i in range(len(self.special), self.reserved)),
        )
        encoding = tiktoken.Encoding(
            name=Path(self.path).parent.name,
            pat_str=self.pattern,
            mergeable_ranks=ranks,
            special_tokens={name: number for number, name in enumerate(names)},
        )
        return lambda text: encoding.encode(text, allowed_special="all")


def direct(args: Namespace) -> Recipe | None:
    """The recipe that can be had without asking Megatron, or None.

    Args:
        args: with the flags of ``tokenizer_flags.py``. With those whose meaning only Megatron's
            wrapper knows, and with a file that cannot be read, there is no such recipe: Megatron
            then does the work, or says what is wrong.
    """
    if args.metadata_path or not args.tokenizer_model:
        return None
    try:
        if args.tokenizer_type in SENTENCE_PIECE:
            spaces = args.tokenizer_sentencepiece_ignore_extra_whitespaces
            if args.tokenizer_sentencepiece_legacy or args.special_tokens or not spaces:
                return None
            return SentencePiece.of(args.tokenizer_model)
        if args.tokenizer_type == "TikTokenizer" and not args.special_tokens:
            recipe = Tiktoken(
                args.tokenizer_model,
                _PATTERNS[args.tiktoken_pattern or "v2"],
                _SPECIAL,
                args.tiktoken_num_special_tokens,
                args.vocab_size or 2**17,
            )
            if not len(_SPECIAL) <= recipe.reserved < recipe.vocabulary:
                return None
            recipe.build()
            return recipe
    except Exception:  # as many kinds as there are libraries behind it
        return None
    return None
