"""What is checked of a checkpoint before Megatron loads it."""

import logging
import pathlib
from typing import Any

from megatron_default_moe.config import RouterGradientConfig
from megatron_default_moe.errors import UserError

logger = logging.getLogger(__name__)

VECTORS_KEY = "router.default_vectors"
"""End of the checkpoint keys of default vectors."""


def latest(directory: str | pathlib.Path) -> pathlib.Path | None:
    """Return the folder of a checkpoint directory's latest complete iteration, or None."""
    root = pathlib.Path(directory)
    tracker = root / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    name = tracker.read_text().strip()
    return root / (name if name == "release" else f"iter_{int(name):07d}")


def keys(folder: pathlib.Path) -> set[str] | None:
    """Return the tensor names of a ``torch_dist`` checkpoint, or None for other formats."""
    if not (folder / ".metadata").is_file():
        return None
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def prepare_load(args: Any, options: RouterGradientConfig) -> None:
    """Make sure that the checkpoint about to be loaded has default vectors, or may lack them.

    Args:
        args: Megatron's arguments; ``dist_ckpt_strictness`` is relaxed if the checkpoint is a
            plain Megatron one and the user accepted that.
        options: the package's options.

    Raises:
        UserError: the checkpoint has no default vectors and nobody said it may.
    """
    if not options.uses_default_vectors:
        return
    for directory in (args.load, args.pretrained_checkpoint):
        folder = latest(directory) if directory else None
        names = keys(folder) if folder else None
        if names is None or any(name.endswith(VECTORS_KEY) for name in names):
            continue
        if not options.from_baseline:
            raise UserError(
                f"--load {directory}: the checkpoint {folder} has no default vectors (a plain"
                " Megatron checkpoint?): add --default-vector-from-baseline to start them"
                f" at {options.init}, or train on with --moe-router-gradient topk"
            )
        logger.warning(
            "%s has no default vectors: they start at %s (--default-vector-from-baseline)",
            folder,
            options.init,
        )
        args.dist_ckpt_strictness = "log_unexpected"
