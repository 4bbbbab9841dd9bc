"""Megatron's combined schedule (``--overlap-moe-expert-parallel-comm``) with default vectors.

Contract: on real ranks, with expert parallelism, in bf16 and in fp16 with loss scaling, training
under the combined schedule changes no bit of the losses, the gradient norms, the router gradients
and the default vectors, for several numbers of micro-batches, gates, shared experts, the optimizer
that overlaps its own communication, tensor and interleaved pipeline parallelism; under it ``topk``
is stock Megatron. The vectors are the S/N of what the experts returned. (With multi-token
prediction upstream adds up the embeddings' gradients in another order: there the first step's
router gradients and vectors are compared, which these do not reach.)
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from launching import TINY, record, steps_of

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]

OVERLAP = "--overlap-moe-expert-parallel-comm"
EP2 = [*TINY, "--expert-model-parallel-size", "2"]
MODELS = {
    "plain": "--bf16 --eval-interval 4 --eval-iters 1",
    "one-micro-batch": "--bf16 --micro-batch-size 4",
    "four-micro-batches": "--bf16 --micro-batch-size 1 --moe-router-topk 2",
    "backward-only": "--bf16 --no-default-vector-in-forward",
    "one-expert-a-rank": "--bf16 --num-experts 2 --default-vector-weighting uniform",
    "shared": "--bf16 --moe-shared-expert-intermediate-size 24 --moe-layer-freq [0,1]"
    " --ffn-hidden-size 48 --moe-router-dtype fp64",
    "deepseek": "--bf16 --num-experts 8 --moe-router-topk 2 --moe-router-score-function sigmoid"
    " --default-vector-normalized-gate --moe-router-enable-expert-bias"
    " --moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-topk-scaling-factor 2.5",
    "losses": "--bf16 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
    " --moe-z-loss-coeff 0.001 --moe-expert-capacity-factor 1.0",
    "optimizer": "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "fp16": "--fp16 --initial-loss-scale 16777216 --train-iters 10",
    "mtp": "--bf16 --mtp-num-layers 1",
}
FULL = {"one-micro-batch", "one-expert-a-rank", "shared", "losses", "optimizer", "mtp"}
"""Models left out of the short run."""
FOUR_RANKS = {
    "pp2-vpp": "--bf16 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    " --num-layers 4 --micro-batch-size 1",
    "tp2": "--bf16 --tensor-model-parallel-size 2 --sequence-parallel",
}


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.full] * (name in FULL)) for name in names]


def pairs(models: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Each model with the plain schedule and with the combined one."""
    cases: dict[str, dict[str, Any]] = {}
    for name, flags in models.items():
        argv = [*EP2, *flags.split()]
        cases[name] = {"argv": argv}
        cases[f"{name}-overlap"] = {"argv": [*argv, OVERLAP]}
    return cases


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """Every run on two ranks that is asked for, in one launch."""
    items = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["name"] for item in items if hasattr(item, "callspec")}
    models = {name: flags for name, flags in MODELS.items() if name in {*asked, "plain", "fp16"}}
    topk = [*EP2, "--bf16", "--moe-router-gradient", "topk", OVERLAP]
    options = ["--high-priority-a2a-comm-stream", "--ep-overlap-early-attn-memory-release"]
    cases = {
        **pairs(models),
        "topk": {"argv": topk},
        "stock": {"argv": topk, "stock": True},
        "with-options": {"argv": [*EP2, *MODELS["plain"].split(), OVERLAP, *options]},
    }
    return record(tmp_path_factory.mktemp("overlap"), 2, cases)


def equal_to_the_bit(
    some: list[dict[str, Any]], others: list[dict[str, Any]], parts: tuple[str, ...]
) -> None:
    for one, other in zip(some, others, strict=True):
        assert one["loss"] == other["loss"]
        assert one["layers"].keys() == other["layers"].keys()
        for number, layer in one["layers"].items():
            for part in parts:
                # An overflow makes both gradients NaN.
                torch.testing.assert_close(
                    layer[part],
                    other["layers"][number][part],
                    rtol=0,
                    atol=0,
                    equal_nan=True,
                    msg=lambda text, at=(number, part): f"layer {at[0]}, {at[1]}: {text}",
                )


VECTORS = ("vectors", "updates", "router_grad", "router_weight")


@pytest.mark.parametrize("name", params(name for name in MODELS if name != "mtp"))
def test_the_combined_schedule_changes_no_bit(runs: dict[str, Any], name: str) -> None:
    plain, combined = steps_of(runs[name]), steps_of(runs[f"{name}-overlap"])
    assert {rank["status"] for rank in (*runs[name], *runs[f"{name}-overlap"])} == {"ok"}
    assert len(plain) == (10 if name == "fp16" else 8)
    equal_to_the_bit(combined, plain, VECTORS)
    assert [step["grad_norm"] for step in combined] == [step["grad_norm"] for step in plain]
    assert [step["skipped"] for step in combined] == [step["skipped"] for step in plain]


def test_fp16_met_an_overflow_and_went_on(runs: dict[str, Any]) -> None:
    """Else the rows above would not have seen a scaled gradient that is dropped."""
    skipped = {step["skipped"] for step in steps_of(runs["fp16-overlap"])}
    assert skipped == {True, False}


@pytest.mark.parametrize("name", params(MODELS))
def test_the_vectors_are_the_mean_expert_outputs(runs: dict[str, Any], name: str) -> None:
    for step in steps_of(runs[f"{name}-overlap"]):
        if step["skipped"]:
            continue
        for layer in step["layers"].values():
            error = (layer["vectors"] - layer["expected"]).norm() / layer["expected"].norm()
            assert error < 1e-5
            assert layer["router_grad"].any()


def test_the_schedules_own_options_change_nothing(runs: dict[str, Any]) -> None:
    equal_to_the_bit(steps_of(runs["with-options"]), steps_of(runs["plain"]), VECTORS)


def test_default_vectors_reach_the_router(runs: dict[str, Any]) -> None:
    """Else a gradient lost between the graphs would be lost on both sides of a comparison."""
    default, topk = steps_of(runs["plain-overlap"]), steps_of(runs["topk"])
    assert torch.equal(default[0]["layers"][1]["router_grad"], topk[0]["layers"][1]["router_grad"])
    gradients = [steps[1]["layers"][1]["router_grad"] for steps in (default, topk)]
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[1].norm()


def test_topk_is_stock_megatron(runs: dict[str, Any]) -> None:
    topk, stock = steps_of(runs["topk"]), steps_of(runs["stock"])
    assert len(stock) == 8
    equal_to_the_bit(topk, stock, ("router_weight",))
    assert [step["grad_norm"] for step in topk] == [step["grad_norm"] for step in stock]


@pytest.mark.parametrize("name", params(["mtp"]))
def test_prediction_layers_get_the_same_gradients(runs: dict[str, Any], name: str) -> None:
    plain, combined = steps_of(runs[name]), steps_of(runs[f"{name}-overlap"])
    assert sorted(combined[0]["layers"]) == [1, 2, 3]
    equal_to_the_bit(combined[:1], plain[:1], VECTORS)
    for one, other in zip(combined, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.full
def test_with_tensor_and_pipeline_parallelism(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = record(tmp_path_factory.mktemp("overlap-4"), 4, pairs(FOUR_RANKS))
    for name in FOUR_RANKS:
        plain, combined = steps_of(found[name]), steps_of(found[f"{name}-overlap"])
        assert len(combined) == 8
        equal_to_the_bit(combined, plain, VECTORS)
        assert [step["grad_norm"] for step in combined] == [step["grad_norm"] for step in plain]
