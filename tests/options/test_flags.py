"""From a YAML file and a command line to Megatron's parser, and a mistake in one sentence.

Contract: a file holds flags by name, its values are what the parser would read from the command
line, and the command line wins; every mistake, in the file or in a flag, is a UserError of one
line that names the file and the line or the flag, with the nearest flag where one is near.
"""

import argparse
import pathlib
import sys
import types
from collections.abc import Callable

import pytest

from megatron_default_moe import UserError
from megatron_default_moe.cpu import runtime
from megatron_default_moe.loop import command_line
from megatron_default_moe.options import flags
from megatron_default_moe.options.config import add_router_gradient_args, options_from_args

Expand = Callable[..., list[str]]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    runtime.install()
    from megatron.training.arguments import add_megatron_arguments

    return add_router_gradient_args(
        add_megatron_arguments(flags.OneSentenceParser(prog="pretrain", allow_abbrev=False))
    )


@pytest.fixture
def expand(parser: argparse.ArgumentParser, tmp_path: pathlib.Path) -> Expand:
    """Return a function: the flags that a file of this text, before these flags, expands to."""

    def expand(text: str, *argv: str) -> list[str]:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return flags.expand_config(parser, ["--config", str(file), *argv])

    return expand


def refusal(run: Callable[[], object]) -> str:
    """The message of the UserError this raises: one line, not empty."""
    with pytest.raises(UserError) as raised:
        run()
    message = str(raised.value)
    assert message
    assert "\n" not in message
    return message


# What a file means


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num-layers: 4", ["--num-layers", "4"]),
        ("num_layers: 4", ["--num-layers", "4"]),
        ("--num-layers: 4", ["--num-layers", "4"]),
        ("lr: 3e-4", ["--lr", "3e-4"]),
        # As written: numbers that are names, dates, sixties and truths of YAML that are words.
        ("wandb-exp-name: 1.10", ["--wandb-exp-name", "1.10"]),
        ("wandb-exp-name: 0123", ["--wandb-exp-name", "0123"]),
        ("wandb-exp-name: 1_000", ["--wandb-exp-name", "1_000"]),
        ("wandb-exp-name: 2024-05-01", ["--wandb-exp-name", "2024-05-01"]),
        ("wandb-exp-name: 12:30:45", ["--wandb-exp-name", "12:30:45"]),
        ("wandb-exp-name: .inf", ["--wandb-exp-name", ".inf"]),
        ("wandb-exp-name: No", ["--wandb-exp-name", "No"]),
        ("wandb-exp-name: on", ["--wandb-exp-name", "on"]),
        ("data-path: [1.0, 010, yes]", ["--data-path", "1.0", "010", "yes"]),
        ("save: 0123\nload: ${save}", ["--save", "0123", "--load", "0123"]),
        ("swiglu: yes", ["--swiglu"]),
        ("tokenizer-type: NullTokenizer", ["--tokenizer-type", "NullTokenizer"]),
        ("split: 949,50,1", ["--split", "949,50,1"]),
        ("swiglu: true", ["--swiglu"]),
        ("swiglu: false", []),
        ("no-rope-fusion: true", ["--no-rope-fusion"]),
        ("no-rope-fusion: false", []),
        ("default-vector-in-eval: true", ["--default-vector-in-eval"]),
        ("default-vector-in-eval: false", ["--no-default-vector-in-eval"]),
        ("default_vector_in_eval: false", ["--no-default-vector-in-eval"]),
        ("no-default-vector-in-eval: true", ["--no-default-vector-in-eval"]),
        (
            "moe-router-load-balancing-type: [aux_loss, seq_aux_loss]",
            ["--moe-router-load-balancing-type", "aux_loss", "seq_aux_loss"],
        ),
        (
            "moe-router-load-balancing-type: aux_loss",
            ["--moe-router-load-balancing-type", "aux_loss"],
        ),
        ("data-path:\n  - 0.3\n  - a\n  - 0.7\n  - b", ["--data-path", "0.3", "a", "0.7", "b"]),
        ("data-path: [runs/a b]", ["--data-path", "runs/a b"]),
        ("num-layers: null", []),
        ("swiglu:", []),
        ("", []),
        ("# nothing\n", []),
        ("swiglu: true\nnum-layers: 2\n", ["--swiglu", "--num-layers", "2"]),
    ],
)
def test_a_file_becomes_flags(expand: Expand, text: str, expected: list[str]) -> None:
    assert expand(text) == expected


