"""Write docs/support.md from the table the program refuses with."""

import pathlib

from megatron_default_moe import support

TEXT = """# What works with default vectors, and what does not

Generated from `megatron_default_moe/support.py` by `python docs/generate_support.py`; a test keeps the
two equal. *refused*: the program ends with this sentence before training starts. *warned*: it says so
and goes on. *(default)*: only with `--moe-router-gradient default`.

"""
PATH = pathlib.Path(__file__).with_name("support.md")


def text() -> str:
    """Return what the file should hold."""
    return TEXT + support.markdown() + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
