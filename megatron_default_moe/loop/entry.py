"""What an entry script does between Megatron's arguments and Megatron's ``pretrain``.

This package's own entry (``pretrain.py``) and a patched ``pretrain_gpt.py`` of a Megatron-LM source
checkout (``patches/``) share it. Such a script adds two calls:

    args = parse_and_validate_args(extra_args_provider=entry.with_flags(its_own_provider), ...)
    model_config = entry.prepare(args, gpt_config_from_args(args))
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.training.models.gpt import GPTModelConfig

from megatron_default_moe import errors
from megatron_default_moe.checkpoint import checks
from megatron_default_moe.errors import UserError
from megatron_default_moe.loop import patches
from megatron_default_moe.loop.model import DefaultMoEGPTModelConfig, attach
from megatron_default_moe.loop.tracker import Progress, RouterMetricsTracker
from megatron_default_moe.options import support
from megatron_default_moe.options.config import (
    RouterGradientConfig,
    add_router_gradient_args,
    options_from_args,
)

ArgsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
"""Megatron's ``extra_args_provider``: adds flags to a parser and returns it."""


def with_flags(provider: ArgsProvider | None = None) -> ArgsProvider:
    """Return an ``extra_args_provider`` that adds this package's flags after the script's own.

    Args:
        provider: the script's own, or None.
    """

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_router_gradient_args(parser if provider is None else provider(parser))

    return add


def prepare(args: Any, model_config: GPTModelConfig) -> DefaultMoEGPTModelConfig:
    """Make a script's GPT model train as this package's flags say; the last step before it starts.

    Checks the support table, hooks the options into the model's config, checks the checkpoint that
    is about to be loaded, covers the training loop and installs the metrics. A user's mistake ends
    the process here: one sentence and exit code 2.

    Args:
        args: Megatron's validated arguments, parsed with :func:`with_flags`.
        model_config: what Megatron's ``gpt_config_from_args`` made of them.

    Returns:
        The config to train with.
    """
    try:
        options = options_from_args(args)
        support.check(args, options, own_entry=False)
        if type(model_config) is not GPTModelConfig:
            raise UserError(
                f"--moe-router-gradient builds Megatron's plain GPT model, and these flags ask for"
                f" a {type(model_config).__name__}: drop the ModelOpt flags"
            )
        attach(model_config.transformer, start(args, options), commit="after-step", warn=False)
    except UserError as error:
        sys.exit(errors.report(error))
    names = [field.name for field in dataclasses.fields(model_config)]
    return DefaultMoEGPTModelConfig(**{name: getattr(model_config, name) for name in names})


def start(args: Any, options: RouterGradientConfig, trains: bool = True) -> RouterGradientConfig:
    """Everything that must be in place when ``pretrain`` is called, but the model's config.

    Args:
        args: Megatron's validated arguments.
        options: the package's options.
        trains: whether the run goes on to train.

    Returns:
        The options for the model's config (see ``checks.prepare_load``).

    Raises:
        UserError: the checkpoint cannot be loaded, or has no default vectors and nobody said it
            may; or nothing can be saved.
    """
    options = checks.prepare_load(args, options, trains)
    # Saved with the checkpoints: who resumes from them goes on with the same fade-in.
    args.default_vector_fade_in = options.fade_in
    checks.prepare_save(args)
    patches.install()
    set_moe_metrics_tracker(_tracker(args, options))
    return options


def _tracker(args: Any, options: RouterGradientConfig) -> RouterMetricsTracker:
    iterations = args.train_iters or args.train_samples // args.global_batch_size
    return RouterMetricsTracker(
        log_interval=args.log_interval,
        num_experts=args.num_experts,
        progress=Progress(iterations, lambda: args.consumed_train_samples * args.seq_length),
        metrics=options.metrics,
        fidelity_interval=options.fidelity_interval,
    )