def test_the_flags_of_a_file_parse_to_its_values(
    expand: Expand, parser: argparse.ArgumentParser
) -> None:
    args = parser.parse_args(
        expand(
            "num-layers: 3\nlr: 3e-4\nswiglu: true\nno-rope-fusion: true\n"
            "moe-router-load-balancing-type: [aux_loss, seq_aux_loss]\nmoe-aux-loss-coeff: [1, 2]\n"
            "default-vector-beta: 0.5\ndefault-vector-in-forward: false\ndata-path: [a b, c]\n"
        )
    )
    assert (args.num_layers, args.lr, args.swiglu, args.apply_rope_fusion) == (3, 3e-4, True, False)
    assert args.moe_router_load_balancing_type == ["aux_loss", "seq_aux_loss"]
    assert args.moe_aux_loss_coeff == [1.0, 2.0]
    assert args.data_path == ["a b", "c"]
    options = options_from_args(args)
    assert (options.beta, options.in_forward) == (0.5, False)


@pytest.mark.parametrize("value", ["-1", "-0.5", "-1e-05", "-2.5e-3"])
def test_negative_numbers_reach_the_parser(
    expand: Expand, parser: argparse.ArgumentParser, value: str
) -> None:
    args = parser.parse_args(expand(f"moe-router-force-biased: {value}"))
    assert args.moe_router_force_biased == float(value)


def test_every_flag_of_the_parser_can_be_written_in_a_file(
    expand: Expand, parser: argparse.ArgumentParser
) -> None:
    """Under its own name; null leaves each of them out."""
    names = [flag.removeprefix("--") for flag in parser._option_string_actions if flag[:2] == "--"]
    assert len(names) > 500
    assert expand("".join(f"{name}: null\n" for name in names)) == []


