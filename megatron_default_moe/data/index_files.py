"""What a prefix of training data holds: the `.idx` file read, the `.bin` file measured.

Megatron maps both files as they are. A missing half, a text file or a copy that stopped half-way
ends there in an assertion, a ``struct.error`` or in ids that are not in the data.

The format is Megatron's (``megatron/core/datasets/indexed_dataset.py``): a header, version 1, the
code of the tokens' dtype, the number of sequences and of documents; then for every sequence its
length (int32) and its byte in the `.bin` file (int64), and for every document its first sequence.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_default_moe.errors import UserError
from megatron_default_moe.text.ids import outside

_HEADER = b"MMIDIDX\x00\x00"
_START = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""By code; 6 and 7 are floating point, which are no token ids."""

_WHOLE = 1 << 22
"""Bytes of an `.idx` file up to which its digest is that of every byte."""
_BLOCKS, _BLOCK = 64, 1 << 16
"""How many bytes of a larger one, in how many places."""


@dataclasses.dataclass(frozen=True)
class IndexFile:
    """A pair of files that Megatron can map."""

    prefix: str
    dtype: Any
    """Of the tokens, as NumPy names it."""
    lengths: NDArray[np.int32]
    """Tokens of each sequence."""

    def __len__(self) -> int:
        """Return the number of sequences, by which Megatron splits."""
        return len(self.lengths)

    def tokens(self, begin: int = 0, end: int | None = None) -> int:
        """Tokens of the sequences from ``begin`` up to ``end``."""
        return int(self.lengths[begin:end].sum(dtype=np.int64))

    def first_outside(self, vocabulary: int, budget: int) -> int | None:
        """Return a token id that is not in ``range(vocabulary)``, or None if none is seen.

        Args:
            vocabulary: number of token ids.
            budget: how many tokens to look at; a larger file is read in places spread evenly.
        """
        tokens: NDArray[Any] = np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")
        block = 1 << 16
        blocks = -(-len(tokens) // block)
        step = max(1, -(-blocks * block // budget))
        for place in range(0, blocks, step):
            found = outside(tokens[place * block : (place + 1) * block], vocabulary)
            if found is not None:
                return found
        return None


def read(flag: str, prefix: str) -> IndexFile:
    """Read what a prefix holds.

    Args:
        flag: which flag named it.
        prefix: the path of both files, without their ending.

    Raises:
        UserError: there are no such files, or Megatron cannot map them, or they hold no token.
    """
    refuse = functools.partial(_mistake, flag, prefix)
    for ending in (".idx", ".bin"):
        if prefix.endswith(ending):
            raise refuse(f"takes a prefix: leave {ending} away")
    index, tokens = pathlib.Path(f"{prefix}.idx"), pathlib.Path(f"{prefix}.bin")
    there = [path.is_file() for path in (index, tokens)]
    if not any(there):
        raise _nothing_there(refuse, prefix)
    if not all(there):
        missing = tokens if there[0] else index
        raise refuse(f"has no {missing.name}: both halves come from one default-moe preprocess")
    try:
        return _read(refuse, prefix, index, tokens)
    except OSError as error:
        raise refuse(f"cannot be read ({error})") from error


def _mistake(flag: str, prefix: str, what: str) -> UserError:
    return UserError(f"{flag} {prefix} {what}")


_Refuse = Callable[[str], UserError]


def _nothing_there(refuse: _Refuse, prefix: str) -> UserError:
    """Say what stands there instead."""
    if os.path.isfile(prefix):
        return refuse(
            "is a file of its own, not the prefix of a .bin and an .idx file: default-moe"
            " preprocess makes those from JSONL"
        )
    path = pathlib.Path(prefix)
    near = sorted(path.parent.glob(f"{path.name}*.idx")) if path.name else []
    hint = f"; did you mean {near[0].with_suffix('')}?" if near else ""
    return refuse(f"names no data: there is no {path.name}.idx and no {path.name}.bin{hint}")


def _read(refuse: _Refuse, prefix: str, index: pathlib.Path, tokens: pathlib.Path) -> IndexFile:
    size = index.stat().st_size
    with index.open("rb") as file:
        start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(_HEADER):
        raise refuse(f"cannot be used: {index.name} is no index of Megatron's")
    _, version, code, sequences, documents = _START.unpack(start)
    if version != 1 or code not in _DTYPES:
        raise refuse(f"cannot be used: {index.name} has version {version} and dtype code {code}")
    if size < _START.size + 12 * sequences + 8 * documents:
        raise refuse(f"is cut short: {index.name} ends before its {sequences} sequences do")
    if not sequences:
        raise refuse("holds no document")
    lengths = np.memmap(index, dtype="<i4", mode="r", offset=_START.size, shape=(sequences,))
    dtype = np.dtype(_DTYPES[code])
    place = _START.size + 12 * sequences - 8
    last = int(np.memmap(index, dtype="<i8", mode="r", offset=place, shape=(1,))[0])
    needed, held = last + int(lengths[-1]) * dtype.itemsize, tokens.stat().st_size
    if held < needed:
        raise refuse(
            f"is cut short: {tokens.name} has {held} bytes of the {needed} that its index names"
        )
    if not needed:
        raise refuse("holds no token")
    return IndexFile(prefix, dtype, lengths)


def digest(prefix: str) -> str:
    """Return what tells this index from another at the same path.

    Megatron's cached sample indices depend on the lengths of the sequences alone. Up to 4 MiB every
    byte counts; of a larger file 64 places do, and both files' sizes. As the file holds running
    sums of the lengths, a length that changes shows in all that follow.

    Args:
        prefix: of files that :func:`read` accepts.
    """
    index = pathlib.Path(f"{prefix}.idx")
    size = index.stat().st_size
    found = hashlib.sha256(f"{size} {os.path.getsize(f'{prefix}.bin')}".encode())
    with index.open("rb") as file:
        if size <= _WHOLE:
            found.update(file.read())
        else:
            for place in range(_BLOCKS):
                file.seek((size - _BLOCK) * place // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.hexdigest()
