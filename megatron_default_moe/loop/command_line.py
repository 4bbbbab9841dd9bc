"""From a command line of the training flags to Megatron's arguments and this package's options.

What the entry (``pretrain.py``), calibration and planning share: one parser, the checks before any
work is done, the CPU runtime where there is no GPU, and Megatron's own checks in one sentence.
"""

import argparse
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from megatron_default_moe import errors, exits
from megatron_default_moe.cpu import flag_choices, runtime
from megatron_default_moe.data import checks, parts
from megatron_default_moe.errors import UserError
from megatron_default_moe.machine import ranks
from megatron_default_moe.machine.versions import check_version
from megatron_default_moe.options import layout, numbers, support
from megatron_default_moe.options.config import (
    RouterGradientConfig,
    add_router_gradient_args,
    options_from_args,
)
from megatron_default_moe.options.flags import OneSentenceParser, expand_config
from megatron_default_moe.options.settings import Settings


def say(line: str) -> None:
    """Print one line of our own, once per run."""
    if errors.rank() == 0:
        print(f"> {line}", flush=True)


def quiet_expected_warnings() -> None:
    """On the CPU, Megatron warns at import of every library that only a GPU could use."""
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer ?Engine|transformer-engine)")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def build_parser() -> argparse.ArgumentParser:
    """Megatron's parser with this package's flags, whose errors are one sentence."""
    from megatron.training.arguments import add_megatron_arguments

    parser = OneSentenceParser(prog="default-moe pretrain", allow_abbrev=False)
    return add_flags(add_megatron_arguments(parser))


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this package's flags and ``--config`` (an ``extra_args_provider`` of Megatron's)."""
    add_router_gradient_args(parser)
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Flags by name, one a line; the command line wins. Or the name of an example.",
    )
    exits.add_flag(parser)
    return parser


def megatron_args(argv: list[str]) -> Any:
    """Let Megatron parse and validate, and say its refusals in one sentence."""
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = [sys.argv[0], *argv]
    try:
        return parse_and_validate_args(
            extra_args_provider=add_flags, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
        )
    except (AssertionError, ValueError, OSError) as error:
        if not raised_by_megatron(error):
            raise
        raise UserError(f"Megatron refuses these arguments: {reason_of(error)}") from error


def raised_by_megatron(error: BaseException) -> bool:
    """Whether Megatron raised it, itself or in a library it called; if not, this package did."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        name = frame.f_globals.get("__name__", "").partition(".")[0]
        if name in ("megatron", "megatron_default_moe"):
            return bool(name == "megatron")
    return False


def reason_of(error: BaseException) -> str:
    """The message of an exception, or where an assertion without one stands."""
    message = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return message or f"the check '{frame.line}' ({os.path.basename(frame.filename)}) failed"


def build_model_config(args: Any, options: Any) -> Any:
    """Megatron's GPT model config with the options attached."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_default_moe.loop.model import DefaultMoEGPTModelConfig, attach

    try:
        transformer = core_transformer_config_from_args(args)
        attach(transformer, options, commit="after-step", warn=False)
        return gpt_config_from_args(
            args, config=transformer, model_config_cls=DefaultMoEGPTModelConfig
        )
    except UserError:
        raise
    except (AssertionError, ValueError) as error:
        if not raised_by_megatron(error):
            raise
        raise UserError(f"Megatron refuses these arguments: {reason_of(error)}") from error


def prepare(
    argv: list[str], complete: Callable[[argparse.Namespace], list[str]] | None = None
) -> tuple[Any, Any]:
    """Make this process ready for Megatron, and let it parse and validate the command line.

    Args:
        argv: the command line, without the program's name.
        complete: returns flags to add, of what is given; called before anything is checked.

    Returns:
        Megatron's arguments and this package's options.

    Raises:
        UserError: a mistake in the flags or files.
    """
    ranks.prepare(os.environ)
    on_cpu = runtime.needed()
    if on_cpu:
        ranks.refuse_broken_gpu(os.environ)
    if on_cpu or errors.rank() != 0:
        quiet_expected_warnings()
    if on_cpu:
        runtime.install()
        say("no CUDA device: running on the CPU (gloo)")
    else:
        _refuse_ranks_without_gpu(os.environ)
        runtime.use_wheel_dataset_helpers()
    check_version()
    parser = build_parser()
    argv = expand_config(parser, argv)
    if complete is not None:
        argv = [*argv, *complete(parser.parse_args(argv))]
    if on_cpu:
        argv, chosen = flag_choices.apply(parser, argv)
        say(f"chosen for the CPU: {' '.join(chosen)}")
    else:
        argv = without_missing_kernel(argv)
    parsed = parser.parse_args(argv)
    numbers.refuse_impossible(parsed)
    added = numbers.complete_training(parsed)
    if added:
        argv = [*argv, *added]
        parsed = parser.parse_args(argv)
    options = options_from_args(parsed)
    support.check(parsed, options)
    _refuse_layout(parsed, options)
    parts.refuse_unnamed(parsed)
    args = megatron_args(argv)
    checks.check(args)
    return args, options


def _refuse_layout(args: argparse.Namespace, options: RouterGradientConfig) -> None:
    """Refuse what does not divide, in the words of a plan, before Megatron starts."""
    count = int(os.environ["WORLD_SIZE"])
    if args.inprocess_restart and args.inprocess_active_world_size:
        count = args.inprocess_active_world_size
    fault = layout.fault(Settings(args, options), count)
    if fault is not None:
        raise UserError(f"{fault}: default-moe plan names the nearest layout that works")


def _refuse_ranks_without_gpu(environment: Mapping[str, str]) -> None:
    """Such a rank ends in 'invalid device ordinal', and the others in whatever that leads to."""
    import torch

    count, gpus = int(environment.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    # Only under torchrun, whose ranks all see the node's GPUs and take the one of their number.
    if count > gpus and "TORCHELASTIC_RUN_ID" in environment:
        raise UserError(
            f"torchrun starts {count} ranks on a node with {gpus} GPUs: --nproc-per-node {gpus}"
            f" (with examples/launch/torchrun.sh: PROCESSES_PER_NODE={gpus})"
        )


def without_missing_kernel(argv: list[str]) -> list[str]:
    """Turn fused gradient accumulation off where its kernel is missing.

    It is on by default, and Megatron's output layer then refuses to be built without NVIDIA Apex.

    Args:
        argv: the command line, configuration files already expanded.

    Returns:
        The command line to go on with.
    """
    flag = "--no-gradient-accumulation-fusion"
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except ImportError:
        if flag not in argv:
            say(f"chosen: {flag} (the fused kernel is Apex's, which is not there)")
            return [*argv, flag]
    return argv
