"""Enter the training command inside of a test's process, and leave no trace of it."""

import os
import sys
from typing import Any

import pytest


def prepare(monkeypatch: pytest.MonkeyPatch, line: str) -> tuple[Any, Any]:
    """Megatron's arguments and the options of a command line, as the entry makes them.

    Environment, command line and Megatron's global variables are what they were after the test.
    """
    from megatron.core import num_microbatches_calculator
    from megatron.training import global_vars

    from megatron_default_moe.loop import command_line

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    for module in (global_vars, num_microbatches_calculator):
        for name in [name for name in vars(module) if name.startswith("_GLOBAL_")]:
            monkeypatch.setattr(module, name, None)
    return command_line.prepare(line.split())
