"""From what the user typed to a list of flags: the YAML file, and mistakes in one sentence.

A config file holds Megatron's (and this package's) flags by name, without the leading dashes:

    num-layers: 4
    moe-router-pre-softmax: true
    moe-router-load-balancing-type: [global_aux_loss]

``true`` sets a switch, ``false`` clears it, ``null`` is as if the line were not there; environment
variables are read as ``${oc.env:NAME}``. The command line wins over the file.
"""

import argparse
import difflib
import pathlib
from typing import Any, Never

from megatron_default_moe.errors import UserError


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence instead of Megatron's whole usage."""

    def error(self, message: str) -> Never:
        """Raise what argparse would print.

        Raises:
            UserError: always.
        """
        raise UserError(_with_suggestion(self, message))


def _with_suggestion(parser: argparse.ArgumentParser, message: str) -> str:
    """Name the nearest existing flag behind argparse's 'unrecognized arguments'."""
    prefix = "unrecognized arguments: "
    if not message.startswith(prefix):
        return message
    unknown = message.removeprefix(prefix).split()[0].split("=")[0]
    return f"{unknown} is not a flag{_nearest(parser, unknown)}"


def _nearest(parser: argparse.ArgumentParser, flag: str) -> str:
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"; did you mean {near[0]}?" if near else " (--help lists them all)"


def expand_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Replace ``--config FILE`` by the flags in the file, before those on the command line.

    Args:
        parser: Megatron's full parser, to know which flags exist and which are switches.
        argv: the command line, without the program's name.

    Returns:
        The flags of the file, then the other flags of the command line.

    Raises:
        UserError: a file that cannot be read, or a line in it that is no flag.
    """
    finder = OneSentenceParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    found, rest = finder.parse_known_args(argv)
    from_files: list[str] = []
    for path in found.config:
        from_files += _flags_of_file(parser, pathlib.Path(path))
    return [*from_files, *rest]


def _flags_of_file(parser: argparse.ArgumentParser, path: pathlib.Path) -> list[str]:
    import omegaconf
    import yaml

    try:
        loaded = omegaconf.OmegaConf.load(path)
        values = omegaconf.OmegaConf.to_container(loaded, resolve=True)
    except OSError as error:
        raise UserError(f"--config {path}: the file cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path}: not a valid YAML file ({reason})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: the file must hold lines of the form 'flag: value'")
    flags: list[str] = []
    for key, value in values.items():
        flags += _flag(parser, path, str(key), value)
    return flags


def _flag(parser: argparse.ArgumentParser, path: pathlib.Path, key: str, value: Any) -> list[str]:
    """The command line form of one line of the file."""
    name = "--" + key.removeprefix("--").replace("_", "-")
    action = parser._option_string_actions.get(name)
    if action is None:
        raise UserError(f"--config {path}: {key} is not a flag{_nearest(parser, name)}")
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"--config {path}: {key} is a switch, write true or false")
        if value:
            return [name]
        negative = name.replace("--", "--no-", 1)
        # A plain switch is off unless it is set.
        return [negative] if negative in action.option_strings else []
    values = value if isinstance(value, list) else [value]
    return [name, *(str(item) for item in values)]
