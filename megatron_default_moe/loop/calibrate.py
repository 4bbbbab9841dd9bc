"""Give a trained TopK model its default vectors, so that it can switch over without a jolt.

Loads a checkpoint, runs forward batches of its training data as evaluation does (no gradients, no
dropout), sets every default vector to the mean output S/N of its expert over all of them, and saves
the checkpoint again with the vectors in it: weights, optimizer, iteration and data position as they
were. What is summed, and how, is what training sums (``DefaultMoERouter``).

All of the vectors at once make a model worse that was trained without them: the loss of the same
batches is printed both ways, and the checkpoint says that they come in over ``FADE_IN`` steps.

Upcycling a dense checkpoint is refused (``options/support.py``): its experts start as copies of one
another and have nothing to tell apart.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from typing import Any

from megatron_default_moe import exits
from megatron_default_moe.errors import UserError
from megatron_default_moe.loop import command_line
from megatron_default_moe.options.flags import OneSentenceParser


def run(argv: list[str]) -> None:
    """Calibrate as the flags say: those of the training run, and ``--calibration-batches``.

    Args:
        argv: the command line, without the program's name.

    Raises:
        UserError: a mistake in the flags or files.
    """
    own = OneSentenceParser(
        usage="default-moe calibrate FLAGS --load TOPK --save NEW [--calibration-batches 50]",
        description="Give the TopK checkpoint TOPK default vectors and save it as NEW.",
        epilog="FLAGS are those of the training run, but its schedule, which is the checkpoint's:"
        " default-moe pretrain --help shows them. On several ranks: torchrun ... -m"
        " megatron_default_moe calibrate FLAGS ...",
        allow_abbrev=False,
    )
    own.add_argument(
        "--calibration-batches",
        type=int,
        default=50,
        help="global batches of training data to run forward (50)",
    )
    chosen, argv = own.parse_known_args(argv)
    if chosen.calibration_batches < 1:
        raise UserError("--calibration-batches must be at least 1 (50 by default)")
    # Megatron asks for an interval with --save; the one save here is not by interval.
    args, options = command_line.prepare([*argv, "--save-interval", "1"], _stand_in_schedule)
    _check(args, options)
    _take_schedule(args)
    _as_one_evaluation(args)
    from megatron_default_moe.loop import entry

    # beta 0: one update sets a vector to the mean of what was summed.
    options = dataclasses.replace(
        options, from_baseline=True, init="zeros", order="after-use", beta=0.0, in_eval=True
    )
    options = entry.start(args, options, trains=False)
    if not options.from_baseline or (options.absent and "default_vectors" not in options.absent):
        raise UserError(
            f"--load {args.load} has default vectors already: train on from it, or name the TopK"
            " checkpoint that it came from"
        )
    model_config = command_line.build_model_config(args, options)
    _calibrate(args, options, model_config, chosen.calibration_batches)


SCHEDULE_ARGS = (
    *("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "train_iters", "train_samples"),
    *("lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_init", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
"""Megatron's arguments that nothing here depends on, but the loading of the optimizer's state."""


def _stand_in_schedule(parsed: argparse.Namespace) -> list[str]:
    """Flags that Megatron asks for; :func:`_take_schedule` puts the checkpoint's in their place."""
    flags = []
    if not (parsed.train_iters or parsed.train_samples):
        warmup = parsed.lr_warmup_samples
        flags += ["--train-samples" if warmup else "--train-iters", str(2**30)]
    if parsed.lr is None:
        flags += ["--lr", str(parsed.min_lr or 1.0)]
    return flags


def _take_schedule(args: Any) -> None:
    """Go on with the schedule of the run that saved the checkpoint, whatever is given here."""
    from megatron_default_moe.checkpoint import on_disk

    folder = on_disk.folder_of(args.load, args.ckpt_step)
    assert folder is not None
    try:
        saved = on_disk.common_state(folder).get("args")
    except Exception:
        saved = None  # Another format, or damaged: what is given counts, and the entry checks it.
    for name in SCHEDULE_ARGS:
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    if args.train_samples:
        args.train_iters = None  # Megatron had set it from the samples.
    if args.train_iters == 2**30 or args.train_samples == 2**30:
        raise UserError(
            f"--load {args.load} does not say what schedule its run had: give that run's --lr,"
            " --train-iters and the other flags of its schedule"
        )
    args.override_opt_param_scheduler, args.use_checkpoint_opt_param_scheduler = False, True


def _as_one_evaluation(args: Any) -> None:
    """Set aside flags of the training run that one evaluation and one save have no use for."""
    args.async_save, args.non_persistent_ckpt_type, args.exit_duration_in_mins = False, None, None
    # The batches come from the training data, in its sizes.
    args.eval_global_batch_size = args.global_batch_size
    args.eval_micro_batch_size = args.micro_batch_size


