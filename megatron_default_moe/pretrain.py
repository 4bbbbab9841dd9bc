"""The entry: ``torchrun ... -m megatron_default_moe.pretrain [--config FILE.yaml] <flags>``.

Takes every Megatron flag and this package's, real data and ``--mock-data``, and runs Megatron's own
``pretrain``. Without a CUDA device the same command runs on the CPU (``cpu/``). A user's mistake
ends in one sentence and exit code 2, before any work is done. In one process, ``default-moe
pretrain`` is the same.
"""

import sys
from traceback import extract_tb
from typing import Any

from megatron_default_moe.errors import UserError
from megatron_default_moe.exits import exit_code
from megatron_default_moe.loop.command_line import (
    add_flags,
    build_model_config,
    build_parser,
    megatron_args,
    prepare,
    quiet_expected_warnings,
    reason_of,
    say,
)

__all__ = [
    "add_flags",
    "build_model_config",
    "build_parser",
    "exit_code",
    "main",
    "megatron_args",
    "prepare",
    "quiet_expected_warnings",
    "reason_of",
    "run",
]


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
    say(f"router gradient: {options}")
    _pretrain(args, model_config)


def _pretrain(args: Any, model_config: Any) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_default_moe.data import gpt_data
    from megatron_default_moe.loop import restarts, training

    pretrain_maybe_restarting, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    try:
        pretrain_maybe_restarting(
            pretrain_cfg_container_from_args(args, model_config),
            gpt_data.datasets_provider(model_config.transformer),
            ModelType.encoder_or_decoder,
            gpt_data.forward_step,
            store=restarts.meeting_store(args) if store is None else store,
            get_embedding_ranks=gpt_data.embedding_ranks(model_config.transformer),
            **training.callback_arguments(pretrain),
        )
    except CheckpointingException as error:
        if not any(frame.name == "load_checkpoint" for frame in extract_tb(error.__traceback__)):
            raise  # Of a save: no mistake of the user's.
        raise UserError(f"Megatron refuses this checkpoint: {reason_of(error)}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exit_code`."""
    return exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
