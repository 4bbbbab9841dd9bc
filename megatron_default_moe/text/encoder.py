"""A line of JSON to the bytes of its tokens."""

import json
from collections.abc import Callable, Iterable

import numpy as np

from megatron_default_moe.errors import UserError
from megatron_default_moe.text.ids import dtype_of, outside
from megatron_default_moe.text.recipes import Recipe

Line = tuple[int, bytes]
"""Its number in the file, from 1, and its bytes."""

Encoded = tuple[int, str, list[tuple[bytes, list[int]]]]
"""Number of the line; why it is bad, or ""; by JSON key the ids and the sequences' lengths."""


class Encoder:
    """Turns a line into token ids; lives once in each worker.

    Args:
        recipe: of the tokenizer.
        keys: JSON keys to take.
        append_eod: whether the tokenizer's end closes each document.
        language: of the sentences that are items of their own, or None.
    """

    def __init__(
        self, recipe: Recipe, keys: list[str], append_eod: bool, language: str | None
    ) -> None:
        self.tokenize = recipe.build()
        self.vocabulary, self.dtype = recipe.vocabulary, dtype_of(recipe.vocabulary)
        self.keys = keys
        self.end: list[int] = []
        if append_eod:
            assert recipe.eod is not None
            self.end = [recipe.eod]
        self.split: Callable[[str], list[str]] = lambda text: [text]
        if language is not None:
            self.split = sentence_splitter(language)

    def __call__(self, lines: Iterable[Line]) -> list[Encoded]:
        """Encode lines, in their order."""
        return [self._line(number, line) for number, line in lines]

    def _line(self, number: int, line: bytes) -> Encoded:
        try:
            return number, "", [self._document(text) for text in _texts(line, self.keys)]
        except _BadLineError as error:
            return number, str(error), []

    def _document(self, text: str) -> tuple[bytes, list[int]]:
        try:
            items = [item for part in self.split(text) if (item := list(self.tokenize(part)))]
        except Exception as error:  # as many kinds as there are libraries behind it
            raise _BadLineError(
                f"the tokenizer refuses it ({' '.join(str(error).split())})"
            ) from None
        if items:
            items[-1].extend(self.end)
        ids = np.array([token for item in items for token in item], np.int64)
        foreign = outside(ids, self.vocabulary)
        if foreign is not None:
            raise _BadLineError(
                f"token id {foreign} is not among the tokenizer's {self.vocabulary} ids"
            )
        return ids.astype(self.dtype).tobytes(), [len(item) for item in items]


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


def sentence_splitter(language: str) -> Callable[[str], list[str]]:
    """What cuts a text into sentences.

    Raises:
        UserError: nltk or its data for the language is not there.
    """
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