def _check(args: Any, options: Any) -> None:
    from megatron_default_moe.checkpoint import on_disk

    if not options.uses_default_vectors:
        raise UserError(
            f"--moe-router-gradient {options.gradient} has no default vectors: leave it out"
        )
    for flag, path in (("--load", args.load), ("--save", args.save)):
        if "://" in str(path or ""):
            raise UserError(f"{flag} {path} is not a directory: calibration needs a local one")
    folder = on_disk.folder_of(args.load, args.ckpt_step) if args.load else None
    if folder is None:
        raise UserError(f"--load {args.load} names no checkpoint: name that of the TopK model")
    if not args.save:
        raise UserError("--save is missing: name a new directory for the checkpoint with vectors")
    if (pathlib.Path(args.save) / on_disk.TRACKER).exists():
        raise UserError(f"--save {args.save} already holds checkpoints: name a new directory")


def _calibrate(args: Any, options: Any, model_config: Any, batches: int) -> None:
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.checkpointing import save_checkpoint

    from megatron_default_moe.data import gpt_data
    from megatron_default_moe.layers import optimizer_step
    from megatron_default_moe.loop import restarts

    training.initialize_megatron(
        get_embedding_ranks=gpt_data.embedding_ranks(model_config.transformer),
        get_position_embedding_ranks=None,
        store=restarts.meeting_store(args),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, model_config),
        pg_collection=groups,
    )
    # The batches after the last one trained on; a finished run has none left of its own.
    before = args.train_iters, args.train_samples, args.consumed_valid_samples
    args.train_iters = max(args.train_iters or 0, args.iteration + batches)
    if args.train_samples:
        ahead = args.consumed_train_samples + batches * args.global_batch_size
        args.train_samples = max(args.train_samples, ahead)
    routers = list(optimizer_step.routers(model))

    def losses() -> dict[str, Any]:
        """The same batches every time."""
        found, *_ = training.evaluate(
            gpt_data.forward_step,
            _iterators(args, model_config, len(model)),
            model,
            None,
            model_config.transformer,
            eval_iters=batches,
        )
        return dict(found)

    for router in routers:
        router.calibrating = True
    without = losses()
    for router in routers:
        router.calibrating = False
    optimizer_step.reduce_step_sums(model)
    optimizer_step.commit(model, taken=True)
    untouched = torch.tensor(
        sum(int((router.default_vector_updates == 0).sum()) for router in routers),
        device=torch.cuda.current_device(),
    )
    torch.distributed.all_reduce(untouched, group=groups.pp)
    for router in routers:
        router.settle()
        router.count_fade_in_from(options.fade_in)  # all of them
    at_once = losses() if options.fades else without
    for router in routers:
        router.count_fade_in_from(0)
    args.train_iters, args.train_samples, args.consumed_valid_samples = before
    flops = args.num_floating_point_operations_so_far
    save_checkpoint(args.iteration, model, optimizer, scheduler, flops)
    _report(args, batches, without, at_once)
    _advise(args, options, int(untouched))


def _iterators(args: Any, model_config: Any, num_chunks: int) -> Any:
    """The training data, as ``pretrain`` builds it: one iterator a model chunk."""
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_default_moe.data import gpt_data

    provider = gpt_data.datasets_provider(model_config.transformer)
    if args.virtual_pipeline_model_parallel_size is None:
        return build_train_valid_test_data_iterators(provider)[0]
    found = []
    for stage in range(num_chunks):
        of_stage = functools.partial(provider, vp_stage=stage)
        of_stage.is_distributed = True  # type: ignore[attr-defined]
        found.append(build_train_valid_test_data_iterators(of_stage)[0])
    return found


def _report(args: Any, batches: int, without: dict[str, Any], at_once: dict[str, Any]) -> None:
    from megatron.training.utils import print_rank_last

    loss = "".join(
        f", {name} {float(value):.4f} without the vectors and {float(at_once[name]):.4f} with all"
        " of them at once"
        for name, value in without.items()
    )
    print_rank_last(
        f"> calibrated on {batches} batches of {args.global_batch_size} sequences{loss}; saved to"
        f" {args.save} at iteration {args.iteration}"
    )


def _advise(args: Any, options: Any, untouched: int) -> None:
    from megatron.training.utils import print_rank_last

    if options.fade_in:
        print_rank_last(
            f"> go on with --load {args.save}: the vectors come into the forward over"
            f" {options.fade_in} steps, as the checkpoint says (--default-vector-fade-in)"
        )
    elif options.fades:
        print_rank_last(
            "> --default-vector-fade-in 0: training on from it begins with all of them at once"
        )
    if untouched:
        print_rank_last(
            f"> {untouched} experts got no token and keep a vector of zero: raise"
            " --calibration-batches if that is unexpected"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exits.exit_code`."""
    return exits.exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
