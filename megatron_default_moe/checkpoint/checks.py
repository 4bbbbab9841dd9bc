"""What is checked of a checkpoint before Megatron loads it, so that nothing fails half-way.

A damaged checkpoint, one of another model, and one without default vectors are each refused in one
sentence before any work is done; nothing is overwritten. What Megatron would load is not refused:
every comparison here is one that Megatron's own loading ends in an exception for.
"""

import dataclasses
import logging
import os
import pathlib
import pickle
import tempfile
from typing import Any

from megatron_default_moe.checkpoint import on_disk
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.config import FADE_IN, RouterGradientConfig

logger = logging.getLogger(__name__)

VECTORS_KEY = "router.default_vectors"
"""End of the checkpoint keys of default vectors."""

STEPS_KEY = "router.default_vector_steps"
"""End of the checkpoint keys of a fade-in's count of steps."""

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


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint that Megatron will load."""

    flag: str
    """The flag and its value, which messages begin with."""
    folder: pathlib.Path
    pretrained: bool = False
    """Named by --pretrained-checkpoint: weights only, as with --finetune."""


def prepare_load(args: Any, options: RouterGradientConfig) -> RouterGradientConfig:
    """Make sure that the checkpoint about to be loaded is whole, of this model, and has vectors.

    Rank 0 looks at the files: thousands of ranks asking for every file's length would be felt by a
    shared file system. The others only read what there is, where their model depends on it.

    Args:
        args: Megatron's arguments.
        options: the package's options.

    Returns:
        The options, with ``from_baseline`` only if a checkpoint without default vectors will be
        loaded: restarting the same command from its own checkpoint loads the vectors. ``fade_in``
        is what the user chose, else what the checkpoint's run did, else for a checkpoint without
        vectors ``FADE_IN``.

    Raises:
        UserError: the checkpoint cannot be loaded, and why; or it has no default vectors and nobody
            said it may.
    """
    if any("://" in str(path or "") for path in (args.load, args.pretrained_checkpoint)):
        # Object storage cannot be looked into here: the user's word counts.
        return _gently(args, options) if options.from_baseline else options
    if args.non_persistent_ckpt_type == "local" and options.from_baseline:
        raise UserError(
            "--default-vector-from-baseline cannot see whether a checkpoint on local disks"
            " (--non-persistent-ckpt-type local) has vectors: save a persistent one first"
        )
    source = loaded_from(args)
    loads_vectors = dataclasses.replace(options, from_baseline=False)
    if source is None:
        return loads_vectors
    if os.environ.get("RANK", "0") == "0":
        _refuse_damage(args, source)
        _refuse_another_run(args, source)
    elif not options.uses_default_vectors:
        return loads_vectors
    names = _tensor_names(source)
    return _fading_in(args, _without_vectors(args, options, source, names), source, names)


def prepare_save(args: Any) -> None:
    """Make sure now that checkpoints can be written: Megatron finds out at the first of them.

    Args:
        args: Megatron's arguments.

    Raises:
        UserError: the folder of --save cannot be made or written to.
    """
    if not args.save or "://" in str(args.save) or os.environ.get("RANK", "0") != "0":
        return
    try:
        os.makedirs(args.save, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.save):
            pass
    except OSError as error:
        raise UserError(
            f"--save {args.save}: no checkpoint can be written there ({error.strerror}): make the"
            " folder writable for the user that trains, or name another"
        ) from error


def _tensor_names(source: Source) -> set[str] | None:
    """What is in the checkpoint; None where that cannot be seen (formats other than torch_dist)."""
    try:
        return on_disk.keys(source.folder)
    except Exception:
        if os.environ.get("RANK", "0") == "0":
            raise
        return None  # Rank 0 refuses it in a sentence.


def _without_vectors(
    args: Any, options: RouterGradientConfig, source: Source, names: set[str] | None
) -> RouterGradientConfig:
    """Refuse or accept a checkpoint without default vectors."""
    has_vectors = names is None or any(name.endswith(VECTORS_KEY) for name in names)
    if not options.uses_default_vectors:
        if names is not None and has_vectors:
            _warn(
                f"{source.folder} has default vectors, which --moe-router-gradient topk leaves out:"
                " the model loses what they carried, and so do the checkpoints it saves"
            )
        return options
    if has_vectors:
        # Formats other than torch_dist cannot be looked into: there the user's word counts.
        return dataclasses.replace(options, from_baseline=options.from_baseline and names is None)
    if not options.from_baseline:
        raise UserError(
            f"{source.flag}: the checkpoint {source.folder} has no default vectors (a plain"
            " Megatron checkpoint?): add --default-vector-from-baseline to start them at"
            f" {options.init}, fill them first with default-moe calibrate, or train on with"
            " --moe-router-gradient topk"
        )
    options = _gently(args, options)
    gently = f" and come into the forward over {options.fade_in} steps (--default-vector-fade-in)"
    _warn(
        f"{source.folder} has no default vectors: they start at {options.init}"
        f" (--default-vector-from-baseline){gently if options.fade_in else ''}"
    )
    return options


def _fading_in(
    args: Any, options: RouterGradientConfig, source: Source, names: set[str] | None
) -> RouterGradientConfig:
    """Decide over how many steps the vectors come into the forward: see :func:`prepare_load`."""
    if options.from_baseline:
        return _gently(args, options)
    if names is None or not (options.uses_default_vectors and options.in_forward):
        return options
    begun = any(name.endswith(STEPS_KEY) for name in names)
    if options.fade_in and not begun:
        _warn(
            f"{source.folder} counts no steps of a fade-in: the default vectors leave the forward"
            f" and come back over {options.fade_in} steps (--default-vector-fade-in)"
        )
        return dataclasses.replace(options, fade_in_begins=True)
    if begun and not _given(args):
        saved = on_disk.common_state(source.folder).get("args")
        fade_in = getattr(saved, "default_vector_fade_in", None)
        if not fade_in:
            raise UserError(
                f"{source.flag}: the checkpoint {source.folder} was saved during a fade-in whose"
                " length it does not say: give --default-vector-fade-in"
            )
        return dataclasses.replace(options, fade_in=fade_in)
    return options


def _given(args: Any) -> bool:
    return getattr(args, "default_vector_fade_in", None) is not None


def _gently(args: Any, options: RouterGradientConfig) -> RouterGradientConfig:
    """Let the vectors into a model that was trained without them step by step."""
    if _given(args) or not (options.uses_default_vectors and options.in_forward):
        return options
    return dataclasses.replace(options, fade_in=FADE_IN)


def _warn(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(sentence)


def loaded_from(args: Any) -> Source | None:
    """Return the checkpoint Megatron will load, or None (see its ``load_checkpoint``).

    Raises:
        UserError: the file that names the latest iteration is broken.
    """
    step = args.ckpt_step or None
    folder = on_disk.folder_of(args.load, step) if args.load else None
    if args.non_persistent_ckpt_type == "global":
        # Megatron prefers these where they are as new.
        top = args.non_persistent_global_ckpt_dir or (args.load and f"{args.load}/non_persistent")
        newer = on_disk.folder_of(top) if top else None
        if newer and (folder is None or newer.name >= folder.name):
            folder = newer
    if folder is not None:
        return Source(f"--load {args.load}", folder)
    pretrained = args.pretrained_checkpoint
    folder = on_disk.folder_of(pretrained, step) if pretrained else None
    if folder is None:
        return None
    return Source(f"--pretrained-checkpoint {pretrained}", folder, pretrained=True)


def _refuse_damage(args: Any, source: Source) -> None:
    found = on_disk.damage(source.folder, torch_dist=args.ckpt_format == "torch_dist")
    if found:
        raise UserError(f"{source.flag}: {found}; {way_out(source)}")


def way_out(source: Source) -> str:
    """Say which other checkpoint of the directory can be loaded instead, and how."""
    root = source.folder.parent
    step = on_disk.newest_complete(root, besides=source.folder)
    if step is None:
        return f"no other complete checkpoint is in {root}: restore it, or start anew"
    return f"the newest other complete checkpoint is of step {step}: add --ckpt-step {step}"


def _refuse_another_run(args: Any, source: Source) -> None:
    """Refuse what Megatron would end in an exception for: model, optimizer, schedule."""
    folder = source.folder
    if not (folder / on_disk.FORMAT).is_file():
        return
    try:
        state = on_disk.common_state(folder)
    except Exception as error:
        why = error if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise UserError(
            f"{source.flag}: the arguments in {folder} cannot be read ({why}); {way_out(source)}"
        ) from error
    saved = state.get("args")
    if saved is None:
        return
    weights_only = (
        args.finetune
        or args.no_load_optim
        or args.skip_train
        or source.pretrained
        or folder.name == "release"
        or getattr(saved, "no_save_optim", False)
    )
    for name in SHAPE_ARGS:
        now = getattr(args, name, None)
        if weights_only and name == "mtp_num_layers" and not now:
            continue  # Megatron leaves tensors alone that the model does not ask for.
        if hasattr(saved, name) and getattr(saved, name) != now:
            raise UserError(
                f"--{name.replace('_', '-')} is {now}, but the checkpoint {folder} was saved with"
                f" {getattr(saved, name)}: give that value (or --use-checkpoint-args), or start a"
                " new run with another --load and --save"
            )
    if not weights_only:
        _refuse_another_optimizer(args, saved, state.get("content_metadata") or {}, folder)
        _refuse_another_schedule(args, state.get("opt_param_scheduler") or {}, folder)


def _refuse_another_optimizer(
    args: Any, saved: Any, metadata: dict[str, Any], folder: pathlib.Path
) -> None:
    """Refuse optimizer state that Megatron cannot bring into the form this run needs."""
    distributed = getattr(saved, "use_distributed_optimizer", args.use_distributed_optimizer)
    if distributed != args.use_distributed_optimizer:
        was, way = ("with", "add it") if distributed else ("without", "drop it")
        raise UserError(
            f"the checkpoint {folder} was saved {was} --use-distributed-optimizer: {way}, or start"
            " with a new optimizer (--no-load-optim)"
        )
    kind = metadata.get("distrib_optim_sharding_type")
    if kind is None and getattr(saved, "ckpt_fully_parallel_save", False):
        kind = "fully_sharded_model_space"  # As Megatron takes checkpoints without this entry.
    if not args.use_distributed_optimizer or kind in FREE_OPTIMIZER_FORMATS:
        return
    for name in LAYOUT_ARGS:
        now = getattr(args, name, None)
        if hasattr(saved, name) and getattr(saved, name) != now:
            raise UserError(
                f"--{name.replace('_', '-')} is {now}, but the optimizer state in {folder} can"
                f" only be loaded with {getattr(saved, name)}, the value it was saved with: save it"
                " there with --dist-ckpt-optim-fully-reshardable first, or start with a new"
                " optimizer (--no-load-optim)"
            )


def _refuse_another_schedule(args: Any, saved: dict[str, Any], folder: pathlib.Path) -> None:
    """Refuse what ``OptimizerParamScheduler.load_state_dict`` would end in an assertion for."""
    for name, (flag, now) in (_schedule(args) if saved else {}).items():
        if name not in saved or saved[name] == now:
            continue
        if name in ("max_lr", "min_lr"):
            raise UserError(
                f"{flag} is {now}, but the checkpoint {folder} was saved with {saved[name]}, by"
                " which Megatron finds its parameter groups: give that value, or start with a new"
                " optimizer (--no-load-optim)"
            )
        if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
            raise UserError(
                f"{flag} makes {name} of the schedule {now}, but the checkpoint {folder} was saved"
                f" with {saved[name]}: add --override-opt_param-scheduler to take the new schedule,"
                " or --use-checkpoint-opt_param-scheduler to keep the old"
            )


def _schedule(args: Any) -> dict[str, tuple[str, Any]]:
    """What the scheduler will compare, by its names, with the flag that decides it.

    Mirrors Megatron's ``get_optimizer_param_scheduler``: in samples, from iterations or samples.
    """
    if args.train_iters:
        unit, run, decay = args.global_batch_size, args.train_iters, args.lr_decay_iters
        warmup, flag = args.lr_warmup_iters, "--train-iters"
    else:
        unit, run, decay = 1, args.train_samples, args.lr_decay_samples
        warmup, flag = args.lr_warmup_samples, "--train-samples"
    decay_steps = (decay or run) * unit
    warmup_steps = warmup * unit
    if args.lr_warmup_fraction is not None:
        warmup_steps = args.lr_warmup_fraction * decay_steps
    return {
        "max_lr": ("--lr", args.lr),
        "lr_warmup_steps": ("The warm-up", warmup_steps),
        "lr_decay_steps": (flag if not decay else "The decay", decay_steps),
        "min_lr": ("--min-lr", args.min_lr),
        "lr_decay_style": ("--lr-decay-style", args.lr_decay_style),
        "start_wd": ("--start-weight-decay", args.start_weight_decay),
        "end_wd": ("--end-weight-decay", args.end_weight_decay),
        "wd_incr_steps": (flag, run * unit),
        "wd_incr_style": ("--weight-decay-incr-style", args.weight_decay_incr_style),
    }
