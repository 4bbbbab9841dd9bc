"""Contract: whatever ends a command is one line and an exit code, and nothing is swallowed.

2 is the user's mistake. Anything else is 1: what was raised, where, and the file with the
traceback, beside the log and never in a checkpoint's folder; on the screen with ``--traceback``, or
if no folder takes the file. An assertion of this package is no refusal of Megatron's.
"""

import errno
import os
import pathlib
import tempfile
from types import SimpleNamespace
from typing import Any

import entering
import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from megatron_default_moe import exits
from megatron_default_moe.errors import UserError
from megatron_default_moe.loop import command_line

FILE = pathlib.Path("runs/traceback.rank0.txt")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    return tmp_path


def breaking(error: BaseException) -> Any:
    def program(argv: list[str]) -> None:
        raise error

    return program


def test_the_unforeseen_is_one_line_and_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.exit_code(breaking(KeyError("no such\nthing")), ["--lr", "1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(r"error: KeyError: 'no such\nthing' (")
    assert "tests/test_exits.py, line " in said
    assert said.endswith(f"in program); the traceback is in {FILE} (--traceback prints it)\n")
    assert said.count("\n") == 1
    assert "Traceback (most recent call last)" in FILE.read_text()
    assert "raise error" in FILE.read_text()
    # The next one is added: a restart keeps what ended the process before it.
    assert exits.exit_code(breaking(RuntimeError("the second")), []) == 1
    assert FILE.read_text().count("Traceback (most") == 2


def test_every_rank_says_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert exits.exit_code(breaking(KeyError("gone")), []) == 1
    assert capsys.readouterr().err.startswith("error: rank 3: KeyError: 'gone'")
    assert pathlib.Path("runs/traceback.rank3.txt").exists()


def test_the_file_is_beside_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = SimpleNamespace(tensorboard_dir=str(tmp_path / "log"), save=str(tmp_path / "saved"))
    monkeypatch.setattr(exits, "_megatrons_args", lambda: args)
    assert exits.exit_code(breaking(KeyError("gone")), []) == 1
    file = tmp_path / "log" / FILE.name
    assert f"the traceback is in {file} " in capsys.readouterr().err
    assert file.exists()
    assert not FILE.exists()
    assert not (tmp_path / "saved").exists()


def test_the_traceback_is_on_the_screen_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.exit_code(breaking(KeyError("gone")), ["--traceback"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)")
    assert f"the traceback is in {FILE}" in said.splitlines()[-1]


def test_the_traceback_is_on_the_screen_if_no_folder_takes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files stand where folders should be: nobody may write there, root included."""
    (tmp_path / "runs").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    assert exits.exit_code(breaking(KeyError("gone")), []) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)")
    assert said.splitlines()[-1].endswith("the traceback is above")


def test_a_folder_that_cannot_be_written_to_is_passed_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").touch()
    elsewhere = tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    assert exits.exit_code(breaking(KeyError("gone")), []) == 1
    assert f"the traceback is in {elsewhere / FILE.name} " in capsys.readouterr().err


def test_a_checkpoint_error_hides_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """What a rank met is named with its place, and its stack is in the file."""
    try:
        {}["a bug"]  # type: ignore[index]
    except KeyError as bug:
        met = _wrap_exception(bug)
    assert exits.exit_code(breaking(CheckpointException("load", {1: met, 2: met})), []) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: a checkpoint could not be read or written: KeyError: 'a bug' (")
    assert "in test_a_checkpoint_error_hides_no_bug)" in said
    assert said.count("KeyError") == 1
    assert '{}["a bug"]' in FILE.read_text()


def test_a_full_disk_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert exits.exit_code(breaking(full), []) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_mistakes_and_exits_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.exit_code(breaking(UserError("--lr is no number")), []) == 2
    assert capsys.readouterr().err == "error: --lr is no number\n"
    with pytest.raises(SystemExit):
        exits.exit_code(breaking(SystemExit(17)), [])
    assert exits.exit_code(lambda argv: None, []) == 0
    assert exits.exit_code(lambda argv: 1, []) == 1  # As of the doctor.
    assert not FILE.exists()


def test_an_assertion_of_ours_is_no_refusal_of_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_default_moe.loop import model

    argv = (
        "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --num-experts 4 --seq-length 16"
        " --max-position-embeddings 16 --moe-router-topk 1 --moe-router-pre-softmax --mock-data"
        " --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --disable-bias-linear"
        " --tokenizer-type NullTokenizer --vocab-size 31 --lr 1e-3 --eval-iters 0"
    )
    args, options = entering.prepare(monkeypatch, argv)

    def refused() -> str:
        with pytest.raises(UserError) as error:
            command_line.build_model_config(args, options)
        return str(error.value)

    args.tensor_model_parallel_size = 3  # Which does not divide the heads, says Megatron's config.
    assert refused().startswith("Megatron refuses these arguments: ")
    args.tensor_model_parallel_size = 1
    monkeypatch.setattr(
        model.support, "check", lambda *_, **__: (_ for _ in ()).throw(UserError("ours"))
    )
    assert refused() == "ours"

    present = "finalize_model_grads_func"
    monkeypatch.setattr(
        model.support, "check", lambda config, *_, **__: setattr(config, present, len)
    )
    with pytest.raises(AssertionError, match="is already"):
        command_line.build_model_config(args, options)
