"""Which room of the package may import which, and what the files really import.

A room is a folder of ``megatron_default_moe`` or a file beside them. The thin modules that keep the
public names importable (``FACADES``) are the front door: they import whatever they show, and
nothing below the commands imports them.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

PACKAGE = "megatron_default_moe"
FACADES = {"", "functional", "patches", "entry"}
"""``""`` is the package itself, whose ``__init__`` shows the public names."""

LAYERS = ("maths", "kernels", "options", "errors", "exits")
SIDE_BY_SIDE = ("checkpoint", "cpu", "data", "report", "machine")
TOP = ("plan", "inspection", "planted", "evaluate", "export", "compare", "pretrain")
BELOW_THE_LOOP = (*LAYERS, "layers", "estimators")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "text": ("errors",),
    "exits": ("errors",),
    "maths": (),
    "options": ("errors",),
    "kernels": ("maths",),
    "layers": LAYERS,
    "estimators": (*LAYERS, "layers"),
    **dict.fromkeys(SIDE_BY_SIDE, BELOW_THE_LOOP),
    "data": (*BELOW_THE_LOOP, "text"),
    "loop": (*BELOW_THE_LOOP, *SIDE_BY_SIDE),
    **dict.fromkeys(TOP, (*BELOW_THE_LOOP, *SIDE_BY_SIDE, "loop")),
    **dict.fromkeys(
        ("commands", "__main__"), (*BELOW_THE_LOOP, *SIDE_BY_SIDE, "loop", *TOP, "commands", "")
    ),
}
"""Beside itself. Rooms that are not there yet stand here so that they are built in their place."""

MOST_FILES = 12
"""In one folder, beside its ``__init__``."""

_IN_A_STRING = re.compile(rf"{PACKAGE}((?:\.\w+)+)(?::\w+)?")
"""The form in which tables name what is imported later."""


def modules(package: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of a package by the name of the module, without the package's own name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


def room(module: str) -> str:
    """The room a module is in."""
    return module.split(".")[0]


def imports(path: pathlib.Path, known: set[str]) -> Iterator[tuple[str, bool]]:
    """What a file imports of ours, wherever in it, and whether a statement says so or a string."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not read here; write the name"
            for alias in node.names if _is_ours(node.module or "") else ():
                inner = f"{node.module}.{alias.name}"
                yield from _module(inner, known, statement=True)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name):
                    yield from _module(alias.name, known, statement=True)
        elif isinstance(node, ast.Constant) and (named := _IN_A_STRING.fullmatch(str(node.value))):
            yield from _module(f"{PACKAGE}{named[1]}", known, statement=False)


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _module(name: str, known: set[str], statement: bool) -> Iterator[tuple[str, bool]]:
    """The module that a dotted name is, or is an attribute of."""
    parts = name.split(".")[1:]
    for length in range(len(parts), -1, -1):
        module = ".".join(parts[:length])
        if module in known:
            yield module, statement
            return


def faults(package: pathlib.Path) -> list[str]:
    """One sentence for every import that the order does not allow, and for every full room."""
    files = modules(package)
    found = []
    for module, path in files.items():
        here = room(module)
        if here in FACADES:
            continue
        if here not in MAY_IMPORT:
            found.append(f"{module} is in no room: give it a place in tests/helpers/rooms.py")
            continue
        for target, _ in imports(path, set(files)):
            there = room(target)
            if there != here and there not in MAY_IMPORT[here]:
                found.append(f"{module} imports {target or PACKAGE}, which is not below {here}")
    for folder in sorted({path.parent for path in files.values()}):
        count = len([one for one in folder.glob("*.py") if one.name != "__init__.py"])
        if count > MOST_FILES:
            found.append(f"{folder.name} holds {count} files: make it two rooms")
    return found + circles(package)


def circles(package: pathlib.Path) -> list[str]:
    """One sentence for every circle of import statements, facades included."""
    files = modules(package)
    edges = {
        module: sorted({to for to, statement in imports(path, set(files)) if statement} - {module})
        for module, path in files.items()
    }
    found: list[str] = []
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" imports ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for to in edges[module]:
                follow(to, [*way, module])
            done.add(module)

    for module in edges:
        follow(module, [])
    return found
