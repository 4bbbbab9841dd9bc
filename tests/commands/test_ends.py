"""Every command ends through one exit: an exit code and one line, whatever ended it.

2 is a mistake of the user's, 1 what nobody foresaw (with a file), 130 Ctrl-C, 141 a reader that has
gone; ``--help`` is 0. The command lines run in processes of their own (``forking.py``).
"""

import importlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from forking import BROKEN_PIPE, FULL, Case, End, Server
from training_line import TRAIN

from megatron_default_moe.commands import line
from megatron_default_moe.commands.table import COMMANDS, Command
from megatron_default_moe.errors import UserError

NAMES = [command.name for command in COMMANDS]
PLAN = ("plan", "7.33b-8c1", "--gpus", "64", "--gpu", "h100")

MISTAKES: dict[str, dict[str, tuple[str, ...]]] = {
    "pretrain": {
        "a bad path": (*TRAIN, "--config", "nowhere.yaml"),
        "a folder for a file": (*TRAIN, "--config", "folder"),
        "an unreadable file": (*TRAIN, "--config", "bytes"),
        "a file for a folder": (*TRAIN, "--save", "bytes/below", "--save-interval", "1"),
    },
    "plan": {
        "a bad path": (*PLAN[:1], "nowhere.yaml", *PLAN[2:]),
        "a folder for a file": (*PLAN[:1], "folder", *PLAN[2:]),
        "an unreadable file": (*PLAN[:1], "bytes", *PLAN[2:]),
    },
    "doctor": {"a bad path": ("doctor", "nowhere")},
    "preprocess": {
        "a bad path": ("preprocess", "--input", "nowhere.jsonl", "--output-prefix", "out"),
        "a folder for a file": ("preprocess", "--input", "folder", "--output-prefix", "out"),
        "a file for a folder": ("preprocess", "--input", "jsonl", "--output-prefix", "bytes/below"),
    },
    "report": {
        "a bad path": ("report", "nowhere"),
        "a folder for a file": ("report", "folder"),
        "an unreadable file": ("report", "folder", "--tensorboard-dir", "broken"),
        "a file for a folder": ("report", "bytes"),
    },
    "inspect": {
        "a bad path": ("inspect", "nowhere"),
        "a folder for a file": ("inspect", "folder"),
        "a file for a folder": ("inspect", "bytes"),
    },
    "compare": {
        "a bad path": ("compare", "nowhere.yaml"),
        "a folder for a file": ("compare", "folder"),
        "an unreadable file": ("compare", "bytes"),
    },
    "calibrate": {
        "a bad path": ("calibrate", *TRAIN[1:], "--load", "nowhere", "--save", "new"),
        "a folder for a file": ("calibrate", "--config", "folder"),
        "an unreadable file": ("calibrate", "--config", "bytes"),
    },
    "planted": {
        "a bad setting": ("planted", "--settings", "nowhere"),
        "a file for a folder": ("planted", "--out", "bytes/below"),
    },
}
"""Per command what a user may get wrong, beside flags; ``folder`` and others are made below."""

TOKENIZER = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "31")


def cases() -> Iterator[tuple[str, str, tuple[str, ...], dict[str, Any]]]:
    """Command, what is tried, its command line, and how it is run."""
    for name in NAMES:
        yield name, "help", (name, "--help"), {}
        yield name, "a bad flag", (name, "--no-such-flag"), {}
        yield name, "help to nobody", (name, "--help"), {"output": BROKEN_PIPE}
        yield name, "help to a full disk", (name, "--help"), {"output": FULL}
        for what, argv in MISTAKES[name].items():
            yield name, what, (*argv, *(TOKENIZER if name == "preprocess" else ())), {}
    for argv in (TRAIN, PLAN, ("doctor",)):
        yield argv[0], "output to nobody", argv, {"output": BROKEN_PIPE}
        yield argv[0], "output to a full disk", argv, {"output": FULL}
    yield "pretrain", "Ctrl-C", (*TRAIN, "--train-iters", "9999"), {"interrupt_at": "iteration  "}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[End, Any]]:
    """How each case ended, and its folder."""
    todo, names = [], []
    for name, what, argv, how in cases():
        folder = tmp_path_factory.mktemp(name)
        (folder / "folder").mkdir()
        (folder / "broken").mkdir()
        (folder / "broken/events.out.tfevents.1").write_bytes(bytes(range(256)) * 9)
        (folder / "bytes").write_bytes(b"a: \xff\xfe\x00\x80\n" * 9)
        (folder / "jsonl").write_text('{"text": "1 2 3"}\n')
        names.append((name, what))
        todo.append(Case(argv, str(folder), **how))
    with Server() as server:
        found = server.run(todo)
    return {
        name: (end, pathlib.Path(case.folder))
        for name, end, case in zip(names, found, todo, strict=True)
    }


