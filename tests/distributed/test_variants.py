"""Models other than a plain one, trained in Megatron's loop on two ranks.

Contract: with multi-token prediction layers (separate ones, and one that is called twice) and with
DeepSeek-V3's router (sigmoid gate normalised over all experts, expert bias, groups of experts), the
vectors of EVERY layer after every step are the S/N of what its experts returned; resuming changes
no bit, and neither does recomputation with one such layer. (With two, full recomputation changes
the order in which Megatron adds up gradients: plain Megatron differs in the last bit as well.)
"""

from typing import Any

import pytest
import torch
from launching import TINY, record, steps_of

pytestmark = pytest.mark.launch

EP2 = [*TINY, "--expert-model-parallel-size", "2"]
MTP = [*EP2, "--mtp-num-layers", "1"]
TWO = [*EP2, "--mtp-num-layers", "2"]
DEEPSEEK = [
    *(*EP2, "--num-experts", "8", "--moe-router-topk", "2"),
    *("--moe-router-score-function", "sigmoid", "--default-vector-normalized-gate"),
    *("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "0.01"),
    *("--moe-router-num-groups", "2", "--moe-router-group-topk", "1"),
    *("--moe-router-topk-scaling-factor", "2.5"),
]
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LAYERS = {"mtp": 3, "two": 4, "repeated": 3, "pp2": 4, "deepseek": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every run of this file, in one launch."""
    out = tmp_path_factory.mktemp("variants")
    save = ["--save", str(out / "mtp"), "--save-interval", "4", "--exit-interval", "4"]
    cases = {
        "mtp": MTP,
        "two": TWO,
        "repeated": [*TWO, "--mtp-use-repeated-layer"],
        "recomputed": [*MTP, *RECOMPUTE.split()],
        "pp2": [*TINY, "--mtp-num-layers", "2", "--pipeline-model-parallel-size", "2"],
        "first-half": [*MTP, *save],
        "second-half": [*MTP, "--load", str(out / "mtp")],
        "deepseek": DEEPSEEK,
    }
    return record(out, 2, {name: {"argv": argv} for name, argv in cases.items()})


@pytest.mark.parametrize("name", LAYERS)
def test_the_vectors_of_every_layer_are_its_mean_expert_outputs(
    runs: dict[str, Any], name: str
) -> None:
    assert {rank["status"] for rank in runs[name]} == {"ok"}
    steps = steps_of(runs[name])
    assert len(steps) == 8
    for step in steps:
        assert sorted(step["layers"]) == list(range(1, LAYERS[name] + 1))
        for layer in step["layers"].values():
            error = (layer["vectors"] - layer["expected"]).norm() / layer["expected"].norm()
            assert error < 1e-5
            assert layer["router_grad"].any()
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_recomputing_prediction_layers_changes_no_bit(runs: dict[str, Any]) -> None:
    same(steps_of(runs["recomputed"]), steps_of(runs["mtp"]))


def test_prediction_layers_resume_to_the_bit(runs: dict[str, Any]) -> None:
    halves = [*steps_of(runs["first-half"]), *steps_of(runs["second-half"])]
    same(halves, steps_of(runs["mtp"]))


def same(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert [step["loss"] for step in some] == [step["loss"] for step in others]
    for one, other in zip(some, others, strict=True):
        assert one["layers"].keys() == other["layers"].keys()
        for number, layer in one["layers"].items():
            for part in ("vectors", "updates", "router_grad"):
                assert torch.equal(layer[part], other["layers"][number][part]), (number, part)
