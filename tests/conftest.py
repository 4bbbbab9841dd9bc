"""Shared fixtures: Megatron's process groups on one rank, and small real MoE layers."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_default_moe.cpu import runtime

os.environ.setdefault("OMP_NUM_THREADS", "1")
runtime.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none."""
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        # Not the keywords, which also hold the names of folders.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """Real process groups of a one-rank run (gloo, and NCCL where there is a GPU)."""
    import torch
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def new_layer(one_rank: None) -> Any:
    """Return :func:`building.build_layer`, with process groups to build on."""
    from building import build_layer

    return build_layer


@pytest.fixture(autouse=True)
def no_attention_backend_is_left_behind() -> Iterator[None]:
    """Megatron's GPTModel sets variables of the environment, and refuses a model that differs."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        if name.startswith("NVTE_"):
            del os.environ[name]


@pytest.fixture(autouse=True)
def no_metrics_are_left_behind() -> Iterator[None]:
    """Megatron keeps the metrics of a process by name, with the layers of the first model."""
    yield
    if moe_logging := sys.modules.get("megatron.core.transformer.moe.moe_logging"):
        moe_logging.destroy_moe_metrics_tracker()