def test_environment_variables(expand: Expand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_FOLDER", "/data/run 1")
    assert expand("save: ${oc.env:RUN_FOLDER}/ckpt") == ["--save", "/data/run 1/ckpt"]
    monkeypatch.delenv("RUN_FOLDER")
    assert expand("save: ${oc.env:RUN_FOLDER,here}") == ["--save", "here"]
    message = refusal(lambda: expand("save: ${oc.env:RUN_FOLDER}"))
    assert "RUN_FOLDER" in message
    assert "run.yaml" in message


def test_one_value_may_refer_to_another(expand: Expand) -> None:
    expected = ["--save", "runs/a", "--load", "runs/a"]
    assert expand("save: runs/a\nload: ${save}") == expected


# The command line beside it


def test_the_command_line_wins(expand: Expand, parser: argparse.ArgumentParser) -> None:
    argv = expand(
        "num-layers: 3\nhidden-size: 64\ndefault-vector-in-eval: false\n"
        "moe-router-load-balancing-type: [aux_loss, seq_aux_loss]\n",
        "--num-layers",
        "5",
        "--default-vector-in-eval",
        "--moe-router-load-balancing-type",
        "none",
    )
    args = parser.parse_args(argv)
    assert (args.num_layers, args.hidden_size) == (5, 64)
    assert args.default_vector_in_eval is True
    assert args.moe_router_load_balancing_type == ["none"]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("form", ["two words", "equals sign"])
def test_the_command_line_wins_wherever_config_stands(
    parser: argparse.ArgumentParser, tmp_path: pathlib.Path, where: str, form: str
) -> None:
    file = tmp_path / "a file.yaml"
    file.write_text("num-layers: 3\nhidden-size: 64\n")
    config = ["--config", str(file)] if form == "two words" else [f"--config={file}"]
    rest = ["--num-layers", "5", "--swiglu", "--lr=0.1"]
    place = {"first": 0, "middle": 2, "last": len(rest)}[where]
    argv = flags.expand_config(parser, rest[:place] + config + rest[place:])
    assert argv == ["--num-layers", "3", "--hidden-size", "64", *rest]
    assert parser.parse_args(argv).num_layers == 5


def test_a_later_file_wins_over_an_earlier_one(
    parser: argparse.ArgumentParser, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "a.yaml").write_text("num-layers: 1\nhidden-size: 8\n")
    (tmp_path / "b.yaml").write_text("num-layers: 2\n")
    argv = [f"--config={tmp_path / 'a.yaml'}", f"--config={tmp_path / 'b.yaml'}"]
    args = parser.parse_args(flags.expand_config(parser, argv))
    assert (args.num_layers, args.hidden_size) == (2, 8)


def test_without_config_the_command_line_stays_as_it_is(parser: argparse.ArgumentParser) -> None:
    argv = ["--num-layers", "5", "--data-path", "a b", "c", "--configure", "--lr", "-1", "--x=-y"]
    assert flags.expand_config(parser, argv) == argv


# Mistakes in a file


def test_a_missing_file_is_named(parser: argparse.ArgumentParser, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "absent.yaml"
    message = refusal(lambda: flags.expand_config(parser, ["--config", str(file)]))
    assert message.startswith(f"--config {file}: ")
    assert "No such file" in message


def test_a_folder_is_no_file(parser: argparse.ArgumentParser, tmp_path: pathlib.Path) -> None:
    message = refusal(lambda: flags.expand_config(parser, ["--config", str(tmp_path)]))
    assert f"--config {tmp_path}: the file cannot be read" in message


def test_config_without_a_file(parser: argparse.ArgumentParser) -> None:
    assert "--config" in refusal(lambda: flags.expand_config(parser, ["--config"]))


MISTAKES_IN_A_FILE = {
    "num-layers: [1": ["not a valid YAML file", "line 1"],
    "a: b: c": ["not a valid YAML file"],
    "num-layers: 1\nnum-layers: 2": ["not a valid YAML file", "num-layers"],
    "num-layers: 1\nnum_layers: 2": ["num-layers is there twice"],
    "- num-layers\n- 4": ["flag: value"],
    "3": ["flag: value"],
    "moe-router-tpk: 1": ["moe-router-tpk is not a flag", "--moe-router-topk"],
    "default-vector-betta: 1": ["did you mean --default-vector-beta?"],
    "zzzzqqqq: 1": ["zzzzqqqq is not a flag", "--help"],
    "config: other.yaml": ["config inside of a file", "base: other.yaml"],
    "swiglu: 1": ["swiglu is a switch", "true or false"],
    "swiglu: 'true'": ["swiglu is a switch", "true or false"],
    "swiglu: [true]": ["swiglu is a switch", "true or false"],
}


@pytest.mark.parametrize("text", MISTAKES_IN_A_FILE)
def test_a_mistake_in_the_file_is_named(expand: Expand, text: str) -> None:
    message = refusal(lambda: expand(text))
    assert message.startswith("--config ")
    assert "run.yaml: " in message
    for word in MISTAKES_IN_A_FILE[text]:
        assert word in message


def test_an_unknown_flag_without_anything_near_suggests_nothing(expand: Expand) -> None:
    assert "did you mean" not in refusal(lambda: expand("zzzzqqqq: 1"))


def test_a_file_that_is_no_text(parser: argparse.ArgumentParser, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00num-layers")
    message = refusal(lambda: flags.expand_config(parser, ["--config", str(file)]))
    assert str(file) in message


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("num-layers: true", "--num-layers"),
        ("num-layers: {a: 1}", "--num-layers"),
        ("moe-router-load-balancing-type: []", "--moe-router-load-balancing-type"),
        ("num-layers: four", "--num-layers"),
    ],
)
def test_a_value_of_the_wrong_kind_names_the_flag(
    expand: Expand, parser: argparse.ArgumentParser, text: str, flag: str
) -> None:
    assert flag in refusal(lambda: parser.parse_args(expand(text)))


# Mistakes in a flag


MISTAKES_IN_A_FLAG = {
    "--moe-router-tpk 1": ["--moe-router-tpk is not a flag", "--moe-router-topk?"],
    "--moe-router-tpk=1": ["--moe-router-tpk is not a flag", "--moe-router-topk?"],
    "--no-default-vector-in-forwrd": ["did you mean --no-default-vector-in-forward?"],
    "--default-vector-be 0.5": ["--default-vector-be is not a flag", "-beta?"],
    "--zzzzqqqq": ["--zzzzqqqq is not a flag", "--help"],
    "stray": ["stray is not a flag"],
    "--moe-router-gradient topp": ["--moe-router-gradient", "'topp'", "'topk'"],
    "--fp8-format x": ["--fp8-format", "'x'", "e4m3"],
    "--num-layers four": ["--num-layers", "'four'", "int"],
    "--default-vector-beta high": ["--default-vector-beta", "'high'", "float"],
    "--num-layers": ["--num-layers", "expected one argument"],
    "--swiglu=1": ["--swiglu", "'1'"],
    "--attention-backend flsh": ["--attention-backend", "flsh"],
    "--cuda-graph-modules atn": ["--cuda-graph-modules", "atn"],
}


@pytest.mark.parametrize("line", MISTAKES_IN_A_FLAG)
def test_a_mistake_in_a_flag_is_one_sentence(parser: argparse.ArgumentParser, line: str) -> None:
    message = refusal(lambda: parser.parse_args(line.split()))
    assert "usage:" not in message
    for word in MISTAKES_IN_A_FLAG[line]:
        assert word in message


def test_no_usage_is_printed(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal(lambda: parser.parse_args(["--num-layers", "four"]))
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_help_shows_our_flags(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "router gradient (megatron_default_moe)" in shown
    assert "--default-vector-beta" in shown
    assert "--moe-router-topk" in shown


def write(folder: pathlib.Path, **files: str) -> pathlib.Path:
    """Write files NAME.yaml and return the path of `run`."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "run.yaml"


def test_a_base_holds_the_lines_that_the_file_does_not(
    parser: argparse.ArgumentParser, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", model="base: common.yaml\nnum-layers: 2\nswiglu: true\nseed: 5")
    write(tmp_path / "base", common="num-layers: 1\nhidden-size: 8\nbf16: true\nsplit: 1,0,0")
    run = write(tmp_path, run="base: base/model.yaml\nhidden_size: 16\nswiglu: false\nsplit:")
    words = flags.expand_config(parser, ["--config", str(run), "--seed", "6"])
    args = parser.parse_args(words)
    assert (args.num_layers, args.hidden_size, args.seed) == (2, 16, 6)
    assert (args.bf16, args.swiglu, args.split) == (True, False, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: nowhere.yaml", "base nowhere.yaml is not a file"),
        ("base: [a.yaml, b.yaml]", "base takes the path of one file"),
        ("base: run.yaml", "leads back"),
        ("base: other.yaml", "leads back"),
        ("base: wrong.yaml", "wrong.yaml: num-layerz is not a flag"),
    ],
)
def test_mistakes_with_a_base(
    parser: argparse.ArgumentParser, tmp_path: pathlib.Path, text: str, words: str
) -> None:
    run = write(tmp_path, run=text, other="base: run.yaml", wrong="num-layerz: 3")
    assert words in refusal(lambda: flags.expand_config(parser, ["--config", str(run)]))


# -- On a GPU --------------------------------------------------------------------------------------

ON_A_GPU = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1"
    " --max-position-embeddings 8 --lr 0.1 --train-iters 2 --mock-data --num-experts 2"
    " --moe-router-topk 1 --moe-router-pre-softmax --tokenizer-type NullTokenizer --vocab-size 9"
    " --transformer-impl local --disable-bias-linear"
)


@pytest.mark.parametrize("there", [False, True], ids=["missing", "there"])
def test_without_its_kernel_fused_gradient_accumulation_is_turned_off(
    there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "fused_weight_gradient_mlp_cuda"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if there else None)
    monkeypatch.setattr(runtime, "needed", lambda: False)
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    # Megatron keeps the arguments it validated in a global variable, and refuses a second time.
    monkeypatch.setattr(command_line, "megatron_args", lambda argv: argv)
    monkeypatch.setattr(command_line.checks, "check", lambda args: None)
    argv, _ = command_line.prepare(ON_A_GPU.split())
    assert command_line.build_parser().parse_args(argv).gradient_accumulation_fusion == there
    assert ("> chosen: --no-gradient-accumulation-fusion (" in capsys.readouterr().out) != there
