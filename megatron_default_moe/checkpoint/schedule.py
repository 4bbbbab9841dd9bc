"""The schedule of a checkpoint's run, held against that of the run that resumes it.

Megatron's scheduler counts samples and compares what it computed from flags, so a refusal here has
to find the flag again. How far a run is, and what is left of it, depends on the same flags.
"""

import logging
import pathlib
from typing import Any

from megatron_default_moe.errors import UserError

logger = logging.getLogger(__name__)

TAKE_OR_KEEP = (
    "add --override-opt_param-scheduler to take the new schedule, or"
    " --use-checkpoint-opt_param-scheduler to keep the old"
)


def refuse_another(args: Any, state: dict[str, Any], folder: pathlib.Path) -> None:
    """Refuse what ``OptimizerParamScheduler.load_state_dict`` would end in an assertion for.

    Args:
        args: Megatron's validated arguments.
        state: what all ranks share of the checkpoint (``on_disk.common_state``).
        folder: of the checkpoint.

    Raises:
        UserError: the schedule is another one, and nobody said which of the two counts.
    """
    saved = state.get("opt_param_scheduler") or {}
    batch = getattr(state.get("args"), "global_batch_size", None)
    of_then = _schedule(args, batch or 1) if saved else {}
    for name, (flag, now) in (_schedule(args, args.global_batch_size) if saved else {}).items():
        if name not in saved or saved[name] == now:
            continue
        if name in ("max_lr", "min_lr"):
            raise UserError(
                f"{flag} is {now}, but the checkpoint {folder} was saved with {saved[name]}, by"
                " which Megatron finds its parameter groups: give that value, or start with a new"
                " optimizer (--no-load-optim)"
            )
        if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
            continue
        if batch not in (None, args.global_batch_size) and of_then[name][1] == saved[name]:
            raise UserError(
                f"--global-batch-size is {args.global_batch_size}, but the checkpoint {folder} was"
                f" saved with {batch}, and a schedule in iterations is counted in their samples:"
                f" give that value, {TAKE_OR_KEEP}"
            )
        raise UserError(
            f"{flag} makes {name} of the schedule {now}, but the checkpoint {folder} was saved"
            f" with {saved[name]}: {TAKE_OR_KEEP}"
        )


def _schedule(args: Any, batch: int) -> dict[str, tuple[str, Any]]:
    """What the scheduler will compare, by its names, with the flag that decides it.

    Mirrors Megatron's ``get_optimizer_param_scheduler``: in samples, from iterations or samples.

    Args:
        args: Megatron's arguments.
        batch: samples of an iteration.
    """
    if args.train_iters:
        unit, run, decay = batch, args.train_iters, args.lr_decay_iters
        warmup, flag = args.lr_warmup_iters, "--train-iters"
    else:
        unit, run, decay = 1, args.train_samples, args.lr_decay_samples
        warmup, flag = args.lr_warmup_samples, "--train-samples"
    decay_steps = (decay or run) * unit
    warmup_steps = warmup * unit
    if args.lr_warmup_fraction is not None:
        warmup_steps = args.lr_warmup_fraction * decay_steps
    constant = args.weight_decay_incr_style == "constant"
    start_wd, end_wd = "--start-weight-decay", "--end-weight-decay"
    return {
        "max_lr": ("--lr", args.lr),
        "lr_warmup_steps": ("The warm-up", warmup_steps),
        "lr_decay_steps": (flag if not decay else "The decay", decay_steps),
        "min_lr": ("--min-lr", args.min_lr),
        "lr_decay_style": ("--lr-decay-style", args.lr_decay_style),
        "start_wd": ("--weight-decay" if constant else start_wd, args.start_weight_decay),
        "end_wd": ("--weight-decay" if constant else end_wd, args.end_weight_decay),
        "wd_incr_steps": (flag, run * unit),
        "wd_incr_style": ("--weight-decay-incr-style", args.weight_decay_incr_style),
    }


def check_what_is_left(args: Any, state: dict[str, Any], folder: pathlib.Path) -> None:
    """Say that nothing is left to train; refuse samples that would be left out or not be there.

    ``--train-samples`` becomes iterations of today's batch size, of which those already done, of
    the batch size of then, are taken off.

    Args:
        args: Megatron's validated arguments.
        state: what all ranks share of the checkpoint (``on_disk.common_state``).
        folder: of the checkpoint.

    Raises:
        UserError: Megatron would train on another number of samples than ``--train-samples``.
    """
    done = state.get("iteration")
    if done is None or not (args.train_iters or args.train_samples):
        return
    flag, goal = "--train-iters", args.train_iters
    if not goal:
        if args.step_batch_size_schedule is not None:
            return  # Megatron counts iterations through the whole schedule.
        flag, goal = "--train-samples", args.train_samples // args.global_batch_size
        _refuse_another_count(args, state.get("args"), folder, goal - done)
    if done >= goal:
        logger.warning(
            "nothing is left to train: the checkpoint %s is of iteration %d, and the last one is"
            " %d: to go on, raise %s (with --override-opt_param-scheduler)",
            folder,
            done,
            goal,
            flag,
        )


def _refuse_another_count(args: Any, saved: Any, folder: pathlib.Path, iterations: int) -> None:
    """Refuse iterations that are not those of the samples that are left."""
    consumed = getattr(saved, "consumed_train_samples", None)
    if consumed is None:
        return
    batch, before = args.global_batch_size, getattr(saved, "global_batch_size", None)
    left = max(0, args.train_samples - consumed) // batch
    if left == max(0, iterations):
        return
    steps = getattr(saved, "step_batch_size_schedule", None)
    tokens = consumed * args.seq_length  # What Megatron counts the thresholds in.
    way = f'--step-batch-size-schedule "{steps or f"0:{before} {tokens}:{batch}"}"'
    raise UserError(
        f"--global-batch-size is {batch}, but the checkpoint {folder} was saved with"
        f" {steps or before} after {consumed} of --train-samples {args.train_samples}, and Megatron"
        f" would train {max(0, iterations)} iterations instead of the {left} that are left: "
        + (f"give {way} again" if steps else f"give {before}, or in place of it {way}")
    )
