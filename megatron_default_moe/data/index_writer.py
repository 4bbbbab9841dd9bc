"""Megatron's `.bin/.idx`, written as documents come, with NumPy alone; whole or not there at all.

The format is described in ``index_files.py``. The bytes are those of Megatron's own
``IndexedDatasetBuilder`` (a test compares them), which would bring torch into the process.
"""

import os
import pathlib
import struct
from array import array
from typing import Any

import numpy as np

_CODES = {"uint16": 8, "int32": 4}


class IndexWriter:
    """A pair of files under partial names until :meth:`publish`.

    Args:
        prefix: path without the ending.
        dtype: of the tokens, as NumPy names it.
    """

    def __init__(self, prefix: pathlib.Path, dtype: str) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.partial = {
            ending: prefix.with_name(f"{prefix.name}.partial{ending}")
            for ending in (".bin", ".idx")
        }
        self.tokens = 0
        self.empty = 0
        """Documents without a token that were met."""
        self._lengths, self._documents = array("i"), array("q", [0])
        self._bin = self.partial[".bin"].open("wb")

    def add(self, ids: bytes, lengths: list[int]) -> None:
        """Add a document.

        Args:
            ids: its tokens in the files' dtype.
            lengths: tokens of each sequence (a sentence, or the whole document).
        """
        self._bin.write(ids)
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))
        self.tokens += sum(lengths)

    def finish(self) -> None:
        """Write the index; both files are then whole, under their partial names."""
        self._bin.close()
        lengths = np.frombuffer(self._lengths, "<i4") if self._lengths else np.zeros(0, "<i4")
        places = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1], dtype="<i8", out=places[1:])
        places *= self.dtype.itemsize
        header: Any = struct.pack(
            "<9sQBQQ",
            b"MMIDIDX\x00\x00",
            1,
            _CODES[self.dtype.name],
            len(lengths),
            len(self._documents),
        )
        with self.partial[".idx"].open("wb") as file:
            for part in (header, lengths, places, self._documents):
                file.write(part)

    def publish(self) -> None:
        """Give both files their names."""
        for ending, partial in self.partial.items():
            os.replace(partial, f"{self.prefix}{ending}")

    def discard(self) -> None:
        """Close and remove what is still under partial names."""
        self._bin.close()
        for partial in self.partial.values():
            partial.unlink(missing_ok=True)
