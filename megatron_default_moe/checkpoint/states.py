"""What a checkpoint has of the estimators' state, against what this run's model keeps.

One rule for all of them, by the names in the checkpoint (``options.estimators`` has the table):
what the model keeps and the checkpoint lacks must be allowed to start anew, and what the checkpoint
has and the model does not keep must be allowed to be left out. Otherwise Megatron would end in an
exception in the first case, and say nothing in the second.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable
from typing import Any

from megatron_default_moe.checkpoint.on_disk import Source
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.options.estimators import ESTIMATORS, STATES

logger = logging.getLogger(__name__)

_TRAINED = {name for one in ESTIMATORS for name in one.trained}


def state_in(names: Iterable[str]) -> set[str]:
    """Return which of ``STATES`` a checkpoint has.

    Args:
        names: of all its tensors; a router's end in ``router.<state>``.
    """
    return {state for name in names for state in STATES if name.endswith(f"router.{state}")}


def settle(
    args: Any, options: RouterGradientConfig, source: Source, names: set[str] | None
) -> RouterGradientConfig:
    """Refuse or accept a checkpoint whose state is not what this run's model keeps.

    Args:
        args: Megatron's arguments.
        options: the package's options.
        source: the checkpoint.
        names: of its tensors; None where that cannot be seen: there the user's word counts.

    Returns:
        The options; ``from_baseline`` is True only if something of the model's state starts anew,
        and ``absent`` says what.

    Raises:
        UserError: something would start anew or be left out, and nobody said it may.
    """
    if names is None:
        return options
    has = state_in(names)
    keeps = options.checkpointed
    absent = tuple(name for name in keeps if name in STATES and name not in has)
    left = tuple(name for name in STATES if name in has and name not in keeps)
    if absent and not options.from_baseline:
        raise UserError(_sentence_of_absent(options, source, has, absent))
    if left and not _may_be_left(args, options, source, left):
        raise UserError(
            f"{source.flag}: the checkpoint {source.folder} has {_words(left)}, which this run"
            f" leaves out: train on with {_flags_of(has)}, begin a new run from its weights"
            " alone with --finetune, or add --default-vector-override to go on without"
        )
    _refuse_optimizer(args, source, names, {*absent, *left} & _TRAINED)
    if left:
        _warn(
            f"{source.folder} has {_words(left)}, which --moe-router-gradient {options.gradient}"
            " leaves out: the model loses what they carried, and so do the checkpoints it saves"
        )
    return dataclasses.replace(options, from_baseline=bool(absent), absent=absent)


def say_what_starts(options: RouterGradientConfig, source: Source) -> None:
    """Say in one line which state starts anew, if any does: see :func:`settle`."""
    absent = [name for name in options.absent if name in STATES]
    if not absent:
        return
    others = [name for name in absent if "vector" not in name]
    parts = []
    if len(others) < len(absent):
        gently = f" and come into the forward over {options.fade_in} steps"
        parts.append(
            f"they start at {options.init}"
            + (f"{gently} (--default-vector-fade-in)" if options.fade_in else "")
        )
    if others:
        parts.append(f"{_words(others)} as in a new run")
    _warn(
        f"{source.folder} has no {_words(absent)} (--default-vector-from-baseline):"
        f" {', '.join(parts)}"
    )


def _sentence_of_absent(
    options: RouterGradientConfig, source: Source, has: set[str], absent: tuple[str, ...]
) -> str:
    vectors = "default_vectors" in absent
    guess = "" if has else " (a plain Megatron checkpoint?)"
    start = f"them at {options.init}" if vectors else "anew"
    start = f"start {start}"
    fill = ", fill them first with default-moe calibrate" if vectors else ""
    only_bias = absent == ("choice_bias",)
    back = "drop --moe-loss-free-bias" if only_bias else f"train on with {_flags_of(has)}"
    return (
        f"{source.flag}: the checkpoint {source.folder} has no {_words(absent)}{guess}: add"
        f" --default-vector-from-baseline to {start}{fill}, or {back}"
    )


def _may_be_left(
    args: Any, options: RouterGradientConfig, source: Source, left: tuple[str, ...]
) -> bool:
    """Whether somebody said so; topk after any estimator is what its user asks for."""
    return bool(
        options.from_baseline
        or options.override
        or args.finetune
        or args.no_load_optim
        or source.pretrained
        or (options.gradient == "topk" and "choice_bias" not in left)
    )


def _refuse_optimizer(args: Any, source: Source, names: set[str], trained: set[str]) -> None:
    """Refuse to load the state of an optimizer of other parameters."""
    weights_only = (
        args.finetune
        or args.no_load_optim
        or args.skip_train
        or source.pretrained
        or not any(name.startswith("optimizer.") for name in names)
    )
    if trained and not weights_only:
        raise UserError(
            f"{source.flag}: {_words(sorted(trained))} is trained in one of the two, this run and"
            f" the checkpoint {source.folder}, and so the optimizer's state cannot be loaded: start"
            " with a new optimizer (--no-load-optim)"
        )


def _words(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(STATES[name] for name in names))


def _flags_of(has: set[str]) -> str:
    """The flags of the run that saved this state; a stateless estimator's cannot be told."""
    own = has - {"choice_bias"}
    gradient = next(
        (one.name for one in ESTIMATORS if own and set(one.checkpointed) == own), "topk"
    )
    bias = " --moe-loss-free-bias" if "choice_bias" in has else ""
    return f"--moe-router-gradient {gradient}{bias}"


def _warn(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(sentence)
