"""The support table against Megatron's real parser and config.

Contract: a plain good command line passes in silence; every rule of the table has command lines
here that set it off, and nothing but it; what is refused raises its sentence, what is warned of
logs it; every flag that a rule mentions exists; ``--moe-router-gradient topk`` is concerned by
the rules marked for it alone; the same predicates read a TransformerConfig.
"""

import argparse
import dataclasses
import logging
import pathlib
import re
import runpy
from typing import Any

import pytest

from megatron_default_moe import RouterGradientConfig, UserError
from megatron_default_moe.cpu import runtime
from megatron_default_moe.options import support
from megatron_default_moe.options.config import add_router_gradient_args, options_from_args
from megatron_default_moe.options.settings import Settings

GOOD = (
    "--num-experts 8 --moe-router-topk 2 --moe-router-pre-softmax"
    " --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss"
)
TOP1 = GOOD.replace("topk 2", "topk 1")
NOT_SOFTMAX = " --moe-router-score-function "

CHOICE = " --moe-router-gradient "
REMOE = TOP1.replace("aux_loss", "none") + CHOICE + "remoe"
PROBED = f"{GOOD} --log-router-gradient-fidelity"
BIAS = f"{GOOD} --moe-loss-free-bias 0.001"

TRIGGERS = {
    "another gate than softmax with an estimator other than topk and default": [
        f"{GOOD}{CHOICE}dense{NOT_SOFTMAX}sigmoid",
        f"{GOOD}{CHOICE}expert-group{NOT_SOFTMAX}sqrtsoftplus --default-vector-normalized-gate",
        f"{TOP1}{CHOICE}sparsemixer{NOT_SOFTMAX}sigmoid",
    ],
    "--moe-router-gradient sparsemixer with --moe-router-topk above 1": [
        f"{GOOD}{CHOICE}sparsemixer"
    ],
    "--moe-router-gradient sparsemixer-v2 with --moe-router-topk above 2": [
        f"{GOOD}{CHOICE}sparsemixer-v2 --moe-router-topk 3"
    ],
    "an own choice of experts with a router that chooses otherwise": [
        f"{BIAS} --moe-router-fusion",
        f"{BIAS} --moe-enable-routing-replay",
        f"{BIAS} --moe-router-num-groups 2 --moe-router-group-topk 1",
        f"{BIAS} --moe-router-load-balancing-type quantile_balancing",
    ],
    "--moe-loss-free-bias without a softmax over all experts": [
        f"--num-experts 8 --moe-loss-free-bias 0.001{CHOICE}topk",
        f"--num-experts 8 --moe-loss-free-bias 0.001{NOT_SOFTMAX}sigmoid{CHOICE}topk",
    ],
    "--moe-loss-free-bias with sparsemixer, sparsemixer-v2 or remoe": [
        f"{BIAS}{CHOICE}sparsemixer-v2",
        f"{REMOE} --moe-loss-free-bias 0.001",
    ],
    "--moe-router-gradient remoe with another balance loss": [
        f"{REMOE} --moe-router-load-balancing-type aux_loss",
    ],
    "--moe-router-gradient remoe with capacity or padding for quantisation": [
        f"{REMOE} --moe-expert-capacity-factor 1.0",
        f"{REMOE} --moe-router-padding-for-quantization",
    ],
    "--moe-router-topk-scaling-factor with a gate of its own": [
        f"{TOP1}{CHOICE}sparsemixer --moe-router-topk-scaling-factor 2.0",
        f"{REMOE} --moe-router-topk-scaling-factor 2.0",
    ],
    "--moe-router-gradient sparsemixer with --moe-shared-expert-overlap": [
        f"{TOP1}{CHOICE}sparsemixer --moe-shared-expert-overlap",
    ],
    "--moe-router-gradient expert-group with --moe-pad-expert-input-to-capacity": [
        f"{GOOD}{CHOICE}expert-group --moe-pad-expert-input-to-capacity",
    ],
    "--expert-group-size above --num-experts": [
        f"{GOOD}{CHOICE}expert-group --expert-group-size 9"
    ],
    "--moe-router-gradient dense with --fp8-recipe delayed": [
        f"{GOOD}{CHOICE}dense --fp8-format hybrid",
    ],
    "an estimator other than topk and default with --overlap-moe-expert-parallel-comm or CUDA"
    " graphs of the router": [
        f"{GOOD}{CHOICE}dense --overlap-moe-expert-parallel-comm",
        f"{GOOD}{CHOICE}expert-group --cuda-graph-impl transformer_engine --cuda-graph-modules"
        " moe_router moe_preprocess",
    ],
    "--default-vector-kernels with an estimator other than default": [
        f"{GOOD}{CHOICE}dense --default-vector-kernels",
    ],
    "--moe-router-gradient default-linear with options of the forward term": [
        f"{GOOD}{CHOICE}default-linear --default-vector-order before-use",
        f"{GOOD}{CHOICE}default-linear --default-vector-fade-in 5",
    ],
    "--moe-router-gradient default-linear with --moe-pad-expert-input-to-capacity": [
        f"{GOOD}{CHOICE}default-linear --moe-pad-expert-input-to-capacity",
    ],
    "--log-router-gradient-fidelity that is no multiple of --log-interval": [
        f"{PROBED} 50 --log-interval 100",
        f"{PROBED} 15 --log-interval 10{CHOICE}topk",
    ],
    "--log-router-gradient-fidelity with what hides a layer's backward pass": [
        f"{PROBED} 100 --overlap-moe-expert-parallel-comm",
        f"{PROBED} 100 --cuda-graph-impl transformer_engine --cuda-graph-modules moe_router"
        " moe_preprocess",
        f"{PROBED} 100 --moe-token-dispatcher-type flex{CHOICE}topk",
        f"{PROBED} 100 --moe-apply-probs-on-input{CHOICE}topk",
        f"{PROBED} 100{NOT_SOFTMAX}sigmoid{CHOICE}topk",
        f"--num-experts 8 --moe-router-topk 2 --log-router-gradient-fidelity 100{CHOICE}topk",
    ],
    "--paper-default-moe with an estimator other than default": [
        f"{GOOD}{CHOICE}dense --paper-default-moe",
    ],
    "no --num-experts": ["--moe-router-pre-softmax"],
    "softmax gate without --moe-router-pre-softmax": [
        "--num-experts 8",
        "--num-experts 8 --moe-router-topk 1",
        "--num-experts 8 --moe-router-score-function softmax",
    ],
    "--moe-router-score-function sigmoid or sqrtsoftplus with --moe-router-topk above 1": [
        f"{GOOD}{NOT_SOFTMAX}sigmoid",
        f"{GOOD}{NOT_SOFTMAX}sqrtsoftplus",
        "--num-experts 8 --moe-router-score-function sigmoid",
    ],
    "--moe-router-score-function sigmoid or sqrtsoftplus with --moe-router-topk 1": [
        f"{TOP1}{NOT_SOFTMAX}sigmoid",
        f"{TOP1}{NOT_SOFTMAX}sqrtsoftplus",
    ],
    "--default-vector-normalized-gate with the softmax gate": [
        f"{GOOD} --default-vector-normalized-gate",
        f"{TOP1} --default-vector-normalized-gate",
    ],
    "--moe-router-load-balancing-type sinkhorn": [
        f"{GOOD} --moe-router-load-balancing-type sinkhorn",
        f"{GOOD} --moe-router-load-balancing-type aux_loss sinkhorn",
    ],
    "--moe-apply-probs-on-input": [f"{TOP1} --moe-apply-probs-on-input"],
    "--moe-router-topk equal to --num-experts": [
        f"{GOOD} --num-experts 2",
        f"{TOP1} --num-experts 1",
    ],
    "--moe-router-force-load-balancing or --moe-router-force-biased": [
        f"{GOOD} --moe-router-force-load-balancing",
        f"{GOOD} --moe-router-force-biased 0.5",
        f"{GOOD} --moe-router-force-biased 0",
    ],
    "--default-vector-weighting uniform with FP8 or FP4": [
        f"{GOOD} --default-vector-weighting uniform --fp8-format hybrid --fp8-recipe blockwise",
        f"{GOOD} --default-vector-weighting uniform --fp4-format e2m1",
    ],
    "--fp8-recipe delayed without NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1": [
        f"{GOOD} --fp8-format hybrid",
        f"{GOOD} --fp8-format e4m3 --fp8-recipe delayed",
    ],
    "--use-transformer-engine-op-fuser without NVTE_CUTEDSL_FUSED_GROUPED_MLP=1": [
        f"{GOOD} --swiglu --use-transformer-engine-op-fuser",
        f"{GOOD} --quick-geglu --use-transformer-engine-op-fuser",
    ],
    "--tensor-model-parallel-size above 1 without --sequence-parallel": [
        f"{GOOD} --tensor-model-parallel-size 2",
    ],
    "--transformer-impl local with biases in experts on one rank": [
        f"{GOOD} --transformer-impl local",
        f"{GOOD} --transformer-impl local --tensor-model-parallel-size 2 --sequence-parallel"
        " --expert-tensor-parallel-size 1",
    ],
    "--moe-token-dispatcher-type flex (DeepEP, HybridEP, NCCL-EP)": [
        f"{GOOD} --moe-token-dispatcher-type flex",
        f"{GOOD} --moe-token-dispatcher-type flex --moe-enable-deepep",
        f"{GOOD} --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep",
        f"{GOOD} --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
    ],
    "--moe-expert-rank-capacity-factor or --moe-paged-stash": [
        f"{GOOD} --moe-expert-rank-capacity-factor 1.5",
        f"{GOOD} --moe-paged-stash",
    ],
    "--overlap-moe-expert-parallel-comm with --default-vector-order before-use": [
        f"{GOOD} --overlap-moe-expert-parallel-comm --default-vector-order before-use",
        f"{GOOD} --overlap-moe-expert-parallel-comm --paper-default-moe",
    ],
    "--cuda-graph-modules other than attn, mlp, and moe_router moe_preprocess together": [
        f"{GOOD} --cuda-graph-impl local",
        f"{GOOD} --enable-cuda-graph",
        f"{GOOD} --external-cuda-graph --cuda-graph-modules attn moe_router",
        f"{GOOD} --cuda-graph-impl full_iteration",
        f"{GOOD} --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router",
        f"{GOOD} --cuda-graph-impl local --cuda-graph-modules moe_router moe_preprocess",
        f"{GOOD} --cuda-graph-impl local --cuda-graph-modules moe",
        f"{GOOD} --moe-router-gradient topk --cuda-graph-impl full_iteration",
        f"{GOOD} --cuda-graph-impl transformer_engine --cuda-graph-modules full",
    ],
    "--transformer-impl inference_optimized": [f"{GOOD} --transformer-impl inference_optimized"],
    "--moe-use-upcycling": [f"{GOOD} --moe-use-upcycling"],
    "--moe-router-load-balancing-type global_aux_loss": [
        f"{GOOD} --moe-router-load-balancing-type global_aux_loss",
        f"{GOOD} --moe-router-load-balancing-type aux_loss global_aux_loss",
    ],
    "--no-moe-global-aux-loss-exact": [
        f"{GOOD} --moe-router-load-balancing-type global_aux_loss --no-moe-global-aux-loss-exact",
    ],
    "--init-model-with-meta-device without a checkpoint": [
        f"{GOOD} --init-model-with-meta-device",
    ],
    "--init-model-with-meta-device with --default-vector-init gaussian": [
        f"{GOOD} --init-model-with-meta-device --load saved --default-vector-init gaussian",
    ],
    "--freeze-all-layers": [f"{GOOD} --freeze-all-layers"],
    "--spec other than megatron_default_moe default_moe_spec": [
        f"{GOOD} --spec my_layers my_spec",
        f"{GOOD} --spec megatron_default_moe another_spec",
    ],
    "--yaml-cfg": [f"{GOOD} --yaml-cfg run.yaml"],
    "--hybrid-layer-pattern (hybrid models)": [f"{GOOD} --hybrid-layer-pattern M*M*"],
    "--heterogeneous-layers-config-path": [
        f"{GOOD} --heterogeneous-layers-config-path layers.json",
        f"{GOOD} --heterogeneous-layers-config-encoded-json {{}}",
    ],
    "--use-megatron-fsdp or --use-torch-fsdp2": [
        f"{GOOD} --use-megatron-fsdp",
        f"{GOOD} --use-torch-fsdp2",
    ],
    "--sft, --fim-data, --dataloader-inter-document-masking or --logits-load-dir": [
        f"{GOOD} --sft",
        f"{GOOD} --fim-data",
        f"{GOOD} --dataloader-inter-document-masking",
        f"{GOOD} --logits-load-dir somewhere",
    ],
    "--moe-layer-freq with another number of layers than --num-layers": [
        f"{GOOD} --num-layers 3 --moe-layer-freq [0,1]",
        f"{GOOD} --num-layers 2 --moe-layer-freq ([0]+[1]*2)",
    ],
    "--moe-router-topk above --num-experts": [GOOD.replace("topk 2", "topk 9")],
    "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers without a stage"
    " between them": [
        f"{GOOD} --num-layers 8 --decoder-first-pipeline-num-layers 3",
        f"{GOOD} --num-layers 8 --decoder-first-pipeline-num-layers 3"
        " --decoder-last-pipeline-num-layers 1 --pipeline-model-parallel-size 2",
        f"{GOOD} --num-layers 8 --decoder-first-pipeline-num-layers 7"
        " --decoder-last-pipeline-num-layers 1",
    ],
    "--num-distributed-optimizer-instances above 1": [
        f"{GOOD} --use-distributed-optimizer --num-distributed-optimizer-instances 2",
    ],
    "--lr-warmup-iters not below --lr-decay-iters": [
        f"{GOOD} --train-iters 10 --lr-warmup-iters 10",
        f"{GOOD} --train-iters 10 --lr-decay-iters 5 --lr-warmup-iters 5",
    ],
    "--perform-rl-step": [f"{GOOD} --perform-rl-step"],
    "--use-checkpoint-args": [f"{GOOD} --use-checkpoint-args"],
}
"""Command lines that set off the rule for this situation, and no other."""

