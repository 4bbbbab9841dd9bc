"""Megatron's process groups on one CPU rank: ``start()`` before anything else of Megatron."""

from collections.abc import Callable

import torch

from megatron_default_moe.cpu import replacements, runtime


def start(without: Callable[[replacements.Replacement], bool] = lambda row: False) -> None:
    """Install the CPU runtime, but for the cures that ``without`` picks, and start the groups."""
    replacements.REPLACEMENTS = tuple(row for row in replacements.REPLACEMENTS if not without(row))
    runtime.install()
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
