"""The one exception for a user's mistake: a sentence that names the flag and the way out."""

import contextlib
import os
import sys
import time

HEAD_START = 5.0
"""Seconds rank 0 has to say the sentence: torchrun ends all ranks as soon as one of them ended."""


class UserError(ValueError):
    """A mistake in the flags, files or environment the user gave.

    The message is one sentence that names the flag or file and what to do instead. The command
    line entries print it after ``error:`` and exit with code 2, without a traceback.
    """


class RankError(UserError):
    """A mistake that one rank may meet alone, such as a bad sample: that rank says the sentence."""


def rank() -> int:
    """This process's number in its run, as torchrun gives it; 0 without torchrun."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdigit() else 0


def report(error: UserError) -> int:
    """Print the sentence once per run, and return the exit code of a user's mistake.

    Rank 0 says it at once. The other ranks wait, and are ended meanwhile by torchrun if rank 0 met
    the same mistake; if it did not (a file that one node does not see), the node's first rank says
    it.
    """
    # What it quotes of others may have lines.
    sentence = " ".join(str(error).split())
    if rank() == 0:
        say(f"error: {sentence}")
    elif isinstance(error, RankError):
        say(f"error: rank {rank()}: {sentence}")
    else:
        time.sleep(HEAD_START)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"error: rank {rank()}: {sentence}")
    return 2


def say(line: str) -> None:
    """Write a line to stderr, at once."""
    # Line and end in one call, or what another rank logs comes between the two. Who reads it may be
    # gone: the exit code is left.
    with contextlib.suppress(BrokenPipeError):
        print(f"{line}\n", end="", file=sys.stderr, flush=True)
