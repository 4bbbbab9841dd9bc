"""A rank's children end with it, also when it is killed.

A rank that is ended by SIGKILL (the kernel out of memory, a scheduler, torchrun) ends none of its
children: Megatron's checkpoint writer and the manager of its results wait for work for ever, and
every restart leaves another pair of them behind. So the child sees to it: each process that
Python's ``multiprocessing`` starts (fork, spawn and forkserver alike, and what such a child starts
itself) is killed when the process that started it is gone.

Python's resource tracker and fork server end by themselves, and clean up, once no such process is
left. Programs (``subprocess``) and what a library makes a daemon of with ``os.fork`` are not
touched: nvidia-resiliency-ext's monitor, for one, has to outlive its rank.
"""

import ctypes
import functools
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; the constant is in no module of Python."""

_STARTER = "_megatron_default_moe_starter"


class _Starter:
    """Travels to the child inside of the process object: who started it.

    To be unpickled is the first thing of ours that happens in a child that was not forked from
    here; that covers the child, before Python starts the child's work.
    """

    def __init__(self, main_thread: bool) -> None:
        self.main_thread = main_thread

    def __reduce__(self) -> tuple[Any, ...]:
        return _starter_in_a_new_interpreter, (self.main_thread,)


def _starter_in_a_new_interpreter(main_thread: bool) -> _Starter:
    cover_this_process()
    return _Starter(main_thread)


def cover_this_process() -> None:
    """Make the processes that this one starts from now on end with it (once)."""
    for name, wrap in (("start", with_starter_named), ("_bootstrap", with_parent_watched)):
        present = getattr(BaseProcess, name)
        if not hasattr(present, "__wrapped__"):
            setattr(BaseProcess, name, wrap(present))


def with_starter_named(start: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``multiprocessing.Process.start``: tell the child which kind of thread started it."""

    @functools.wraps(start)
    def started(self: BaseProcess) -> None:
        main_thread = threading.current_thread() is threading.main_thread()
        setattr(self, _STARTER, _Starter(main_thread))
        start(self)

    return started


def with_parent_watched(bootstrap: Callable[..., int]) -> Callable[..., int]:
    """Wrap ``multiprocessing.Process._bootstrap``, the first thing that every child runs."""

    @functools.wraps(bootstrap)
    def watched(self: Any, parent_sentinel: int | None = None) -> int:
        starter = getattr(self, _STARTER, None)
        _end_with(self._parent_pid, starter is not None and starter.main_thread, parent_sentinel)
        return bootstrap(self, parent_sentinel)

    return watched


def _end_with(parent: int, from_main_thread: bool, sentinel: int | None) -> None:
    """Have this process killed when its parent is gone.

    Args:
        parent: process number of the parent; a fork server's child is not its child by the kernel.
        from_main_thread: whether the parent's main thread started this process.
        sentinel: a pipe whose other end only the parent (and what it forked later) holds.
    """
    if sys.platform == "linux" and from_main_thread and os.getppid() == parent:
        # By the kernel, whatever this process is doing. It goes by the thread that started it,
        # not by the process: started from a thread that has ended, the child would be killed.
        taken = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0
        if taken and os.getppid() == parent:
            return
    if sentinel is not None:
        threading.Thread(target=_kill_at, args=(sentinel,), daemon=True).start()


def _kill_at(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