LINES = [
    pytest.param(rule, line, id=line.replace(GOOD, "...").replace(TOP1, "top-1 ..."))
    for rule in support.RULES
    for line in TRIGGERS.get(rule.situation, [])
]

TE = f"{GOOD} --transformer-impl transformer_engine --moe-grouped-gemm --bf16"
FP8 = f"{TE} --fp8-format hybrid --fp8-recipe"

HARMLESS = {
    "grouped GEMM": TE,
    "a recipe without FP8": f"{TE} --fp8-recipe delayed",
    "FP8, current scaling": f"{FP8} tensorwise",
    "FP8, blockwise": f"{FP8} blockwise",
    "FP8, MX": f"{FP8} mxfp8 --fp8-param-gather",
    "router padding": f"{FP8} tensorwise --moe-router-padding-for-quantization",
    "permute fusion": f"{TE} --moe-permute-fusion",
    "router fusion": f"{TE} --moe-router-fusion",
    "operation fuser": f"{TE} --use-transformer-engine-op-fuser",
    "shared experts beside the communication": (
        f"{TE} --moe-shared-expert-intermediate-size 64 --moe-shared-expert-overlap"
    ),
    "weight gradients beside the dispatch": f"{TE} --overlap-dispatch-backward-with-experts-wgrad",
    "communication beside another micro-batch": (
        f"{TE} --overlap-moe-expert-parallel-comm --delay-wgrad-compute"
        " --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router moe_preprocess"
    ),
    "recomputed activations": (
        f"{TE} --recompute-granularity selective --recompute-modules moe_act layernorm"
    ),
    "filled capacity": (
        f"{TE} --moe-expert-capacity-factor 1.25 --moe-pad-expert-input-to-capacity"
    ),
    "baseline": GOOD,
    "own spec": f"{GOOD} --spec megatron_default_moe default_moe_spec",
    "meta device for a checkpoint": f"{GOOD} --init-model-with-meta-device --load somewhere",
    "top-1": TOP1,
    "TP with SP": f"{GOOD} --tensor-model-parallel-size 2 --sequence-parallel",
    "uniform weighting in BF16": f"{GOOD} --default-vector-weighting uniform --bf16",
    "router weighting in FP8": f"{GOOD} --fp8-format hybrid --fp8-recipe tensorwise",
    "CUDA graphs of attention": (
        f"{GOOD} --cuda-graph-impl transformer_engine --cuda-graph-modules attn mlp"
    ),
    "CUDA graphs by the flag's old name": (
        f"{GOOD} --cuda-graph-impl transformer_engine --cuda-graph-scope attn"
    ),
    "CUDA graphs by the old name of their maker": (
        f"{GOOD} --external-cuda-graph --cuda-graph-modules attn moe_router moe_preprocess"
    ),
    "CUDA graphs of attention and routing": (
        f"{GOOD} --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router"
        " moe_preprocess"
    ),
    "local without biases": f"{GOOD} --transformer-impl local --disable-bias-linear",
    "local with expert ranks": f"{GOOD} --transformer-impl local --expert-model-parallel-size 2",
    "several balance losses": f"{GOOD} --moe-router-load-balancing-type aux_loss seq_aux_loss",
    "capacity": f"{GOOD} --moe-expert-capacity-factor 1.25",
    "normalised sigmoid": f"{GOOD}{NOT_SOFTMAX}sigmoid --default-vector-normalized-gate",
    "normalised top-1": f"{TOP1}{NOT_SOFTMAX}sqrtsoftplus --default-vector-normalized-gate",
    "groups": f"{GOOD} --moe-router-num-groups 4 --moe-router-group-topk 2",
    "multi-token prediction": f"{GOOD} --mtp-num-layers 2 --mtp-use-repeated-layer",
    "MLA": f"{GOOD} --multi-latent-attention",
    "a bias": BIAS,
    "latent MoE": f"{GOOD} --moe-latent-size 64",
    "allgather": f"{GOOD} --moe-token-dispatcher-type allgather",
    "distributed optimizer": f"{GOOD} --use-distributed-optimizer",
}

