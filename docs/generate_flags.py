"""Write docs/flags.md from the dataclass that the command line's flags are generated from."""

import argparse
import pathlib
import re

from megatron_default_moe.cpu import runtime
from megatron_default_moe.loop.command_line import quiet_expected_warnings
from megatron_default_moe.options import config

TEXT = """# Flags

Generated from `megatron_default_moe/options/config.py` by `python docs/generate_flags.py`; a test
keeps the two equal. `default-moe pretrain --help` shows them in the group *router gradient*, beside
Megatron's own. In a YAML file they stand by name, without the dashes (`examples/quickstart.yaml`);
the command line wins over the file. In Python they are the fields of `RouterGradientConfig`.

The gate must be a softmax over all experts before top-k: `--moe-router-pre-softmax`. What does not
work with default vectors is refused before training starts, in one sentence that names the flag;
the table is in [support.md](support.md). (Under torchrun the sentence is followed by torchrun's own
report of the failed ranks.)

`--moe-router-gradient topk` is stock Megatron, bit for bit; with `global_aux_loss` and several
data-parallel ranks together with `--no-moe-global-aux-loss-exact`.

`--paper-default-moe` is the published method with this package's weighting. The paper's runs
weighted uniformly, with a beta of their own for each model: `examples/base/paper.yaml` lists them.

| flag | default | meaning |
|---|---|---|
"""
PATH = pathlib.Path(__file__).with_name("flags.md")


def text() -> str:
    """Return what the file should hold."""
    quiet_expected_warnings()
    runtime.install()
    parser = argparse.ArgumentParser(add_help=False)
    config.add_router_gradient_args(parser)
    return TEXT + "".join(_row(action) for action in parser._actions)


def _row(action: argparse.Action) -> str:
    """One line of the table: the flag with its values, its default, its help."""
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        flag = flag.replace("--", "--[no-]", 1)
    elif action.choices:
        flag += f" {{{','.join(str(choice) for choice in action.choices)}}}"
    meaning, _, default = (action.help or "").rpartition(" Default: ")
    if not meaning:
        meaning, default = default, "off."
    # Flags and values that a help text names are code on the page.
    meaning = re.sub(r"(?<![\w-])--[a-z][a-z-]*[a-z]|'[a-z-]+'", _as_code, meaning)
    return f"| `{flag}` | {default.removesuffix('.')} | {meaning} |\n"


def _as_code(found: re.Match[str]) -> str:
    return f"`{found[0].strip(chr(39))}`"


if __name__ == "__main__":
    PATH.write_text(text())
