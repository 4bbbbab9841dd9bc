"""Every arm's flags, checked before the first run starts: as the training entry will."""

import argparse
import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from megatron_default_moe.compare.study import Study
from megatron_default_moe.errors import UserError
from megatron_default_moe.options import flags


def check(study: Study, here: bool = True) -> None:
    """Refuse an arm whose flags the training would refuse before Megatron starts.

    Args:
        study: the study.
        here: whether the runs will be on this machine.

    Raises:
        UserError: with the arm.
    """
    from megatron_default_moe.cpu import flag_choices, runtime
    from megatron_default_moe.loop import command_line

    on_cpu = runtime.needed()
    if on_cpu:
        command_line.quiet_expected_warnings()
        runtime.install()
    parser = command_line.build_parser()
    with _each_warning_once():
        for arm, lines in study.arms.items():
            try:
                argv = _words(parser, lines)
                if on_cpu and here:
                    argv, _ = flag_choices.apply(parser, argv)
                _check_arm(parser.parse_args(argv), study)
            except UserError as error:
                raise UserError(f"study {study.path}: arm {arm}: {error}") from error


@contextlib.contextmanager
def _each_warning_once() -> Iterator[None]:
    """Of a warning that every arm would give, the first alone."""
    from megatron_default_moe.options import support

    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in said
        said.add(message)
        return is_new

    logger = logging.getLogger(support.__name__)
    logger.addFilter(new)
    try:
        yield
    finally:
        logger.removeFilter(new)


def _words(parser: argparse.ArgumentParser, lines: dict[str, Any]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "arm.yaml"
        file.write_text(flags.text_of(lines))
        try:
            return flags.expand_config(parser, ["--config", str(file)])
        except UserError as error:
            raise UserError(str(error).removeprefix(f"--config {file}: ")) from error


def _check_arm(args: argparse.Namespace, study: Study) -> None:
    from megatron_default_moe.data import parts
    from megatron_default_moe.options import layout, numbers, support
    from megatron_default_moe.options.config import options_from_args
    from megatron_default_moe.options.settings import Settings

    if study.corpus:
        args.train_data_path = args.valid_data_path = ["the corpus"]
    numbers.refuse_impossible(args)
    numbers.complete_training(args)
    options = options_from_args(args)
    support.check(args, options)
    if fault := layout.fault(Settings(args, options), study.ranks):
        raise UserError(f"{fault} (ranks is {study.ranks})")
    parts.refuse_unnamed(args)
    if args.eval_iters == 0:
        raise UserError("eval-iters is 0, and validation losses are what is compared")
