"""Where documents come from: JSONL, plain or compressed, plain text and Parquet, by the ending.

Every source is read as it is encoded, and gives lines of JSON: of a text file each block between
empty lines, of a Parquet file each row.
"""

import contextlib
import gzip
import json
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_default_moe.errors import UserError

_ROWS = 256
"""Of a Parquet file, at once."""
_PACKED = 1 << 14
"""Bytes of a .zst file, at once."""


def unit(path: Path) -> str:
    """What is counted in the source, for messages."""
    return {".txt": "block", ".parquet": "row"}.get(_endings(path)[0], "line")


@contextlib.contextmanager
def lines(path: Path, keys: list[str]) -> Iterator[Iterator[bytes]]:
    """Open a source; its lines of JSON.

    Args:
        path: ``.parquet``, ``.txt``, ``.txt.gz``, ``.txt.zst``, and anything else as JSONL, which
            may be ``.gz`` or ``.zst``.
        keys: what is taken; plain text has only the first.

    Raises:
        UserError: a library is missing; the file is damaged; text has no second key.
        OSError: the file cannot be opened.
    """
    kind, packed = _endings(path)
    if kind == ".parquet":
        with contextlib.closing(_whole(path, _parquet(path, keys))) as rows:
            yield rows
        return
    if kind == ".txt" and len(keys) > 1:
        raise UserError(f"--json-keys {' '.join(keys)}: {path} is plain text, which has one key")
    with _opened(path, packed) as file:
        read = _unpacked(path, file) if packed == ".zst" else iter(file)
        found = _blocks(read, keys[0]) if kind == ".txt" else read
        with contextlib.closing(_whole(path, found)) as checked:
            yield checked


def _endings(path: Path) -> tuple[str, str]:
    """The kind of file, and how it is compressed."""
    packed = path.suffix if path.suffix in (".gz", ".zst") else ""
    return (path.with_suffix("") if packed else path).suffix, packed


def _opened(path: Path, packed: str) -> Any:
    return gzip.open(path, "rb") if packed == ".gz" else path.open("rb")


def _unpacked(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a .zst file of any number of frames.

    zstandard's own file object ends in silence with a file that was cut.
    """
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"--input {path} needs zstandard: pip install zstandard, or unpack the file"
        ) from None
    rest = b""
    frame: Any = None
    while chunk := file.read(_PACKED):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            first, *others = frame.decompress(chunk).split(b"\n")
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            rest += first
            for line in others:
                yield rest + b"\n"
                rest = line
    if frame is not None:
        raise EOFError("it ends within a frame")
    if rest:
        yield rest


def _whole(path: Path, found: Iterator[bytes]) -> Generator[bytes, None, None]:
    """The same lines; damage in one sentence."""
    try:
        yield from found
    except UserError:
        raise
    except Exception as error:
        known = isinstance(error, (EOFError, OSError, zlib.error))
        if not known and type(error).__module__.split(".")[0] not in ("pyarrow", "zstandard"):
            raise
        raise UserError(f"--input {path} cannot be read to its end: {error}") from error


def _blocks(lines: Iterator[bytes], key: str) -> Iterator[bytes]:
    """Each run of lines that are not empty."""
    block: list[bytes] = []
    for number, line in enumerate(lines):
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            block.append(line)
        elif block:
            yield _record(block, key)
            block = []
    if block:
        yield _record(block, key)


def _record(block: list[bytes], key: str) -> bytes:
    # What is not UTF-8 becomes half a character, which the encoder refuses by its number.
    text = b"".join(block).rstrip(b"\r\n").decode(errors="surrogateescape")
    return json.dumps({key: text}).encode()


def _parquet(path: Path, keys: list[str]) -> Iterator[bytes]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"--input {path} needs pyarrow: pip install pyarrow, or write the rows as JSONL"
        ) from None
    with parquet.ParquetFile(path) as file:
        missing = [key for key in keys if key not in file.schema_arrow.names]
        if missing:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"--json-keys: {path} has no column {missing[0]!r}; it has {names}")
        for batch in file.iter_batches(_ROWS, columns=keys):
            for row in batch.to_pylist():
                # A date or bytes are no text: null, which the encoder refuses by the row.
                yield json.dumps(row, default=lambda _: None).encode()