FLAG = re.compile(r"--[a-z0-9][a-z0-9_-]*\*?")
FLAGS_ELSEWHERE = {
    "--config",  # of this package's entry point, pretrain.py
    "--default-vector-*",  # all of them
}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    runtime.install()
    from megatron.training.arguments import add_megatron_arguments

    return add_router_gradient_args(
        add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))
    )


def check(parser: argparse.ArgumentParser, line: str) -> None:
    args = parser.parse_args(line.split())
    support.check(args, options_from_args(args))


def set_off(parser: argparse.ArgumentParser, line: str) -> list[support.Rule]:
    args = parser.parse_args(line.split())
    options = options_from_args(args)
    settings = Settings(args, options)
    return [rule for rule in support.RULES if rule.concerns(options) and rule.applies(settings)]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == support.__name__]
    assert all(record.levelno == logging.WARNING for record in records)
    return [record.getMessage() for record in records]


# The table itself


def test_every_rule_has_its_command_lines() -> None:
    situations = [rule.situation for rule in support.RULES]
    assert len(set(situations)) == len(situations)
    assert set(TRIGGERS) == set(situations)
    assert all(TRIGGERS.values())


@pytest.mark.parametrize("rule", support.RULES, ids=lambda rule: rule.situation)
def test_every_flag_a_rule_mentions_exists(
    parser: argparse.ArgumentParser, rule: support.Rule
) -> None:
    known = FLAGS_ELSEWHERE | set(parser._option_string_actions)
    assert set(FLAG.findall(rule.situation)) <= known
    mentioned = set(FLAG.findall(rule.sentence))
    assert mentioned <= known
    assert mentioned - FLAGS_ELSEWHERE
    assert "\n" not in rule.sentence