def of(name: str, what: str) -> Any:
    return pytest.param(name, what, id=f"{name} {what}")


def those(*kinds: str) -> list[Any]:
    found = [of(name, what) for name, what, *_ in cases() if any(kind in what for kind in kinds)]
    assert found
    return found


def sentence(end: End) -> str:
    """The one line on stderr that is no warning of a library."""
    (said,) = re.findall(r"^(?:error: .*|interrupted)$", end.err, re.M)
    assert "Traceback" not in end.err
    assert "Exception ignored" not in end.err
    return said


@pytest.mark.parametrize(("name", "what"), those("help"))
def test_help(ends: Any, name: str, what: str) -> None:
    end, _ = ends[name, what]
    if what == "help":
        assert (end.code, end.err) == (0, "")
        assert f"usage: default-moe {name} " in end.out
    elif what == "help to nobody":
        assert (end.code, end.err) == (141, "")
    else:
        assert end.code == 1
        assert "No space left on device" in sentence(end)


@pytest.mark.parametrize(("name", "what"), those("bad", "for a", "unreadable"))
def test_a_mistake_is_one_sentence(ends: Any, name: str, what: str) -> None:
    end, folder = ends[name, what]
    assert end.code == 2, end.err
    said = sentence(end)
    assert said.removeprefix("error: ")[:1] != "["
    if what == "a bad flag":
        assert "--no-such-flag" in said or "required" in said
    else:
        assert re.search(r"nowhere|folder|bytes|broken", said)
    assert not (folder / "runs").exists()
    assert not list(folder.glob("out*_document*"))


@pytest.mark.parametrize(("name", "what"), those("output to"))
def test_what_cannot_be_written_ends_it(ends: Any, name: str, what: str) -> None:
    end, _ = ends[name, what]
    if what == "output to nobody":
        assert end.code == 141
        assert "rror" not in end.err
    else:
        assert end.code == 1
        assert "No space left on device" in sentence(end)


def test_ctrl_c_is_one_line(ends: Any) -> None:
    end, _ = ends["pretrain", "Ctrl-C"]
    assert "iteration " in end.out
    assert (end.code, sentence(end)) == (130, "interrupted")


@pytest.fixture
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("two\nlines"), 2, "error: two lines"),
        (KeyError("unforeseen"), 1, r"error: KeyError: 'unforeseen' \(.*, in raises\);.*"),
        (FileNotFoundError(2, "Nothing", "a/path"), 1, r"error: FileNotFoundError: .*;.*"),
    ],
    ids=["Ctrl-C", "mistake", "unforeseen", "a path of nobody's"],
)
def test_whatever_a_command_raises(
    here: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: Command,
    raised: BaseException,
    code: int,
    says: str,
) -> None:
    def raises(argv: list[str]) -> None:
        raise raised

    module = importlib.import_module(command.module)
    monkeypatch.setattr(module, "run", raises)
    for main in (module.main, lambda argv: line.main([command.name, *argv])):
        assert main([]) == code
        assert re.fullmatch(says, capsys.readouterr().err.removesuffix("\n"))
    file = here / "runs/traceback.rank0.txt"
    assert file.exists() == (code == 1)
    if code == 1:
        main(["--traceback"])
        assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


def test_no_command_is_without_its_cases() -> None:
    assert list(MISTAKES) == NAMES
