"""From ``default-moe COMMAND ...`` to the command's ``main``.

The help needs neither torch nor Megatron: a command's module is imported when it was chosen.
"""

import difflib
import importlib
import importlib.util
import sys

import megatron_default_moe
from megatron_default_moe import exits
from megatron_default_moe.commands.table import COMMANDS, Command
from megatron_default_moe.errors import UserError

REQUIRED = ("torch", "megatron", "numpy", "yaml", "omegaconf", "tensorboard", "matplotlib")
"""What commands import, by the name of the import; its absence is said in a sentence."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; whatever ends it is one line and an exit code (``exits.py``).

    Args:
        argv: the command line without the program's name; the process's by default.
    """
    return exits.exit_code(_run, sys.argv[1:] if argv is None else argv)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        print(f"default-moe {megatron_default_moe.__version__}")
        return 0
    return run(find(words[0]), words[1:])


def help_text() -> str:
    """One line for each command."""
    width = max(len(command.name) for command in COMMANDS)
    return "\n".join(
        [
            "usage: default-moe COMMAND ...",
            "",
            "Default MoE on Megatron-Core: a sparse mixture of experts whose router learns from",
            "every expert.",
            "",
            *(f"  {command.name:<{width}}  {command.does}" for command in COMMANDS),
            "",
            "default-moe COMMAND --help shows a command's flags.",
        ]
    )


def find(name: str) -> Command:
    """The command of this name.

    Raises:
        UserError: there is none; with the nearest.
    """
    by_name = {command.name: command for command in COMMANDS}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name, by_name, n=1)
    way_out = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(by_name)}"
    raise UserError(f"{name} is not a command of default-moe; {way_out}")


def run(command: Command, argv: list[str]) -> int:
    """Import a command's module and run it.

    Raises:
        UserError: a library that the command needs is not installed.
    """
    try:
        code: int = importlib.import_module(command.module).main(argv)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in REQUIRED or importlib.util.find_spec(missing) is not None:
            raise
        raise UserError(
            f"default-moe {command.name} needs {missing}, which is not installed: install this"
            " package with its extra [training]; default-moe doctor says what else is missing"
        ) from error
    return code


if __name__ == "__main__":
    sys.exit(main())
