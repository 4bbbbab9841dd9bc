"""From what the user typed to a list of flags: the YAML file, and mistakes in one sentence.

A config file holds Megatron's (and this package's) flags by name, without the leading dashes:

    num-layers: 4
    moe-router-pre-softmax: true
    moe-router-load-balancing-type: [global_aux_loss]

``true`` sets a switch, ``false`` clears it, ``null`` is as if the line were not there; every other
value reaches its flag as it is written (``1.10`` and ``0123`` may be names). Environment variables
are read as ``${oc.env:NAME}``. ``base: other.yaml`` takes the lines of another file, by its path
from this one, for which this file's own lines win. The command line wins over all files.
``--config`` also takes the name of an example (``examples``) where no file of that name is.
"""

import argparse
import dataclasses
import difflib
import json
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
    that raise what argparse does not catch (KeyError for an unknown name, anything for a pattern).
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
        except (argparse.ArgumentError, UserError):
            raise
        except Exception as error:
            # A pattern is evaluated as Python, and may fail in every way that Python can.
            reason = f"invalid value: {arg_string!r} ({_one_line(error)})"
            raise argparse.ArgumentError(action, reason) from None

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
    values = load(path)
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
    for name, value in in_one_spelling(values, f"--config {path}").items():
        lines.pop(name, None)
        lines[name] = (path, value)
    return lines


def in_one_spelling(values: dict[Any, Any], where: str) -> dict[str, Any]:
    """The lines by the flags' names, so that a line replaces its base's and `false` clears it.

    Args:
        values: lines as they are written.
        where: begins the sentence of a mistake.

    Raises:
        UserError: a flag is there twice.
    """
    lines: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).removeprefix("--").replace("_", "-")
        if value is not None and lines.get(name) is not None:
            raise UserError(f"{where}: {name} is there twice, in two spellings")
        if value is not None or name not in lines:
            lines[name] = value
    return lines


def lines_of(path: pathlib.Path) -> dict[str, Any]:
    """The lines of a file and of its bases by the flags' names; see :func:`text_of`.

    Raises:
        UserError: a file that cannot be read.
    """
    return {name: value for name, (_, value) in _lines_of_file(path, ()).items()}


def text_of(lines: dict[str, Any]) -> str:
    """A file that holds these lines, in alphabetical order.

    Args:
        lines: as :func:`load` returns them.
    """

    def written(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(written(item) for item in value)}]"
        if isinstance(value, Truth):
            return value.text
        # A dollar sign that was filled in once is no variable any more.
        return json.dumps(str(value), ensure_ascii=False).replace("${", "\\\\${")

    return "".join(
        f"{name}: {written(value)}\n" for name, value in sorted(lines.items()) if value is not None
    )


@dataclasses.dataclass(frozen=True)
class Truth:
    """A plain ``true`` or ``false`` (or ``yes``, ``no``, ``on``, ``off``) in a file."""

    on: bool
    text: str

    def __str__(self) -> str:
        """Return what is written there, for a flag that takes a value."""
        return self.text


def load(path: pathlib.Path, what: str = "--config") -> dict[Any, Any]:
    """What a YAML file holds, environment variables filled in: `Truth`, None, text, lists, dicts.

    Args:
        path: the file.
        what: what the file is to the user; begins the sentence of a mistake.

    Raises:
        UserError: the file cannot be read or is no YAML.
    """
    import omegaconf
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        loaded = yaml.load(text, Loader=_text_loader())
        written = {} if loaded is None else loaded
        if not isinstance(written, dict):
            raise UserError(f"{what} {path}: the file must hold lines of the form 'flag: value'")
        config = omegaconf.OmegaConf.create(written)
        values: Any = omegaconf.OmegaConf.to_container(config, resolve=True)
    except omegaconf.errors.InterpolationResolutionError as error:
        raise UserError(f"{what} {path}: {_one_line(error)}") from error
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: not a valid YAML file ({_one_line(error)})") from error
    except OSError as error:
        raise UserError(f"{what} {path}: the file cannot be read ({error.strerror})") from error
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes = {key.value: value for key, value in node.value} if node else {}
    return {key: _as_written(value, nodes.get(str(key))) for key, value in values.items()}


def _as_written(value: Any, node: Any) -> Any:
    """Give truth values the text that they were written as."""
    if isinstance(value, list):
        nodes = node.value if isinstance(getattr(node, "value", None), list) else []
        padded = [*nodes, *[None] * (len(value) - len(nodes))]
        return [_as_written(item, one) for item, one in zip(value, padded, strict=True)]
    if isinstance(value, dict):
        pairs = node.value if isinstance(getattr(node, "value", None), list) else []
        by_key = {pair[0].value: pair[1] for pair in pairs if isinstance(pair, tuple)}
        return {key: _as_written(item, by_key.get(str(key))) for key, item in value.items()}
    if not isinstance(value, bool):
        return value
    text = getattr(node, "value", None)
    # Taken over from another line (`${other}`), it has no text of its own.
    plain = isinstance(text, str) and "$" not in text
    return Truth(value, text if isinstance(text, str) and plain else str(value).lower())


def _text_loader() -> Any:
    """A YAML loader to which a plain word is text, but for ``null`` and truth values.

    Megatron's flags have types of their own: as numbers, ``1.10`` would lose a digit and ``0123``
    be octal. A key that is there twice is an error.
    """
    import yaml

    kept = {"tag:yaml.org,2002:null", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:merge"}

    class TextLoader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
            first: [(tag, form) for tag, form in resolvers if tag in kept]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"found duplicate key {key}", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    return TextLoader


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _flag(parser: argparse.ArgumentParser, path: pathlib.Path, key: str, value: Any) -> list[str]:
    """The command line form of one line of the file."""
    name = "--" + key.removeprefix("--").replace("_", "-")
    if name == "--config" and value is not None:
        raise UserError(
            f"--config {path}: config inside of a file is not read; write base: {value} (its path"
            " from this file) for one file that this one builds on, or give --config several times"
        )
    action = parser._option_string_actions.get(name)
    if action is None:
        raise UserError(f"--config {path}: {key} is not a flag{_nearest(parser, name)}")
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, Truth):
            raise UserError(f"--config {path}: {key} is a switch, write true or false")
        if value.on:
            return [name]
        # A plain switch is off unless it is set; one with a --no- form may be on.
        negative = name.replace("--no-", "--", 1)
        if negative == name:
            negative = name.replace("--", "--no-", 1)
        return [negative] if negative in action.option_strings else []
    if isinstance(value, list):
        if action.nargs is None:
            text = ", ".join(map(str, value))
            raise UserError(
                f"--config {path}: {key} takes one value; write a list that is meant as text in"
                f' quotes: {key}: "[{text}]"'
            )
        return [name, *(str(item) for item in value)]
    text = str(value)
    # As one word, a value with a leading dash is no flag.
    return [f"{name}={text}"] if text.startswith("-") else [name, text]
