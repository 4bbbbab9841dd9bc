"""How a command ends: a mistake, a checkpoint or a full disk in one line, and the exit code."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

from megatron_default_moe import errors
from megatron_default_moe.errors import UserError


def exit_code(program: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a program, and turn a user's mistake into one line and exit code 2.

    A checkpoint that cannot be read or written is one line too, and exit code 1: nothing was saved
    over the checkpoints before it.
    """
    # Imports nothing of Megatron, which must find the CPU runtime installed.
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        program(argv)
    except UserError as error:
        return errors.report(error)
    except CheckpointException as error:
        if errors.rank() == 0:  # torch tells every rank what all of them met
            print(f"error: {_checkpoint_reason(error)}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        line = f"error: rank {errors.rank()}: {error}{_room_for_checkpoints()}"
        print(line, file=sys.stderr, flush=True)
        return 1
    return 0


def _checkpoint_reason(error: Any) -> str:
    """What the ranks met, each once, in a few words: torch's exception holds one failure a rank."""
    failures = [failure for failure, _ in error.failures.values()]
    met = sorted({f"{type(one).__name__}: {' '.join(str(one).split())[:300]}" for one in failures})
    what = "; ".join(met[:3]) + (f"; and {len(met) - 3} more" if len(met) > 3 else "")
    return f"a checkpoint could not be read or written: {what}{_room_for_checkpoints()}"


def _room_for_checkpoints() -> str:
    """The free space where checkpoints go: torch's writer does not name a full disk."""
    from megatron.training.global_vars import get_args

    try:
        folder = get_args().save
    except AssertionError:  # Megatron has not started yet.
        return ""
    if not folder or not os.path.isdir(folder):
        return ""
    return f" ({shutil.disk_usage(folder).free / 1e9:,.3f} GB free in --save {folder})"
