"""The optimizer step in Megatron's training loop: what happens around ``train_step``.

Up to 0.19 ``megatron.training.training.train_step`` offers no hook after the optimizer, so
``patches.py`` puts a wrapper in its place. Later versions call callbacks, and ``pretrain`` takes
ours (:func:`callback_arguments`). (The other time hook, the reduction at gradient finalisation, is
a field of TransformerConfig: no patch.)
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from megatron.core.rerun_state_machine import EXIT_CODE_FAILED_ON_RESULT_VALIDATION
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_default_moe import errors
from megatron_default_moe.layers import optimizer_step
from megatron_default_moe.loop.tracker import RouterMetricsTracker


def before_step(model: Any, iteration: int | None) -> None:
    """Begin a step: drop what an interrupted one left, tell the routers whether this one is logged.

    Args:
        model: the model, or its chunks.
        iteration: steps before this one, or None where that is not known.
    """
    optimizer_step.begin(model)
    tracker = get_moe_metrics_tracker()
    if isinstance(tracker, RouterMetricsTracker) and iteration is not None:
        tracker.routers = list(optimizer_step.routers(model))
        for router in tracker.routers:
            router.collects_details = tracker.logs(iteration + 1)
            router.probes = tracker.probes(iteration + 1)


def with_commit(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``train_step``: commit the default vectors if the step was taken.

    Args:
        train_step: upstream's function; its result holds ``skipped_iter`` at index 1, and
            ``should_checkpoint``, ``should_exit`` and ``exit_code`` from index 2 on.

    Returns:
        A function with the same signature and result.
    """
    signature = inspect.signature(train_step)

    @functools.wraps(train_step)
    def train_step_with_commit(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        before_step(arguments["model"], arguments.get("iteration"))
        result = train_step(*args, **kwargs)
        result = _without_a_checkpoint_nowhere(result, arguments.get("iteration"))
        skipped, should_exit = result[1], result[3]
        optimizer_step.commit(arguments["model"], taken=not skipped and not should_exit)
        return result

    return train_step_with_commit


def _without_a_checkpoint_nowhere(result: Any, iteration: int | None) -> Any:
    """End the run where Megatron would save a checkpoint first and nobody said where.

    It does so after a result that is not finite, or not reproducible, and fails in the saving.
    """
    from megatron.training.global_vars import get_args

    if not result[2] or get_args().save:
        return result
    if errors.rank() == 0:
        step = "a step" if iteration is None else f"iteration {iteration + 1}"
        print(
            f"error: {step} gave a loss or gradient that cannot be trained with (the line"
            " 'unexpected result' has its value), and without --save there is no checkpoint to go"
            " on from: lower --lr or --clip-grad, and give --save",
            file=sys.stderr,
            flush=True,
        )
    return (*result[:2], False, True, EXIT_CODE_FAILED_ON_RESULT_VALIDATION, *result[5:])


class CommitCallback:
    """The same as a callback of Megatron's loop (``megatron.training.callbacks``, after 0.19)."""

    def on_train_step_start(self, context: Any) -> None:
        """Prepare the step; ``context.model`` is the list of model chunks."""
        from megatron.training.global_vars import get_args

        before_step(context.model, getattr(get_args(), "curr_iteration", None))

    def on_train_step_end(self, context: Any) -> None:
        """Commit the default vectors if the step was taken (``context.skipped_iter`` is false)."""
        optimizer_step.commit(context.model, taken=not context.skipped_iter)


def callback_arguments(pretrain: Callable[..., Any]) -> dict[str, Any]:
    """Return what to hand to Megatron's ``pretrain`` so that steps end in a callback.

    Where the patch of ``train_step`` is in place too, it commits first and leaves nothing pending.

    Args:
        pretrain: upstream's function; up to 0.19 it takes no callbacks, and the result is empty.
    """
    takes = "callbacks" in inspect.signature(pretrain).parameters
    return {"callbacks": [CommitCallback()]} if takes else {}
