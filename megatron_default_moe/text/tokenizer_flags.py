"""Megatron's tokenizer flags, without Megatron.

Names, types, choices and defaults are those of ``TokenizerConfig``
(``megatron/training/config/training_config.py``); a test compares each.
"""

from argparse import ArgumentParser
from typing import Any

_TYPES = (
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "MultimodalTokenizer",
    "NullTokenizer",
    "NullMultimodalTokenizer",
    "SFTTokenizer",
)

_FLAGS: dict[str, dict[str, Any]] = {
    "--tokenizer-type": {"type": str, "choices": _TYPES, "help": "the kind of tokenizer"},
    "--tokenizer-model": {"type": str, "help": "its file, folder, or name on the Hugging Face hub"},
    "--vocab-size": {"type": int, "help": "ids that it has, where the kind must be told"},
    "--padded-vocab-size": {"type": int, "help": "of the model; the data do not depend on it"},
    "--vocab-file": {"type": str, "help": "its vocabulary, where that is a file of its own"},
    "--merge-file": {"type": str, "help": "its BPE merges"},
    "--vocab-extra-ids": {"type": int, "default": 0, "help": "T5's ids for masked spans"},
    "--tokenizer-metadata": {
        "type": str,
        "dest": "metadata_path",
        "help": "JSON file that describes the tokenizer",
    },
    "--tokenizer-special-tokens": {
        "type": str,
        "nargs": "+",
        "dest": "special_tokens",
        "help": "special tokens beside its own",
    },
    "--tiktoken-pattern": {"type": str, "choices": ("v1", "v2"), "help": "how text is cut first"},
    "--tiktoken-num-special-tokens": {
        "type": int,
        "default": 1000,
        "help": "ids before the first of the vocabulary, default: %(default)s",
    },
    "--tokenizer-sentencepiece-legacy": {
        "action": "store_true",
        "help": "Megatron's older wrapper, which takes special tokens",
    },
    "--tokenizer-hf-no-use-fast": {
        "action": "store_true",
        "help": "transformers' tokenizer in Python",
    },
    "--tokenizer-hf-no-include-special-tokens": {
        "action": "store_true",
        "help": "leave out what the tokenizer puts around a text",
    },
    "--trust-remote-code": {"action": "store_true", "help": "run code that comes with a tokenizer"},
    "--null-tokenizer-eod-id": {"type": int, "help": "the end of a NullTokenizer's documents"},
    "--null-tokenizer-pad-id": {"type": int, "default": -1, "help": "its padding"},
    "--chat-template": {"type": str, "help": "jinja; the data do not depend on it"},
}

_OFF = {
    "pad_vocab_size": "the data do not depend on it",
    "tokenizer_sentencepiece_ignore_extra_whitespaces": "keep runs of spaces",
}
"""On by default; ``--no-NAME`` and ``--disable-NAME`` turn them off."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags as a group."""
    group = parser.add_argument_group("tokenizer", "Megatron's own flags")
    for name, settings in _FLAGS.items():
        group.add_argument(name, **settings)
    for dest, does in _OFF.items():
        flag = dest.replace("_", "-")
        group.add_argument(
            f"--no-{flag}", f"--disable-{flag}", dest=dest, action="store_false", help=does
        )
