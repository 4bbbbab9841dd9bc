"""A process that starts children in every way and waits; ``test_end_of_ranks.py`` kills it.

Prints, as JSON, the process number of each child by the way it was started, and of each child's own
child; then, for every line it reads, which children are alive.
"""

import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from typing import Any

from megatron_default_moe.loop import children

WAYS = tuple(
    f"{method} from {thread}"
    for method, thread in itertools.product(
        ("fork", "spawn", "forkserver"), ("the main thread", "a thread")
    )
)


def wait(method: str, numbers: "multiprocessing.Queue[int]", generations: int) -> None:
    """A child's work: to start one of its own, and to wait for ever."""
    if generations:
        context: Any = multiprocessing.get_context(method)
        context.Process(target=wait, args=(method, numbers, generations - 1)).start()
    else:
        numbers.put(os.getpid())
    time.sleep(1000)


def start(way: str) -> tuple[Any, list[int]]:
    """Start a child, and wait until it has one of its own."""
    method, _, thread = way.partition(" from ")
    context: Any = multiprocessing.get_context(method)
    numbers = context.Queue()
    child = context.Process(target=wait, args=(method, numbers, 1))
    pids: list[int] = []

    def begin() -> None:
        child.start()
        pids.extend([child.pid, numbers.get(timeout=60)])

    if thread == "a thread":
        # It ends after the child has begun.
        starter = threading.Thread(target=begin)
        starter.start()
        starter.join()
    else:
        begin()
    return child, pids


def main() -> None:
    """Start them, say who they are, and answer until somebody kills this."""
    if "uncovered" not in sys.argv:
        children.cover_this_process()
    started = {way: start(way) for way in WAYS}
    manager = multiprocessing.get_context("spawn").Manager()
    pids = {way: numbers for way, (_, numbers) in started.items()}
    pids["a manager"] = [manager._process.pid]  # type: ignore[attr-defined]
    print(json.dumps(pids), flush=True)
    for _ in sys.stdin:
        print(json.dumps([way for way in WAYS if started[way][0].is_alive()]), flush=True)


if __name__ == "__main__":
    main()
