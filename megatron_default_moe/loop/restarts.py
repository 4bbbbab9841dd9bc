"""Where the ranks of a run meet: with the same kind of device, and anew after a restart.

Since torch 2.13 torchrun keeps one TCPStore for all restarts of a run, and hands it to the workers.
What a killed process left there (addresses, NCCL ids) is then taken for its successor's, and the
restart hangs in ``init_process_group`` until its timeout. On one node every worker knows the number
of the restart, so the keys can be told apart; on several, the nodes may count differently.
"""

import datetime
import logging
import os
from collections.abc import Mapping
from typing import Any

from megatron_default_moe.cpu import runtime
from megatron_default_moe.machine import ranks

logger = logging.getLogger(__name__)

WAY_OUT = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
"""Environment of torchrun with which it makes a new store for every restart."""


def meeting_store(args: Any) -> Any:
    """Return a store for ``init_process_group``, over which the ranks have agreed on their device.

    Args:
        args: Megatron's arguments.

    Returns:
        The store, or None for a single rank.

    Raises:
        UserError: some ranks have a GPU and others have none, or nobody said where to meet.
    """
    from torch.distributed import is_initialized, rendezvous  # type: ignore[attr-defined]

    store = store_of_this_attempt()
    if args.world_size == 1 or args.fake_process_group or is_initialized():
        return store
    if store is None:
        # As init_process_group does without a store.
        ranks.refuse_no_meeting_place(os.environ)
        limit = datetime.timedelta(minutes=args.distributed_timeout_minutes)
        store, _, _ = next(rendezvous("env://", timeout=limit))
    ranks.agree_on_device(store, args.rank, args.world_size, runtime.needed())
    return store


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
