"""``--config NAME``: an example by its name, wherever the command is run."""

import argparse
import pathlib

import pytest

from megatron_default_moe import UserError
from megatron_default_moe.loop import command_line
from megatron_default_moe.options import examples, flags

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return command_line.build_parser()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A working folder outside of the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_a_checkout_are_known() -> None:
    assert list(examples.known()) == sorted(path.stem for path in ROOT.glob("examples/*.yaml"))
    assert "7.33b-8c1" in examples.known()


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("examples/*.yaml")))
def test_a_name_is_its_file_with_the_lines_of_its_base(
    parser: argparse.ArgumentParser, name: str
) -> None:
    by_path = flags.expand_config(parser, ["--config", str(ROOT / "examples" / f"{name}.yaml")])
    assert "--num-experts" in by_path
    for spelling in (name, f"{name}.yaml"):
        assert flags.expand_config(parser, ["--config", spelling]) == by_path


def test_a_file_of_that_name_wins(parser: argparse.ArgumentParser, elsewhere: pathlib.Path) -> None:
    (elsewhere / "7.33b-8c1").write_text("num-layers: 3\n")
    assert flags.expand_config(parser, ["--config", "7.33b-8c1"]) == ["--num-layers", "3"]
    assert "3" not in flags.expand_config(parser, ["--config", "7.33b-8c1.yaml"])[:2]


def test_a_folder_of_that_name_does_not(
    parser: argparse.ArgumentParser, elsewhere: pathlib.Path
) -> None:
    (elsewhere / "7.33b-8c1").mkdir()
    assert "--num-layers" in flags.expand_config(parser, ["--config", "7.33b-8c1"])
    (elsewhere / "folder").mkdir()
    with pytest.raises(UserError, match="--config folder: the file cannot be read"):
        flags.expand_config(parser, ["--config", "folder"])


def test_an_unknown_name_lists_the_known(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(UserError) as refused:
        flags.expand_config(parser, ["--config", "7.33b"])
    sentence = str(refused.value)
    assert sentence.startswith("--config 7.33b: there is no such file here, and no example of")
    assert sentence.endswith(f"the examples are {', '.join(examples.known())}")


def test_a_path_is_never_taken_for_a_name(parser: argparse.ArgumentParser) -> None:
    for path in ("configs/7.33b-8c1.yaml", "./7.33b-8c1"):
        with pytest.raises(UserError, match="No such file"):
            flags.expand_config(parser, ["--config", path])
