"""Lines through an encoder, in this process or in several others, in their order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from megatron_default_moe.errors import UserError
from megatron_default_moe.text.encoder import Encoded, Encoder, Line

_LINES, _BYTES = 32, 1 << 17
"""A worker takes so many lines at once, or fewer of so many bytes."""
_AHEAD = 4
"""Chunks on their way for each worker."""


def encoded(
    make: Callable[[], Encoder], workers: int, lines: Iterable[bytes]
) -> Generator[Encoded, None, None]:
    """Every line encoded, in order.

    Args:
        make: makes the encoder; pickled for the workers.
        workers: processes; with 1 this one does the work.
        lines: of the input.

    Raises:
        UserError: a worker was ended from outside.
    """
    if workers == 1:
        encode = make()
        for chunk in _chunks(lines):
            yield from encode(chunk)
        return
    # spawn: threads of this process, which libraries start, do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (make,))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in _chunks(lines):
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= _AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers {workers}: a worker ended (is there memory for so many?); take fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _numbered(lines: Iterable[bytes]) -> Iterator[Line]:
    """The lines that hold more than white space."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _chunks(lines: Iterable[bytes]) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    size = 0
    for number, line in _numbered(lines):
        chunk.append((number, line))
        size += len(line)
        if len(chunk) == _LINES or size >= _BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _start_worker(make: Callable[[], Encoder]) -> None:
    global _encoder
    _encoder = make()


def _encode_in_worker(lines: list[Line]) -> list[Encoded]:
    return _encoder(lines)


_encoder: Encoder