@pytest.mark.parametrize("rule", support.RULES, ids=lambda rule: rule.situation)
def test_every_setting_a_rule_reads_exists(
    parser: argparse.ArgumentParser, rule: support.Rule
) -> None:
    """A misspelt setting would read as None, and its half of the rule never apply."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = set(vars(parser.parse_args([]))) | set(vars(Settings)) | {"options"}
    known |= {field.name for field in dataclasses.fields(TransformerConfig)}
    known |= {field.name for field in dataclasses.fields(RouterGradientConfig)} | {"chooses"}
    assert set(rule.applies.__code__.co_names) - {"set", "len", "list", "isinstance"} <= known


def test_every_setting_behind_a_name_of_settings_exists(parser: argparse.ArgumentParser) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = set(vars(parser.parse_args([])))
    known |= {field.name for field in dataclasses.fields(TransformerConfig)}
    properties = [item for item in vars(Settings).values() if isinstance(item, property)]
    read = {name for item in properties for name in item.fget.__code__.co_names}
    other = {"isinstance", "str", "list", "getattr", "set", "bool", "graph_modules", "graph_impl"}
    other |= {"len", "sum"}
    assert len(properties) >= 6
    assert read - other <= known


def test_markdown_has_a_row_per_rule() -> None:
    header, divider, *rows = support.markdown().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert header.count("|") == divider.count("|") == 4
    assert [row.count("|") for row in rows] == [4] * len(support.RULES)
    for rule, (situation, verdict, sentence) in zip(support.RULES, cells, strict=True):
        assert (situation, sentence) == (rule.situation, rule.sentence)
        assert verdict == f"{rule.verdict}{rule.estimators}"


# On the command line


@pytest.mark.parametrize("gradient", ["default", "topk"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_works_passes_in_silence(
    parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture, name: str, gradient: str
) -> None:
    line = f"{HARMLESS[name]} --moe-router-gradient {gradient}"
    assert set_off(parser, line) == []
    check(parser, line)
    assert messages(caplog) == []


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch, rule: support.Rule) -> None:
    """What the environment has to allow so that nothing beside the rule is set off."""
    if rule.situation.startswith("--moe-router-gradient dense with --fp8"):
        monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(("rule", "line"), LINES)
def test_a_rule_is_set_off(
    parser: argparse.ArgumentParser,
    caplog: pytest.LogCaptureFixture,
    rule: support.Rule,
    line: str,
) -> None:
    assert [found.situation for found in set_off(parser, line)] == [rule.situation]
    if rule.verdict == "refused":
        with pytest.raises(UserError) as refusal:
            check(parser, line)
        assert str(refusal.value) == rule.sentence
        assert messages(caplog) == []
    else:
        check(parser, line)
        assert messages(caplog) == [rule.sentence]


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(("rule", "line"), LINES)
def test_topk_is_concerned_by_the_rules_marked_for_it(
    parser: argparse.ArgumentParser,
    caplog: pytest.LogCaptureFixture,
    rule: support.Rule,
    line: str,
) -> None:
    line = f"{line} --moe-router-gradient topk"
    if rule.topk_too and rule.verdict == "refused":
        with pytest.raises(UserError, match=re.escape(rule.sentence)):
            check(parser, line)
    else:
        check(parser, line)
        assert messages(caplog) == ([rule.sentence] if rule.topk_too else [])


def test_both_marks_occur() -> None:
    """Else the test above would be one-sided."""
    assert {rule.topk_too for rule in support.RULES} == {True, False}
    assert {rule.verdict for rule in support.RULES} == {"refused", "warned", "noted"}


def test_the_way_out_that_a_sentence_offers_works(parser: argparse.ArgumentParser) -> None:
    """``or train with --moe-router-gradient topk`` must not be offered where topk is refused."""
    offered = [rule for rule in support.RULES if "--moe-router-gradient topk" in rule.sentence]
    assert offered
    assert [rule.situation for rule in offered if rule.topk_too] == []


def test_the_first_refusal_is_raised_and_no_warning_beside_it(
    parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture
) -> None:
    line = f"{GOOD} --use-checkpoint-args --yaml-cfg run.yaml --use-megatron-fsdp"
    found = set_off(parser, line)
    assert [rule.verdict for rule in found] == ["refused", "refused", "warned"]
    with pytest.raises(UserError, match=re.escape(found[0].sentence)):
        check(parser, line)
    assert messages(caplog) == []


def test_all_warnings_are_given(
    parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture
) -> None:
    line = f"{TOP1}{NOT_SOFTMAX}sigmoid --use-checkpoint-args --moe-router-force-load-balancing"
    check(parser, line)
    assert len(messages(caplog)) == 3


# On a TransformerConfig


GOOD_CONFIG = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_moe_experts": 4,
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "moe_ffn_hidden_size": 16,
    "add_bias_linear": False,
}


def transformer_config(**settings: Any) -> Any:
    runtime.install()
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(**{**GOOD_CONFIG, **settings})


def test_a_good_config_passes_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    support.check(transformer_config(), RouterGradientConfig())
    assert messages(caplog) == []


CONFIGS = {
    "no --num-experts": {"num_moe_experts": None, "moe_ffn_hidden_size": None},
    "softmax gate without --moe-router-pre-softmax": {
        "moe_router_pre_softmax": False,
        "moe_router_topk": 2,
    },
    "--moe-router-score-function sigmoid or sqrtsoftplus with --moe-router-topk above 1": {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk": 2,
    },
    "--moe-router-load-balancing-type sinkhorn": {
        "moe_router_load_balancing_type": "sinkhorn",
        "moe_aux_loss_coeff": 0.0,
    },
    "--moe-apply-probs-on-input": {"moe_apply_probs_on_input": True},
    "--tensor-model-parallel-size above 1 without --sequence-parallel": {
        "tensor_model_parallel_size": 2
    },
    "--transformer-impl local with biases in experts on one rank": {
        "transformer_impl": "local",
        "add_bias_linear": True,
    },
    "--default-vector-normalized-gate with the softmax gate": {"normalized_gate": True},
    "--cuda-graph-modules other than attn, mlp, and moe_router moe_preprocess together": {
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_modules": ["attn", "moe_router"],
    },
}


@pytest.mark.parametrize("situation", CONFIGS)
def test_a_config_is_refused_with_the_same_sentence(situation: str) -> None:
    (rule,) = [rule for rule in support.RULES if rule.situation == situation]
    settings = dict(CONFIGS[situation])
    options = RouterGradientConfig(normalized_gate=settings.pop("normalized_gate", False))
    config = transformer_config(**settings)
    with pytest.raises(UserError) as refusal:
        support.check(config, options)
    assert str(refusal.value) == rule.sentence


def test_a_config_is_warned_of_with_the_same_sentence(caplog: pytest.LogCaptureFixture) -> None:
    config = transformer_config(num_moe_experts=1, moe_router_force_load_balancing=True)
    support.check(config, RouterGradientConfig())
    assert [sentence.split()[0] for sentence in messages(caplog)] == [
        "--moe-router-topk",
        "--moe-router-force-load-balancing",
    ]


def test_topk_accepts_a_config_that_default_vectors_cannot_use() -> None:
    config = transformer_config(moe_router_pre_softmax=False, moe_router_topk=2)
    support.check(config, RouterGradientConfig(gradient="topk"))
    dense = transformer_config(num_moe_experts=None, moe_ffn_hidden_size=None)
    with pytest.raises(UserError, match="--num-experts is missing"):
        support.check(dense, RouterGradientConfig(gradient="topk"))


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", f"{FP8} delayed"),
        ("NVTE_CUTEDSL_FUSED_GROUPED_MLP", f"{TE} --swiglu --use-transformer-engine-op-fuser"),
    ],
)
def test_what_the_environment_allows_passes_in_silence(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, variable: str, line: str
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert len(set_off(parser, line)) == 1
    monkeypatch.setenv(variable, "1")
    assert set_off(parser, line) == []


def test_the_documentation_shows_this_table() -> None:
    import runpy

    page = runpy.run_path("docs/generate_support.py", run_name="docs")
    assert page["PATH"].read_text() == page["text"](), "run python docs/generate_support.py"


def test_the_page_of_the_estimators_shows_their_table() -> None:
    root = pathlib.Path(__file__).resolve().parents[2]
    page = runpy.run_path(str(root / "docs/generate_estimators.py"), run_name="docs")
    assert page["PATH"].read_text() == page["text"](), "run python docs/generate_estimators.py"
