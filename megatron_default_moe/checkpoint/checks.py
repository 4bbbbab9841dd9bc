"""What is checked of a checkpoint before Megatron loads it, so that nothing fails half-way.

A damaged checkpoint, one of another model, and one without default vectors are each refused in one
sentence before any work is done; nothing is overwritten. What the command line contradicts of what
the checkpoint knows is refused or said (``contradictions.py``, ``schedule.py``).
"""

import dataclasses
import logging
import os
import pathlib
import pickle
import tempfile
from typing import Any

from megatron_default_moe.checkpoint import contradictions, on_disk, schedule, states
from megatron_default_moe.checkpoint.on_disk import Source
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.config import FADE_IN, RouterGradientConfig

logger = logging.getLogger(__name__)

STEPS = "default_vector_steps"
STEPS_KEY = f"router.{STEPS}"
"""End of the checkpoint keys of a fade-in's count of steps."""

LAYOUT_ARGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
FREE_OPTIMIZER_FORMATS = ("fully_reshardable", "fully_sharded_model_space")
"""Formats of the distributed optimizer in which these sizes may change."""


def prepare_load(
    args: Any, options: RouterGradientConfig, trains: bool = True
) -> RouterGradientConfig:
    """Make sure that the checkpoint about to be loaded is whole, of this model, and has vectors.

    Rank 0 looks at the files: thousands of ranks asking for every file's length would be felt by a
    shared file system. The others only read what there is, where their model depends on it.

    Args:
        args: Megatron's arguments.
        options: the package's options.
        trains: whether the run goes on to train, and so has iterations left.

    Returns:
        The options, with ``from_baseline`` only if a checkpoint without some of the model's state
        will be loaded: restarting the same command from its own checkpoint loads it. ``fade_in``
        is what the user chose, else what the checkpoint's run did, else for a checkpoint without
        vectors ``FADE_IN``.

    Raises:
        UserError: the checkpoint cannot be loaded, and why; or its state is not this model's and
            nobody said it may.
    """
    if "://" in str(args.load or ""):
        # Object storage cannot be looked into here, neither now nor when the run restarts from it.
        if options.from_baseline:
            raise UserError(
                f"--default-vector-from-baseline cannot see whether --load {args.load} has default"
                " vectors, and would start them again at every restart: save into a folder (--load"
                " and --save) and name this one with --pretrained-checkpoint"
            )
        return options
    if args.non_persistent_ckpt_type == "local" and options.from_baseline:
        raise UserError(
            "--default-vector-from-baseline cannot see whether a checkpoint on local disks"
            " (--non-persistent-ckpt-type local) has vectors: save a persistent one first"
        )
    source = loaded_from(args)
    loads_vectors = dataclasses.replace(options, from_baseline=False)
    if source is None:
        if "://" in str(args.pretrained_checkpoint or ""):
            # The user's word counts, once: restarts are from --load.
            return _gently(args, options) if options.from_baseline else options
        _refuse_missing(args)
        return loads_vectors
    if os.environ.get("RANK", "0") == "0":
        _refuse_damage(args, source)
        _refuse_another_run(args, source, trains)
    elif not options.checkpointed:
        return loads_vectors
    names = _tensor_names(source)
    options = states.settle(args, options, source, names)
    options = _fading_in(args, options, source, names)
    states.say_what_starts(options, source)
    return options


def prepare_save(args: Any) -> None:
    """Make sure now that checkpoints can be written: Megatron finds out at the first of them.

    Args:
        args: Megatron's arguments.

    Raises:
        UserError: the folder of --save cannot be made or written to, or its file that names the
            latest iteration names none.
    """
    if not args.save or "://" in str(args.save) or os.environ.get("RANK", "0") != "0":
        return
    tracker = pathlib.Path(args.save) / on_disk.TRACKER
    if args.save_retain_interval is not None and tracker.is_file():
        latest = tracker.read_text(errors="replace").strip()
        if not latest.isdecimal():
            raise UserError(
                f"--save-retain-interval: {tracker} says {latest!r}, where Megatron needs the"
                " number of an iteration after its first save: name another folder with --save, or"
                " drop the flag"
            )
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


