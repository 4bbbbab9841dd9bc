"""What an entry script does between Megatron's arguments and ``pretrain``.

Contract: the flags come after the script's own; ``prepare`` gives the config this package builds
from, hooked and with every field of the script's; a mistake ends the process with one sentence and
exit code 2; what only this package's own entry cannot do is not refused in another script.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import entering
import pytest

from megatron_default_moe import DefaultMoEGPTModelConfig, UserError
from megatron_default_moe.loop import command_line, entry, patches
from megatron_default_moe.options import support
from megatron_default_moe.options.config import options_from_args

FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --num-experts 4 --moe-router-topk 1"
    " --moe-router-pre-softmax --disable-bias-linear --train-iters 5 --global-batch-size 2"
    " --untie-embeddings-and-output-weights --rotary-base 777 --moe-aux-loss-coeff 0.0"
)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    from megatron.core.transformer.moe import moe_logging

    before = moe_logging.get_moe_metrics_tracker()
    yield
    moe_logging.set_moe_metrics_tracker(before)
    patches.uninstall()


def parsed(line: str) -> Any:
    from megatron.training.arguments import add_megatron_arguments

    def own(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--own-flag", type=int)
        return parser

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return entry.with_flags(own)(parser).parse_args(line.split())


def stock_config(args: Any) -> Any:
    """The config of the script, from the transformer config and a few fields of its own."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    transformer = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_moe_experts=args.num_experts,
        moe_router_topk=args.moe_router_topk,
        moe_router_pre_softmax=args.moe_router_pre_softmax,
        moe_ffn_hidden_size=8,
        add_bias_linear=False,
    )
    return GPTModelConfig(
        transformer=transformer,
        vocab_size=100,
        seq_length=16,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=False,
    )


def test_the_flags_come_beside_the_scripts_own() -> None:
    args = parsed(f"{FLAGS} --own-flag 3 --default-vector-beta 0.5")
    assert args.own_flag == 3
    assert options_from_args(args).beta == 0.5


@pytest.mark.parametrize("gradient", ["default", "topk"])
def test_prepare_hooks_the_options_into_the_scripts_config(gradient: str) -> None:
    args = parsed(f"{FLAGS} --moe-router-gradient {gradient}")
    stock = stock_config(args)
    ours = entry.prepare(args, stock)
    assert type(ours) is DefaultMoEGPTModelConfig
    for field in dataclasses.fields(stock):
        assert getattr(ours, field.name) is getattr(stock, field.name), field.name
    assert ours.transformer.router_gradient.gradient == gradient
    assert ours.transformer.finalize_model_grads_func is not None
    assert patches.installed()


def test_a_mistake_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed(f"{FLAGS} --moe-router-topk 2 --moe-router-score-function sigmoid")
    with pytest.raises(SystemExit) as end:
        entry.prepare(args, stock_config(parsed(FLAGS)))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --moe-router-score-function ")
    assert said.count("\n") == 1
    assert not patches.installed()


SIGMOID = "--moe-router-score-function sigmoid"
RUN = f"{FLAGS} --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --mock-data"
RUN += " --tokenizer-type NullTokenizer --vocab-size 31 --lr 1e-3 --eval-iters 0"


@pytest.mark.parametrize("own", [True, False], ids=["this entry", "a script's"])
def test_a_warning_is_said_once(
    own: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments are checked, and then the config that is made of them."""
    if own:
        args, options = entering.prepare(monkeypatch, f"{RUN} {SIGMOID}")
        command_line.build_model_config(args, options)
    else:
        args = parsed(f"{FLAGS} {SIGMOID}")
        stock = stock_config(args)
        stock.transformer.moe_router_score_function = "sigmoid"
        entry.prepare(args, stock)
    said = [record for record in caplog.records if record.name == support.__name__]
    assert len(said) == 1
    assert SIGMOID.split()[0] in said[0].getMessage()


def test_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.training.models.gpt import GPTModelConfig

    class ModelOptModelConfig(GPTModelConfig):
        """As a checkout with ModelOpt has one."""

    args = parsed(FLAGS)
    stock = stock_config(args)
    fields = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
    with pytest.raises(SystemExit):
        entry.prepare(args, ModelOptModelConfig(**fields))
    assert "ModelOptModelConfig" in capsys.readouterr().err


def test_only_this_packages_entry_refuses_the_scripts_data_modes() -> None:
    args = parsed(f"{FLAGS} --sft")
    with pytest.raises(UserError, match="--sft"):
        support.check(args, options_from_args(args))
    support.check(args, options_from_args(args), own_entry=False)
