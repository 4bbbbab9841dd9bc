"""How a command ends: its exit code, and one line for whatever ended it. Every command's ``main``.

A user's mistake is a `UserError` and exit code 2; so is what the system says of a path on the
command line. Ctrl-C is one line and 130. A reader of the output that has gone is no line at all and
141, as of a program that the system ends for it. Everything else that is raised is exit code 1: one
line with what it was and where, the traceback in a file, and on the screen with ``--traceback``.
Nothing is swallowed: if no folder takes the file, it goes to the screen.
"""

import argparse
import contextlib
import errno
import os
import pathlib
import select
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from megatron_default_moe import errors
from megatron_default_moe.errors import UserError

FLAG = "--traceback"
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo raises on a rank whose peer has ended."""

INTERRUPTED = 130
READER_GONE = 141
"""As a shell names the end by SIGINT and by SIGPIPE."""

_OF_A_PATH = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST),
)
"""What a wrong path on the command line leads to."""

Program = Callable[[list[str]], int | None]
"""Runs a command line; returns an exit code, None for 0."""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--traceback``, which this module looks for on the command line."""
    parser.add_argument(
        FLAG,
        action="store_true",
        help="If it ends with an error, print the whole traceback, which is also in a file.",
    )


def exit_code(program: Program, argv: list[str]) -> int:
    """Run a program; return its exit code, or that of whatever ended it.

    ``SystemExit`` goes on.
    """
    try:
        try:
            code = program(argv) or 0
        except SystemExit:
            sys.stdout.flush()
            raise
        # Here, where it can be said, and not at the interpreter's end.
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        code = _said(error, argv)
        _drop_what_cannot_be_written()
    return code


def _said(error: BaseException, argv: list[str]) -> int:
    """Say in one line what ended the program, and return the exit code."""
    if _reader_is_gone(error):
        return READER_GONE
    if isinstance(error, OSError) and (mistake := _mistaken_path(error, argv)):
        error = mistake
    if isinstance(error, UserError):
        return errors.report(error)
    if isinstance(error, KeyboardInterrupt):
        if errors.rank() == 0:
            errors.say("interrupted")
        return INTERRUPTED
    if _is_torchs(error):
        # torch tells every rank what all of them met.
        _end(error, _checkpoint_reason(error), argv, said=errors.rank() == 0)
        return 1
    if not isinstance(error, Exception):
        raise error
    if any(words in str(error) for words in PEER_IS_GONE):
        # Another rank has more to say; torchrun ends this one meanwhile.
        time.sleep(errors.HEAD_START)
    _end(error, _reason(error), argv)
    return 1


def _is_torchs(error: BaseException) -> bool:
    """Whether it is torch's exception of a checkpoint, which is no Exception to Python."""
    # Not imported for this: Megatron must find the CPU runtime installed, and some commands need
    # no torch.
    module = sys.modules.get("torch.distributed.checkpoint.api")
    return module is not None and isinstance(error, module.CheckpointException)


def _reader_is_gone(error: BaseException) -> bool:
    """Whether it is about the reader of this process's output, as in ``... | head``."""
    if not isinstance(error, BrokenPipeError):
        return False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                return True
    return False


def _drop_what_cannot_be_written() -> None:
    """Leave nothing to the interpreter's end, which would try again and end with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _mistaken_path(error: OSError, argv: list[str]) -> UserError | None:
    """The sentence about a path of the command line that the system refuses; None for another.

    Only before Megatron has its arguments: later, what happens to a path is no mistake of its name.
    """
    if error.errno not in _OF_A_PATH or not error.filename or _megatrons_args() is not None:
        return None
    refused = os.path.abspath(os.fsdecode(error.filename))
    for place, word in enumerate(argv):
        flag, is_one, value = word.partition("=")
        if not (is_one and word.startswith("--")):
            flag, value = argv[place - 1] if place else "", word
        if not value or value.startswith("-"):
            continue
        given = os.path.abspath(value)
        # What is derived from a path or prefix begins with it; or a folder above it is refused.
        if refused.startswith(given) or given.startswith(f"{refused}/"):
            named = f"{flag} {value}" if flag.startswith("--") else value
            also = "" if refused == given else f" ({error.filename})"
            return UserError(f"{named}: {error.strerror}{also}")
    return None


def _end(error: BaseException, reason: str, argv: list[str], said: bool = True) -> None:
    """Write the traceback to a file, and say why and where this process ends."""
    text = "".join(_formatted(error))
    file = _write(text)
    # Megatron's arguments are parsed from sys.argv, where those of a config file are, too.
    if file is None or FLAG in argv or FLAG in sys.argv:
        errors.say(text)
    if said:
        rank = f"rank {errors.rank()}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        where = (
            f"the traceback is in {file} ({FLAG} prints it)" if file else "the traceback is above"
        )
        errors.say(f"error: {rank}{reason}; {where}")


def _formatted(error: BaseException) -> Iterator[str]:
    yield from traceback.format_exception(error)
    for rank, (met, stack) in getattr(error, "failures", {}).items():
        yield f"\nOn rank {rank}:\n"
        yield from stack.format() if stack else ()
        yield from traceback.format_exception_only(met)


def _write(text: str) -> pathlib.Path | None:
    """Add the text to a file beside the log, or where else there is room; None: nowhere."""
    heading = time.strftime("%Y-%m-%d %H:%M:%S ") + " ".join(sys.argv)
    for folder in _folders():
        file = folder / f"traceback.rank{errors.rank()}.txt"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with file.open("a") as log:
                log.write(f"{heading}\n{text}\n")
            return file
    return None


def _folders() -> Iterator[pathlib.Path]:
    """Where the log goes; then where runs go; then anywhere. Never a checkpoint's folder."""
    log = getattr(_megatrons_args(), "tensorboard_dir", None)
    if log and "://" not in log:
        yield pathlib.Path(log)
    yield pathlib.Path("runs")
    yield pathlib.Path(tempfile.gettempdir())


def _reason(error: BaseException) -> str:
    room = ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = _room_for_checkpoints()
    return f"{_in_a_line(error)}{room}{_place(traceback.extract_tb(error.__traceback__))}"


def _checkpoint_reason(error: Any) -> str:
    """What the ranks met, each once, in a few words: torch's exception holds one failure a rank."""
    failures = error.failures.values()
    met = sorted({f"{_in_a_line(one)}{_place(stack)}" for one, stack in failures})
    what = "; ".join(met[:3]) + (f"; and {len(met) - 3} more" if len(met) > 3 else "")
    return f"a checkpoint could not be read or written: {what}{_room_for_checkpoints()}"


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def _place(stack: Any) -> str:
    """The innermost line of a stack, with its file from the package on."""
    if not stack:
        return ""
    frame = stack[-1]
    parts = pathlib.Path(frame.filename).parts
    if "site-packages" in parts:
        parts = parts[parts.index("site-packages") + 1 :]
    return f" ({'/'.join(parts[-4:])}, line {frame.lineno}, in {frame.name})"


def _megatrons_args() -> Any:
    """Megatron's arguments, or None before it has started."""
    if "megatron.training.global_vars" not in sys.modules:
        return None
    from megatron.training.global_vars import get_args

    try:
        return get_args()
    except AssertionError:
        return None


def _room_for_checkpoints() -> str:
    """The free space where checkpoints go: torch's writer does not name a full disk."""
    folder = getattr(_megatrons_args(), "save", None)
    if not folder or not os.path.isdir(folder):
        return ""
    return f" ({shutil.disk_usage(folder).free / 1e9:,.3f} GB free in --save {folder})"
