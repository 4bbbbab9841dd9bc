"""``default-moe``: its help at once, each command by its name, a mistake in one sentence.

What needs torch and Megatron is imported by the chosen command alone; ``test_wheel.py`` shows the
help in an environment that has neither.
"""

import concurrent.futures
import importlib
import pathlib
import runpy
import subprocess
import sys
import time

import pytest

import megatron_default_moe
from megatron_default_moe.commands import line
from megatron_default_moe.commands.table import COMMANDS, Command

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = [command.name for command in COMMANDS]
TOOLS = {
    "plan": "plan",
    "doctor": "doctor",
    "preprocess": "preprocess_data",
    "report": "report",
    "compare": "compare",
    "calibrate": "calibrate",
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the entry would set for a run of one process, undone after the test."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_help_has_a_line_for_each_command(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert line.main(words) == 0
    lines = [text.split() for text in capsys.readouterr().out.splitlines()]
    assert [text[0] for text in lines if text and text[0] in NAMES] == NAMES
    assert all(len(text) > 3 for text in lines if text and text[0] in NAMES)


def test_the_help_imports_nothing_that_takes_time() -> None:
    program = (
        "import sys; from megatron_default_moe.commands.line import main; main(['--help']);"
        "main(['paln']); sys.exit({'torch', 'megatron', 'numpy'} & set(sys.modules) != set())"
    )
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    assert time.monotonic() - before < 10


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("paln", "error: paln is not a command of default-moe; did you mean plan?"),
        ("calibration", "error: calibration is not a command of default-moe; did you mean cal"),
        (
            "--num-layers",
            f"error: --num-layers is not a command of default-moe; the commands are "
            f"{', '.join(NAMES)}",
        ),
    ],
)
def test_an_unknown_command_is_one_sentence(
    capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    assert line.main([name, "--help"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(says)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"default-moe {megatron_default_moe.__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_is_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["default-moe"])
    with pytest.raises(SystemExit) as ended:
        line.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: default-moe {name} " in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_commands_module_runs_when_it_is_the_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """``python -m`` with it does not end with exit code 0 and nothing done."""
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command.module, run_name="__main__")
    assert ended.value.code == 0
    assert f"usage: default-moe {command.name} " in capsys.readouterr().out


def libraries() -> list[str]:
    """Every module of the package that is no command."""
    package = ROOT / megatron_default_moe.__name__
    files = [path.relative_to(ROOT).with_suffix("").parts for path in package.rglob("*.py")]
    modules = {".".join(parts).removesuffix(".__init__") for parts in files}
    programs = {"megatron_default_moe", "megatron_default_moe.__main__"}
    programs |= {"megatron_default_moe.commands.line", *(one.module for one in COMMANDS)}
    assert programs < modules
    return [*sorted(modules - programs), "megatron_default_moe.doctor"]  # It once was there.


def test_no_library_does_nothing_when_it_is_the_program() -> None:
    """``python -m`` with any module is a command, or ends in one sentence before it imports."""

    def run(module: str) -> tuple[int, str]:
        program = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(
            program, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout + done.stderr

    modules = libraries()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = dict(zip(modules, pool.map(run, modules), strict=True))
    for module, (code, said) in ends.items():
        assert (code, said.count("\n")) == (2, 1), module
        assert said.startswith(f"error: {module} is no command: default-moe ")
    assert ends["megatron_default_moe.doctor"][1].endswith("default-moe doctor\n")
    assert ends["megatron_default_moe.plan"][1].endswith("default-moe plan\n")
    assert ends["megatron_default_moe.layers.overlap"][1].endswith("default-moe --help\n")


def test_the_package_is_the_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "paln"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("megatron_default_moe", run_name="__main__")
    assert ended.value.code == 2
    assert "did you mean plan?" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "tool"), TOOLS.items())
def test_the_tools_are_the_commands(name: str, tool: str) -> None:
    script = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))
    assert script["main"] is importlib.import_module(line.find(name).module).main


def test_exit_codes_and_sentences_are_the_commands_own(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    assert line.main(["report", str(tmp_path)]) == 2
    assert "--tensorboard-dir" in capsys.readouterr().err
    assert line.main(["plan", "7.33b-8c1", "--gpus", "0", "--gpu", "h100"]) == 2
    assert capsys.readouterr().err == "error: --gpus must be at least 1, not 0\n"
    assert line.main(["calibrate", "--calibration-batches", "0"]) == 2
    assert "--calibration-batches" in capsys.readouterr().err


def test_a_library_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(line.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(line.importlib, "import_module", lambda _: missing("megatron.training"))
    assert line.main(["plan"]) == 2
    assert capsys.readouterr().err.startswith("error: default-moe plan needs megatron, which is")
    # One of ours, or a library's own: a defect, which keeps its traceback.
    monkeypatch.chdir(tmp_path)
    for name in ("megatron_default_moe.attic", "transformer_engine"):
        monkeypatch.setattr(line.importlib, "import_module", lambda _, name=name: missing(name))
        assert line.main(["plan"]) == 1
        assert "Traceback" in (tmp_path / "runs/traceback.rank0.txt").read_text()
