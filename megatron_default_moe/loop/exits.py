"""How a command ends: its exit code, and one line for whatever ended it.

A user's mistake is a `UserError` and exit code 2. Everything else that is raised is exit code 1:
one line with what it was and where, the traceback in a file, and on the screen with
``--traceback``. Nothing is swallowed: if no folder takes the file, it goes to the screen.
"""

import contextlib
import errno
import os
import pathlib
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


def exit_code(program: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a program; return 0, 2 for a user's mistake, or 1 for anything else that was raised.

    ``SystemExit`` and ``KeyboardInterrupt`` go on.
    """
    # Imports nothing of Megatron, which must find the CPU runtime installed.
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        program(argv)
    except UserError as error:
        return errors.report(error)
    except CheckpointException as error:  # no Exception, to Python
        # torch tells every rank what all of them met.
        _end(error, _checkpoint_reason(error), argv, said=errors.rank() == 0)
        return 1
    except Exception as error:
        if any(words in str(error) for words in PEER_IS_GONE):
            # Another rank has more to say; torchrun ends this one meanwhile.
            time.sleep(errors.HEAD_START)
        _end(error, _reason(error), argv)
        return 1
    return 0


def _end(error: BaseException, reason: str, argv: list[str], said: bool = True) -> None:
    """Write the traceback to a file, and say why and where this process ends."""
    text = "".join(_formatted(error))
    file = _write(text)
    # Megatron's arguments are parsed from sys.argv, where those of a config file are, too.
    if file is None or FLAG in argv or FLAG in sys.argv:
        print(text, file=sys.stderr, flush=True)
    if said:
        rank = f"rank {errors.rank()}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        where = (
            f"the traceback is in {file} ({FLAG} prints it)" if file else "the traceback is above"
        )
        print(f"error: {rank}{reason}; {where}", file=sys.stderr, flush=True)


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


def _reason(error: Exception) -> str:
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