def _fading_in(
    args: Any, options: RouterGradientConfig, source: Source, names: set[str] | None
) -> RouterGradientConfig:
    """Decide over how many steps the vectors come into the forward: see :func:`prepare_load`."""
    if "default_vectors" in options.absent:
        options = _gently(args, options)
        return dataclasses.replace(options, absent=(*options.absent, *_counted(options)))
    if names is None:
        return _gently(args, options) if options.from_baseline else options
    if not options.fades:
        return options
    begun = any(name.endswith(STEPS_KEY) for name in names)
    if options.fade_in and not begun:
        _warn(
            f"{source.folder} counts no steps of a fade-in: the default vectors leave the forward"
            f" and come back over {options.fade_in} steps (--default-vector-fade-in)"
        )
        return dataclasses.replace(options, absent=(*options.absent, *_counted(options)))
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


def _counted(options: RouterGradientConfig) -> tuple[str, ...]:
    return (STEPS,) if options.fade_in else ()


def _given(args: Any) -> bool:
    return getattr(args, "default_vector_fade_in", None) is not None


def _gently(args: Any, options: RouterGradientConfig) -> RouterGradientConfig:
    """Let the vectors into a model that was trained without them step by step."""
    if _given(args) or not options.fades:
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
    local = pretrained and "://" not in str(pretrained)
    folder = on_disk.folder_of(pretrained, step) if local else None
    if folder is None:
        return None
    return Source(f"--pretrained-checkpoint {pretrained}", folder, pretrained=True)


def _refuse_missing(args: Any) -> None:
    """Refuse a name without a checkpoint, where Megatron would go on with random weights.

    A run that loads from where it saves has nothing there before its first save.

    Raises:
        UserError: nothing is there, and nothing will be.
    """
    if args.pretrained_checkpoint:
        raise UserError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint} holds no checkpoint (no"
            f" {on_disk.TRACKER}){_hint(args.pretrained_checkpoint)}"
        )
    if not args.load or args.non_persistent_ckpt_type == "local":
        return
    in_place = args.save and os.path.realpath(args.load) == os.path.realpath(args.save)
    if in_place and not (args.finetune or args.skip_train):
        return
    raise UserError(
        f"--load {args.load} holds no checkpoint (no {on_disk.TRACKER}), and the run would go on"
        f" from random weights{_hint(args.load)}"
    )


def _hint(path: str) -> str:
    named = pathlib.Path(path)
    if named.name == "release" or named.name.startswith("iter_"):
        return f": name the folder above, {named.parent}"
    step = on_disk.newest_complete(named)
    if step is not None:
        return f": add --ckpt-step {step}, which is complete"
    return ": name the folder that --save named, or leave the flag out for a new run"


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


def _refuse_another_run(args: Any, source: Source, trains: bool) -> None:
    """Refuse what Megatron would end in an exception for: model, optimizer, schedule."""
    folder = source.folder
    if not ((folder / on_disk.FORMAT).is_file() or on_disk.older_files(folder)):
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
    contradictions.refuse(args, saved, folder, weights_only)
    if on_disk.older_files(folder):
        _refuse_another_layout(args, saved, folder)
    elif not weights_only:
        _refuse_another_optimizer(args, saved, state.get("content_metadata") or {}, folder)
    if not weights_only:
        schedule.refuse_another(args, state, folder)
        if trains:
            schedule.check_what_is_left(args, state, folder)
    contradictions.say(args, saved, folder)


def _refuse_another_layout(args: Any, saved: Any, folder: pathlib.Path) -> None:
    """Refuse to look for files that are not there, after which Megatron ends with exit code 0."""
    for name in LAYOUT_ARGS:
        now = getattr(args, name, None)
        if hasattr(saved, name) and getattr(saved, name) != now:
            raise UserError(
                f"--{name.replace('_', '-')} is {now}, but the checkpoint {folder} was saved with"
                f" {getattr(saved, name)}, in --ckpt-format torch, which can only be loaded in the"
                " layout that saved it: give that value, or save it there with --ckpt-format"
                " torch_dist first"
            )


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
