"""Whether a run can evaluate as its flags say: Megatron tries it when it is due, hours later."""

from typing import Any

from megatron_default_moe.data.parts import Part
from megatron_default_moe.errors import UserError

_NONE = "--eval-iters 0 to train without evaluation"


def evaluates(args: Any) -> bool:
    """Whether Megatron evaluates at all."""
    return bool(args.full_validation or args.eval_iters)


def refuse_impossible(args: Any, parts: dict[str, Part] | None) -> None:
    """Refuse an evaluation without data, and the forms of it that Megatron 0.19 cannot do.

    Args:
        args: Megatron's validated arguments.
        parts: from :func:`parts.parts`.

    Raises:
        UserError: with the flag and the way out.
    """
    if args.skip_train and not evaluates(args):
        raise UserError("--skip-train with --eval-iters 0 does nothing: give a larger --eval-iters")
    _refuse_sets(args, parts)
    if evaluates(args) and parts is not None and "valid" not in parts:
        asked = "--full-validation" if args.full_validation else f"--eval-iters {args.eval_iters}"
        where = next(iter(parts.values()))
        give = "--valid-data-path PREFIX"
        if where.split is not None:
            give = f"--split a second share (it is {where.split})"
        way_out = "" if args.skip_train else f", or {_NONE}"
        raise UserError(f"{asked} evaluates and there is no validation data: give {give}{way_out}")


def _refuse_sets(args: Any, parts: dict[str, Part] | None) -> None:
    """What Megatron does with whole validation sets, of which there may be many."""
    if not args.full_validation:
        if args.multiple_validation_sets:
            raise UserError(
                "--multiple-validation-sets works with --full-validation alone: add it, or give one"
                " set"
            )
        return
    if not args.multiple_validation_sets:
        raise UserError(
            "--full-validation of a single set ends in an error of Megatron 0.19 at the first"
            " evaluation: add --multiple-validation-sets, which takes one set too"
        )
    if parts is None or "test" in parts:
        raise UserError(
            "--full-validation ends in an error of Megatron 0.19 when there is a test set: leave"
            " --test-data-path out, or the third share of --split, or --mock-data"
        )
    if args.pipeline_model_parallel_size > 2:
        raise UserError(
            "--full-validation ends in an error of Megatron 0.19 in the middle of a pipeline: use"
            " --pipeline-model-parallel-size 2 or less, or --eval-iters N"
        )
    if args.eval_micro_batch_size != 1:
        raise UserError(
            "--full-validation reads one sequence at a time: add --eval-micro-batch-size 1 (and an"
            " --eval-global-batch-size of the number of data-parallel ranks)"
        )
    valid = parts.get("valid")
    if valid is None:
        return
    if valid.weights is not None:
        raise UserError(
            f"{valid.flag} has weights, and --full-validation reads each set once: leave them out"
        )
    sets = 1 if valid.split else len(valid.sources)
    if args.validation_set_names and len(args.validation_set_names) != sets:
        raise UserError(
            f"--validation-set-names names {len(args.validation_set_names)} sets and there are"
            f" {sets}: give one name for each"
        )


def times(args: Any, steps: int, after: int = 0) -> int:
    """How often a run evaluates its validation data after a step, its end included."""
    if args.skip_train:
        return 1
    first = max(after, (args.start_eval_at_iter or 1) - 1)
    return max(0, steps // args.eval_interval - first // args.eval_interval) + 1


def with_consumed(args: Any, samples: Any) -> list[int | None]:
    """Return the samples to build of each part, as many for validation as are still to be read.

    Megatron counts the evaluations of a whole run with today's flags. If those before a restart
    were more frequent, more is consumed than that, and it has none left.

    Args:
        args: Megatron's, of a run that begins or goes on.
        samples: what Megatron asks of train, validation and test.
    """
    train, valid, test = samples
    if valid is None or args.skip_train:
        return [train, valid, test]
    left = times(args, args.train_iters, args.iteration) * args.eval_iters
    needed = args.consumed_valid_samples + left * args.eval_global_batch_size
    return [train, max(valid, needed), test]
