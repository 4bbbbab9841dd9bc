"""The house: imports go one way, no module imports itself by a detour, no room is full.

Each rule is shown to fail by a fault planted into a copy of the package.
"""

import pathlib
import shutil

import pytest
from rooms import FACADES, MAY_IMPORT, PACKAGE, circles, faults, imports, modules, room

SOURCE = pathlib.Path(__file__).resolve().parents[2] / PACKAGE


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the package, to plant faults into."""
    ignored = shutil.ignore_patterns("__pycache__")
    return pathlib.Path(shutil.copytree(SOURCE, tmp_path / PACKAGE, ignore=ignored))


def test_imports_go_one_way_and_no_room_is_full() -> None:
    assert faults(SOURCE) == []


def test_every_module_is_read_and_its_imports_are_found() -> None:
    files = modules(SOURCE)
    assert {room(name) for name in files} <= FACADES | set(MAY_IMPORT)
    found = {name: set(imports(path, set(files))) for name, path in files.items()}
    assert ("errors", True) in found["options.flags"]
    # Inside a function, and in a table.
    assert ("layers.optimizer_step", True) in found["loop.calibrate"]
    assert ("loop.training", False) in found["loop.patches"]
    assert ("maths.functional", True) in found["functional"]


@pytest.mark.parametrize(
    ("module", "line", "says"),
    [
        ("layers/overlap", "from megatron_default_moe.loop import patches", "loop.patches"),
        ("layers/overlap", "import megatron_default_moe.pretrain", "pretrain"),
        ("maths/naive", "from megatron_default_moe.errors import UserError", "errors"),
        ("kernels/sums", "def f(): from megatron_default_moe.options import flags", "options"),
        ("cpu/runtime", "from megatron_default_moe.machine.facts import look", "machine.facts"),
        ("loop/entry", "def f():\n    from megatron_default_moe import pretrain", "pretrain"),
        ("loop/patches", "X = 'megatron_default_moe.plan.planner:make'", "plan.planner"),
        ("plan/page", "from megatron_default_moe.pretrain import main", "pretrain"),
        ("report/plots", "import megatron_default_moe", "imports megatron_default_moe,"),
        ("loop/entry", "from megatron_default_moe import UserError", "megatron_default_moe,"),
        ("layers/overlap", "from megatron_default_moe.functional import ema", "functional"),
        ("attic/old", "", "is in no room"),
    ],
)
def test_a_planted_import_is_found(copy: pathlib.Path, module: str, line: str, says: str) -> None:
    file = copy / f"{module}.py"
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as source:
        source.write(f"\n{line}\n")
    assert [one for one in faults(copy) if one.startswith(f"{module.replace('/', '.')} ")]
    assert any(says in one for one in faults(copy))


def test_a_planted_circle_is_found(copy: pathlib.Path) -> None:
    """Of three modules, and through a function."""
    for here, there in (("one", "two"), ("two", "three"), ("three", "one")):
        text = f"def later():\n    from {PACKAGE}.report import {there}\n"
        (copy / "report" / f"{here}.py").write_text(text)
    (circle,) = circles(copy)
    assert circle.count("report.") == 4


def test_a_full_room_is_found(copy: pathlib.Path) -> None:
    for number in range(12):
        (copy / "maths" / f"more_{number}.py").write_text("")
    assert [one for one in faults(copy) if "maths holds" in one]
