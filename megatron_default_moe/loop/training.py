"""The optimizer step in Megatron's training loop: what happens around ``train_step``.

``megatron.training.training.train_step`` offers no hook after the optimizer, so ``patches.py`` puts
this wrapper in its place. (The other time hook, the reduction at gradient finalisation, is a field
of TransformerConfig: no patch.)
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_default_moe.layers import optimizer_step
from megatron_default_moe.loop.tracker import RouterMetricsTracker


def with_commit(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``train_step``: commit the default vectors if the step was taken.

    Args:
        train_step: upstream's function; its result holds ``skipped_iter`` at index 1 and
            ``should_exit`` at index 3.

    Returns:
        A function with the same signature and result.
    """
    signature = inspect.signature(train_step)

    @functools.wraps(train_step)
    def train_step_with_commit(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        model, iteration = arguments["model"], arguments.get("iteration")
        routers = list(optimizer_step.routers(model))
        tracker = get_moe_metrics_tracker()
        if isinstance(tracker, RouterMetricsTracker) and iteration is not None:
            tracker.routers = routers
            for router in routers:
                router.collects_details = tracker.logs(iteration + 1)
        result = train_step(*args, **kwargs)
        skipped, should_exit = result[1], result[3]
        optimizer_step.commit(model, taken=not skipped and not should_exit)
        return result

    return train_step_with_commit
