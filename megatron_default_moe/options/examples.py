"""The configurations that come with the package, by name: ``--config 7.33b-8c1``.

They are the files of ``examples/`` in a checkout, and lie in the package's own folder once it is
installed from a wheel (``setup.py`` puts them there).
"""

import os
import pathlib

from megatron_default_moe.errors import UserError

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def known() -> dict[str, pathlib.Path]:
    """The examples' files by name, in alphabetical order."""
    folder = _PACKAGE / "examples"
    if not folder.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        folder = _PACKAGE.parent / "examples"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def file_of(name: str) -> pathlib.Path:
    """The file that ``--config`` names: a path, or the name of an example.

    Args:
        name: as the user wrote it. What is a file here, or has a folder in it, is a path.

    Raises:
        UserError: neither a file nor an example; with the names of the examples.
    """
    path = pathlib.Path(name)
    if path.is_file() or os.path.dirname(name):
        return path
    examples = known()
    if (key := name.removesuffix(".yaml")) in examples:
        return examples[key]
    if path.exists():
        return path
    raise UserError(
        f"--config {name}: there is no such file here, and no example of this name; the examples"
        f" are {', '.join(examples)}"
    )
