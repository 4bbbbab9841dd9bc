"""The one exception for a user's mistake: a sentence that names the flag and the way out."""

import os
import sys


class UserError(ValueError):
    """A mistake in the flags, files or environment the user gave.

    The message is one sentence that names the flag or file and what to do instead. The command
    line entries print it after ``error:`` and exit with code 2, without a traceback.
    """


def report(error: UserError) -> int:
    """Print the sentence once per run, and return the exit code of a user's mistake."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2
