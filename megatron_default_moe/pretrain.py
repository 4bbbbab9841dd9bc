"""The entry: ``torchrun ... -m megatron_default_moe.pretrain [--config FILE.yaml] <flags>``.

Takes every Megatron flag and this package's, real data and ``--mock-data``, and runs Megatron's own
``pretrain``. Without a CUDA device the same command runs on the CPU (``cpu/``). A user's mistake
ends in one sentence and exit code 2, before any work is done.
"""

import argparse
import errno
import importlib
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from megatron_default_moe import errors
from megatron_default_moe.cpu import runtime
from megatron_default_moe.errors import UserError

logger = logging.getLogger(__name__)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(line: str) -> None:
    """Print one line of our own, once per run."""
    if _rank() == 0:
        print(f"> {line}", flush=True)


def _single_process_environment() -> None:
    """Without torchrun, be a run of one process (and let the system choose the port)."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def quiet_expected_warnings() -> None:
    """On the CPU, Megatron warns at import of every library that only a GPU could use."""
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer ?Engine|transformer-engine)")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def build_parser() -> argparse.ArgumentParser:
    """Megatron's parser with this package's flags, whose errors are one sentence."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_default_moe.options.flags import OneSentenceParser

    parser = OneSentenceParser(prog="megatron_default_moe.pretrain", allow_abbrev=False)
    return add_flags(add_megatron_arguments(parser))


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this package's flags and ``--config`` (an ``extra_args_provider`` of Megatron's)."""
    from megatron_default_moe.options.config import add_router_gradient_args

    add_router_gradient_args(parser)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Flags by name, one a line; the command line wins."
    )
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
        raise UserError(f"Megatron refuses these arguments: {reason_of(error)}") from error


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
        attach(transformer, options)
        return gpt_config_from_args(
            args, config=transformer, model_config_cls=DefaultMoEGPTModelConfig
        )
    except UserError:
        raise
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses these arguments: {reason_of(error)}") from error


def prepare(argv: list[str]) -> tuple[Any, Any]:
    """Make this process ready for Megatron, and let it parse and validate the command line.

    Args:
        argv: the command line, without the program's name.

    Returns:
        Megatron's arguments and this package's options.

    Raises:
        UserError: a mistake in the flags or files.
    """
    _single_process_environment()
    on_cpu = runtime.needed()
    if on_cpu or _rank() != 0:
        quiet_expected_warnings()
    if on_cpu:
        runtime.install()
        _say("no CUDA device: running on the CPU (gloo)")
    else:
        _refuse_ranks_without_gpu(os.environ)
        runtime.use_wheel_dataset_helpers()
    from megatron_default_moe.loop import patches
    from megatron_default_moe.options import support
    from megatron_default_moe.options.config import options_from_args
    from megatron_default_moe.options.flags import expand_config, refuse_empty_sizes

    patches.check_version()
    parser = build_parser()
    argv = expand_config(parser, argv)
    if on_cpu:
        from megatron_default_moe.cpu import flag_choices

        argv, chosen = flag_choices.apply(parser, argv)
        _say(f"chosen for the CPU: {' '.join(chosen)}")
    else:
        argv = without_missing_kernel(argv)
    parsed = parser.parse_args(argv)
    refuse_empty_sizes(parsed)
    options = options_from_args(parsed)
    support.check(parsed, options)
    _refuse_no_data(parsed)
    return megatron_args(argv), options


def _refuse_ranks_without_gpu(environment: Mapping[str, str]) -> None:
    """Such a rank ends in 'invalid device ordinal', and the others in whatever that leads to."""
    import torch

    ranks, gpus = int(environment.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    # Only under torchrun, whose ranks all see the node's GPUs and take the one of their number.
    if ranks > gpus and "TORCHELASTIC_RUN_ID" in environment:
        raise UserError(
            f"torchrun starts {ranks} ranks on a node with {gpus} GPUs: --nproc-per-node {gpus}"
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
            _say(f"chosen: {flag} (the fused kernel is Apex's, which is not there)")
            return [*argv, flag]
    return argv


def _refuse_no_data(args: Any) -> None:
    """Megatron takes a run without data for one with mock data, and fails later."""
    named = (args.data_path, args.data_args_path, args.per_split_data_args_path)
    if not (args.mock_data or any(named) or args.train_data_path):
        raise UserError(
            "no data is named: give --train-data-path PREFIX (tools/preprocess_data.py makes it"
            " from JSONL), or --mock-data to try without"
        )


def run(argv: list[str]) -> None:
    """Train as the flags say.

    Args:
        argv: the command line, without the program's name.

    Raises:
        UserError: a mistake in the flags or files.
    """
    args, options = prepare(argv)
    from megatron_default_moe.loop import entry

    options = entry.start(args, options)
    model_config = build_model_config(args, options)
    _say(f"router gradient: {options}")
    _pretrain(args, model_config)


def _pretrain(args: Any, model_config: Any) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_default_moe.data import gpt_data
    from megatron_default_moe.loop import restarts

    pretrain_maybe_restarting, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    try:
        pretrain_maybe_restarting(
            pretrain_cfg_container_from_args(args, model_config),
            gpt_data.datasets_provider(model_config.transformer),
            ModelType.encoder_or_decoder,
            gpt_data.forward_step,
            store=restarts.store_of_this_attempt() if store is None else store,
            get_embedding_ranks=gpt_data.embedding_ranks(model_config.transformer),
        )
    except CheckpointingException as error:
        raise UserError(f"Megatron refuses this checkpoint: {reason_of(error)}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exit_code`."""
    return exit_code(run, sys.argv[1:] if argv is None else argv)


def exit_code(program: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a program, and turn a user's mistake into one line and exit code 2.

    A checkpoint that cannot be read or written is one line too, and exit code 1: nothing was saved
    over the checkpoints before it.
    """
    # Imports nothing of Megatron, which must find the CPU runtime installed.
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        program(argv)
    except UserError as error:
        return errors.report(error)
    except CheckpointException as error:
        if _rank() == 0:  # torch tells every rank what all of them met
            print(f"error: {_checkpoint_reason(error)}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        line = f"error: rank {_rank()}: {error}{_room_for_checkpoints()}"
        print(line, file=sys.stderr, flush=True)
        return 1
    return 0


def _checkpoint_reason(error: Any) -> str:
    """What the ranks met, each once, in a few words: torch's exception holds one failure a rank."""
    failures = [failure for failure, _ in error.failures.values()]
    met = sorted({f"{type(one).__name__}: {' '.join(str(one).split())[:300]}" for one in failures})
    what = "; ".join(met[:3]) + (f"; and {len(met) - 3} more" if len(met) > 3 else "")
    return f"a checkpoint could not be read or written: {what}{_room_for_checkpoints()}"


def _room_for_checkpoints() -> str:
    """The free space where checkpoints go: torch's writer does not name a full disk."""
    from megatron.training.global_vars import get_args

    try:
        folder = get_args().save
    except AssertionError:  # Megatron has not started yet.
        return ""
    if not folder or not os.path.isdir(folder):
        return ""
    return f" ({shutil.disk_usage(folder).free / 1e9:,.3f} GB free in --save {folder})"


if __name__ == "__main__":
    sys.exit(main())
