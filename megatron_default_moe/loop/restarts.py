"""Restarts under torchrun: a store without the keys of the processes that were killed.

Since torch 2.13 torchrun keeps one TCPStore for all restarts of a run, and hands it to the workers.
What a killed process left there (addresses, NCCL ids) is then taken for its successor's, and the
restart hangs in ``init_process_group`` until its timeout. On one node every worker knows the number
of the restart, so the keys can be told apart; on several, the nodes may count differently.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

WAY_OUT = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
"""Environment of torchrun with which it makes a new store for every restart."""


def store_of_this_attempt(environment: Mapping[str, str] = os.environ) -> Any:
    """Return a store for ``init_process_group``, or None where torch's own choice is right.

    Args:
        environment: the worker's environment, as torchrun makes it.
    """
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not restarts:
        return None
    if environment.get("GROUP_WORLD_SIZE") != "1":
        logger.warning(
            "restarted by torchrun, which shares one store between restarts: if this hangs, start"
            " torchrun on every node with %s",
            WAY_OUT,
        )
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    shared = TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        world_size=int(environment["WORLD_SIZE"]),
        is_master=False,
    )
    return PrefixStore(f"attempt {restarts}", shared)
