"""From what the user typed to a list of flags: the YAML file, and mistakes in one sentence.

A config file holds Megatron's (and this package's) flags by name, without the leading dashes:

    num-layers: 4
    moe-router-pre-softmax: true
    moe-router-load-balancing-type: [global_aux_loss]

``true`` sets a switch, ``false`` clears it, ``null`` is as if the line were not there; environment
variables are read as ``${oc.env:NAME}``. ``base: other.yaml`` takes the lines of another file, by
its path from this one, for which this file's own lines win. The command line wins over all files.
``--config`` also takes the name of an example (``examples``) where no file of that name is.
"""

import argparse
import difflib
import pathlib
import re
from typing import Any, Never

from megatron_default_moe.errors import UserError
from megatron_default_moe.options import examples

_PERCENT = re.compile(r"(%%|%\(\w+\)s)|%")
"""argparse's placeholders and escaped percent signs as group 1, or a bare percent sign."""


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence instead of Megatron's whole usage.

    It also mends two slips of upstream's own flags: help texts with a bare percent sign, and types
    that answer an unknown name with KeyError, which argparse does not catch.
    """

    def format_help(self) -> str:
        """Return the help, with percent signs that belong to no placeholder escaped."""
        for action in self._actions:
            if isinstance(action.help, str):
                action.help = _PERCENT.sub(lambda found: found.group(1) or "%%", action.help)
        return super().format_help()

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except KeyError:
            names = ", ".join(
                getattr(choice, "name", str(choice)) for choice in action.choices or ()
            )
            known = f" (choose from {names})" if names else ""
            raise argparse.ArgumentError(action, f"invalid choice: {arg_string!r}{known}") from None

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
        from_files += _flags_of_file(parser, examples.file_of(path))
    return [*from_files, *rest]


def _flags_of_file(parser: argparse.ArgumentParser, path: pathlib.Path) -> list[str]:
    flags: list[str] = []
    for key, (home, value) in _lines_of_file(path, ()).items():
        flags += _flag(parser, home, key, value)
    return flags


def _lines_of_file(
    path: pathlib.Path, derived: tuple[pathlib.Path, ...]
) -> dict[str, tuple[pathlib.Path, Any]]:
    """The lines of a file and of its bases: each flag's last value, and the file that it is from.

    Args:
        path: the file.
        derived: the files that name this one as their base, to notice a circle.
    """
    values = _load(path)
    lines: dict[str, tuple[pathlib.Path, Any]] = {}
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"--config {path}: base takes the path of one file")
        base_path = path.parent / base
        seen = (*derived, path)
        if any(base_path.resolve() == file.resolve() for file in seen):
            raise UserError(f"--config {path}: base {base} leads back to a file that builds on it")
        if not base_path.is_file():
            raise UserError(
                f"--config {path}: base {base} is not a file (its path starts from this file's"
                " folder)"
            )
        lines = _lines_of_file(base_path, seen)
    own: set[str] = set()
    for key, value in values.items():
        # One spelling per flag, so that a line replaces its base's and `false` clears its switch.
        name = str(key).removeprefix("--").replace("_", "-")
        if value is not None:
            if name in own:
                raise UserError(f"--config {path}: {name} is there twice, in two spellings")
            own.add(name)
        lines.pop(name, None)
        lines[name] = (path, value)
    return lines


def _load(path: pathlib.Path) -> dict[Any, Any]:
    """What a YAML file holds, environment variables filled in."""
    import omegaconf
    import yaml

    try:
        loaded = omegaconf.OmegaConf.load(path)
        values = omegaconf.OmegaConf.to_container(loaded, resolve=True)
    except omegaconf.errors.InterpolationResolutionError as error:
        raise UserError(f"--config {path}: {_one_line(error)}") from error
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a valid YAML file ({_one_line(error)})") from error
    except OSError as error:
        # OmegaConf raises one of its own, without an error number, for a file without lines.
        if error.strerror is None:
            values = None
        else:
            raise UserError(
                f"--config {path}: the file cannot be read ({error.strerror})"
            ) from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: the file must hold lines of the form 'flag: value'")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
        # A plain switch is off unless it is set; one with a --no- form may be on.
        negative = name.replace("--no-", "--", 1)
        if negative == name:
            negative = name.replace("--", "--no-", 1)
        return [negative] if negative in action.option_strings else []
    if isinstance(value, list):
        if action.nargs is None:
            raise UserError(
                f"--config {path}: {key} takes one value; write a list that is meant as text in"
                f' quotes: {key}: "{value}"'
            )
        return [name, *(str(item) for item in value)]
    text = str(value)
    # As one word, a value with a leading dash is no flag.
    return [f"{name}={text}"] if text.startswith("-") else [name, text]


SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
    "micro_batch_size",
    "global_batch_size",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
)
"""What Megatron divides by, or builds nothing from if it is zero."""


def refuse_empty_sizes(args: argparse.Namespace) -> None:
    """Refuse a size of a model or a layout that is zero or negative.

    Args:
        args: Megatron's arguments, parsed and not yet validated.

    Raises:
        UserError: with the flag.
    """
    for name in SIZES:
        size = getattr(args, name)
        if size is not None and size < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {size}")
