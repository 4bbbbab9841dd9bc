"""What is checked of a checkpoint before Megatron loads it."""

import logging
import pathlib
from typing import Any

from megatron_default_moe.config import RouterGradientConfig
from megatron_default_moe.errors import UserError

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the latest complete iteration."""

VECTORS_KEY = "router.default_vectors"
"""End of the checkpoint keys of default vectors."""


def folder_of(directory: str | pathlib.Path, step: int | None = None) -> pathlib.Path | None:
    """Return the folder of a checkpoint directory that Megatron would load, or None.

    Args:
        directory: what ``--load`` names.
        step: the iteration ``--ckpt-step`` asks for; None is the latest complete one.

    Raises:
        UserError: the file that names the latest iteration is broken.
    """
    root = pathlib.Path(directory)
    if step is not None:
        return root / f"iter_{step:07d}"
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    name = tracker.read_text(errors="replace").strip()
    if name == "release":
        return root / name
    if not name.isdecimal():
        found = sorted(path.name for path in root.glob("iter_*"))
        last = f"; the newest folder there is {found[-1]}" if found else ""
        raise UserError(
            f"{tracker} should hold the number of the latest complete iteration, not {name!r}:"
            f" write it there, or choose one with --ckpt-step{last}"
        )
    return root / f"iter_{int(name):07d}"


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
    flag, folder = _loaded_folder(args)
    names = keys(folder) if folder else None
    if names is None or any(name.endswith(VECTORS_KEY) for name in names):
        return
    if not options.from_baseline:
        raise UserError(
            f"{flag}: the checkpoint {folder} has no default vectors (a plain Megatron"
            " checkpoint?): add --default-vector-from-baseline to start them at"
            f" {options.init}, or train on with --moe-router-gradient topk"
        )
    logger.warning(
        "%s has no default vectors: they start at %s (--default-vector-from-baseline)",
        folder,
        options.init,
    )
    args.dist_ckpt_strictness = "log_unexpected"


def _loaded_folder(args: Any) -> tuple[str, pathlib.Path | None]:
    """The flag and folder Megatron will load from: --pretrained-checkpoint only for a new run."""
    if args.load:
        folder = folder_of(args.load, args.ckpt_step)
        if folder is not None:
            return f"--load {args.load}", folder
    pretrained = args.pretrained_checkpoint
    if not pretrained:
        return "", None
    return f"--pretrained-checkpoint {pretrained}", folder_of(pretrained)
