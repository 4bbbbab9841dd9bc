"""What is checked of a checkpoint before Megatron loads it, so that nothing fails half-way.

A damaged checkpoint, one of another model, and one without default vectors are each refused in one
sentence before any work is done; nothing is overwritten.
"""

import dataclasses
import logging
import os
import pathlib
from typing import Any

from megatron_default_moe import checkpoint_files
from megatron_default_moe.config import RouterGradientConfig
from megatron_default_moe.errors import UserError

logger = logging.getLogger(__name__)

VECTORS_KEY = "router.default_vectors"
"""End of the checkpoint keys of default vectors."""

SHAPE_ARGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "mtp_num_layers",
)
"""Megatron's arguments that decide the shapes of the model, and so must be those of the checkpoint
(Megatron's own check knows three of them)."""

LAYOUT_ARGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
FREE_OPTIMIZER_FORMATS = ("fully_reshardable", "fully_sharded_model_space")
"""Formats of the distributed optimizer in which these sizes may change."""


def prepare_load(args: Any, options: RouterGradientConfig) -> RouterGradientConfig:
    """Make sure that the checkpoint about to be loaded is whole, of this model, and has vectors.

    The files are looked at by rank 0 alone: thousands of ranks asking for every file's length would
    be felt by a shared file system.

    Args:
        args: Megatron's arguments.
        options: the package's options.

    Returns:
        The options, with ``from_baseline`` only if a checkpoint without default vectors will be
        loaded: restarting the same command from its own checkpoint loads the vectors.

    Raises:
        UserError: the checkpoint cannot be loaded, and why; or it has no default vectors and nobody
            said it may.
    """
    flag, folder = _loaded_folder(args)
    if folder is None:
        return dataclasses.replace(options, from_baseline=False)
    if os.environ.get("RANK", "0") == "0":
        _refuse_damage(flag, folder)
        _refuse_another_model(args, flag, folder)
    names = checkpoint_files.keys(folder)
    has_vectors = names is None or any(name.endswith(VECTORS_KEY) for name in names)
    if not options.uses_default_vectors:
        if names is not None and has_vectors:
            logger.warning(
                "%s has default vectors, which --moe-router-gradient topk leaves out: the model"
                " loses what they carried, and so do the checkpoints it saves",
                folder,
            )
        return options
    if has_vectors:
        # Formats other than torch_dist cannot be looked into: there the user's word counts.
        return dataclasses.replace(options, from_baseline=options.from_baseline and names is None)
    if not options.from_baseline:
        raise UserError(
            f"{flag}: the checkpoint {folder} has no default vectors (a plain Megatron"
            " checkpoint?): add --default-vector-from-baseline to start them at"
            f" {options.init}, fill them first with tools/calibrate.py, or train on with"
            " --moe-router-gradient topk"
        )
    logger.warning(
        "%s has no default vectors: they start at %s (--default-vector-from-baseline)",
        folder,
        options.init,
    )
    return options


def _loaded_folder(args: Any) -> tuple[str, pathlib.Path | None]:
    """The flag and folder Megatron will load from: --pretrained-checkpoint only for a new run."""
    if args.load:
        folder = checkpoint_files.folder_of(args.load, args.ckpt_step)
        if folder is not None:
            return f"--load {args.load}", folder
    pretrained = args.pretrained_checkpoint
    if not pretrained:
        return "", None
    return f"--pretrained-checkpoint {pretrained}", checkpoint_files.folder_of(pretrained)


def _refuse_damage(flag: str, folder: pathlib.Path) -> None:
    found = checkpoint_files.damage(folder)
    if found:
        raise UserError(f"{flag}: {found}; {way_out(flag, folder)}")


def way_out(flag: str, folder: pathlib.Path) -> str:
    """Say which other checkpoint of the directory can be loaded instead, and how."""
    step = checkpoint_files.newest_complete(folder.parent, besides=folder)
    if step is None:
        return f"no other complete checkpoint is in {folder.parent}: restore it, or start anew"
    if flag.startswith("--load"):
        return f"the newest other complete checkpoint is of step {step}: add --ckpt-step {step}"
    return (
        f"the newest other complete checkpoint is of step {step}: write {step} into"
        f" {folder.parent / checkpoint_files.TRACKER}"
    )


def _refuse_another_model(args: Any, flag: str, folder: pathlib.Path) -> None:
    if not (folder / checkpoint_files.INDEX).is_file():
        return
    try:
        state = checkpoint_files.common_state(folder)
    except Exception as error:
        raise UserError(
            f"{flag}: the arguments in {folder} cannot be read ({type(error).__name__});"
            f" {way_out(flag, folder)}"
        ) from error
    saved = state.get("args")
    for name in SHAPE_ARGS:
        before, now = getattr(saved, name, None), getattr(args, name, None)
        if hasattr(saved, name) and before != now:
            raise UserError(
                f"--{name.replace('_', '-')} is {now}, but the checkpoint {folder} was saved with"
                f" {before}: give that value (or --use-checkpoint-args), or start a new run with"
                " another --load and --save"
            )
    if saved is not None and not (args.finetune or args.no_load_optim or saved.no_save_optim):
        _refuse_another_optimizer(args, saved, state.get("content_metadata") or {}, folder)
        _refuse_another_schedule(args, saved, folder)


def _refuse_another_optimizer(
    args: Any, saved: Any, metadata: dict[str, Any], folder: pathlib.Path
) -> None:
    """Refuse optimizer state that Megatron cannot bring into the form this run needs."""
    if saved.use_distributed_optimizer != args.use_distributed_optimizer:
        was, way = ("with", "add it") if saved.use_distributed_optimizer else ("without", "drop it")
        raise UserError(
            f"the checkpoint {folder} was saved {was} --use-distributed-optimizer: {way}, or start"
            " with a new optimizer (--no-load-optim)"
        )
    kind = metadata.get("distrib_optim_sharding_type")
    if not args.use_distributed_optimizer or kind in FREE_OPTIMIZER_FORMATS:
        return
    for name in LAYOUT_ARGS:
        before, now = getattr(saved, name, None), getattr(args, name, None)
        if before != now:
            raise UserError(
                f"--{name.replace('_', '-')} is {now}, but the optimizer state in {folder} can"
                f" only be loaded with {before}, the value it was saved with: save it with"
                " --dist-ckpt-optim-fully-reshardable first, or start with a new optimizer"
                " (--no-load-optim)"
            )


def _refuse_another_schedule(args: Any, saved: Any, folder: pathlib.Path) -> None:
    """Refuse what Megatron's learning-rate schedule would end in an assertion for."""
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    before, now = _schedule(saved), _schedule(args)
    for flag, value in now.items():
        if before[flag] != value:
            raise UserError(
                f"{flag} is {value}, but the checkpoint {folder} was saved with {before[flag]} and"
                " continues its schedule of the learning rate: add --override-opt_param-scheduler"
                " to take the new one, or --use-checkpoint-opt_param-scheduler to keep the old"
            )


def _schedule(args: Any) -> dict[str, Any]:
    """What Megatron compares, by flag. Without a length of the decay it takes the run's."""
    return {
        "--global-batch-size": args.global_batch_size,
        "--min-lr": args.min_lr,
        "--lr-decay-style": args.lr_decay_style,
        "--train-iters": args.lr_decay_iters or args.train_iters,
        "--train-samples": args.lr_decay_samples or args.train_samples,
    }
