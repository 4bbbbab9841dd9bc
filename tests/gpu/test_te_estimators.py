"""Every estimator of the router gradient, in one MoE layer and in training, on what is here.

Contract: the output of a layer is the sum of the chosen experts' outputs times their multipliers,
in float64, and the router's gradient that of the formula where it is plain to write; a recomputed
pass draws the same experts and changes nothing; so does recomputation in training.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from implementations import PARAMS, Implementation, build, skip_unless_available, step, tokens
from layer_reference import expert_outputs
from torch import Tensor
from training import TE, relative, train

from megatron_default_moe.maths import naive
from megatron_default_moe.options.estimators import NAMES

Close = Callable[[Tensor, Tensor, float], None]
TESTED = ("cpu-local-fp32", "cpu-local-bf16", "cuda-te-bf16", "cuda-te-fp8-tensorwise")

# Named so that no name is part of another: the rows of docs/results/gpu.md go by them.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "straight-through": {"gradient": "dense", "moe_router_topk": 2},
    "mixer-one": {"gradient": "sparsemixer", "mask_width": 0.9, "moe_router_topk": 1},
    "mixer-two": {"gradient": "sparsemixer-v2", "mask_width": 0.9, "moe_router_topk": 2},
    "groups": {"gradient": "expert-group", "moe_router_topk": 2},
    "relu": {"gradient": "remoe"},
    "linear": {"gradient": "default-linear", "moe_router_topk": 2, "linear_rank": 8},
    "bias": {"gradient": "topk", "loss_free_bias": 0.01, "moe_router_topk": 2},
}
FLAGS = {
    "straight-through": "--moe-router-gradient dense --moe-router-topk 2",
    "mixer-one": "--moe-router-gradient sparsemixer --sparsemixer-mask-width 0.9",
    "mixer-two": "--moe-router-gradient sparsemixer-v2 --sparsemixer-mask-width 0.9"
    " --moe-router-topk 2",
    "groups": "--moe-router-gradient expert-group --moe-router-topk 2",
    "relu": "--moe-router-gradient remoe --remoe-lambda 1e-3",
    "linear": "--moe-router-gradient default-linear --moe-router-topk 2 --default-linear-rank 8",
    "bias": "--moe-router-gradient topk --moe-loss-free-bias 0.01 --moe-router-topk 2",
}


@pytest.fixture(params=[param for param in PARAMS if param.id in TESTED])
def one(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Implementation:
    record_property("implementation", request.param.name)
    skip_unless_available(request.param)
    return request.param


def logit_gradient(
    name: str, logits_TE: Tensor, weights_TE: Tensor, own_TED: Tensor, grad_TD: Tensor
) -> Tensor | None:
    """[T, E] float64 gradient to the logits, where the formula is a line."""
    used_TE1 = (weights_TE != 0).unsqueeze(-1)
    if name == "straight-through":
        return naive.router_logit_gradient(logits_TE.softmax(-1), own_TED, grad_TD)
    if name == "bias":
        seen_TED = torch.where(used_TE1, own_TED, 0.0)
        return naive.router_logit_gradient(logits_TE.softmax(-1), seen_TED, grad_TD)
    if name == "relu":
        return torch.einsum("td,ted->te", grad_TD, own_TED) * (weights_TE != 0)
    return None


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_chosen_experts_are_weighed_and_learned_from(
    one: Implementation, name: str, close: Close
) -> None:
    layer = build(one, **ESTIMATORS[name])
    step(layer, tokens(one, 1))
    layer.zero_grad()
    routed: list[Tensor] = []
    layer.router.register_forward_hook(lambda *args: routed.append(args[-1][0].detach().clone()))
    x = tokens(one, 2)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    weight_ED = layer.router.weight.detach().double().cpu()
    (y,) = step(layer, x, grad=grad)
    weights_TE = routed[0].double().cpu()
    x_TD = x.reshape(-1, x.shape[-1]).double().cpu()
    own_TED = expert_outputs(layer, x.reshape(-1, x.shape[-1])).detach().cpu()
    assert (weights_TE != 0).any()
    close(
        y.reshape(-1, y.shape[-1]),
        torch.einsum("te,ted->td", weights_TE, own_TED),
        one.tolerance,
    )
    assert layer.router.weight.grad.isfinite().all()
    assert layer.router.weight.grad.any()
    grad_TD = grad.reshape(-1, grad.shape[-1]).double().cpu()
    expected_TE = logit_gradient(name, x_TD @ weight_ED.T, weights_TE, own_TED, grad_TD)
    if expected_TE is not None:
        close(layer.router.weight.grad, expected_TE.T @ x_TD, one.gradient_tolerance)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_recomputation_draws_and_counts_the_same(
    one: Implementation, name: str, close: Close
) -> None:
    results = []
    for recompute in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}):
        layer = build(one, **ESTIMATORS[name], **recompute)
        step(layer, tokens(one, 1).requires_grad_())
        outputs = step(layer, *(tokens(one, seed).requires_grad_() for seed in (2, 3)))
        state = [getattr(layer.router, state) for state in layer.router.checkpointed]
        results.append([*outputs, layer.router.weight.grad, *state])
    tolerance = one.tolerance if one.fp8_recipe else 0.0
    for plain, recomputed in zip(*results, strict=True):
        close(recomputed, plain, tolerance)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("name", "way", "tolerance"),
    [
        pytest.param("mixer-one", "", 1e-6, id="cpu-mixer-one"),
        *(pytest.param(name, TE, 2e-3, id=f"te-{name}", marks=[pytest.mark.gpu]) for name in FLAGS),
    ],
)
def test_recomputation_in_training_changes_nothing(
    name: str, way: str, tolerance: float, within: Callable[[float, float], None]
) -> None:
    if way:
        pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    flags = f"{way} {FLAGS[name]}"
    runs = [train(each, metric="load max/mean") for each in (flags, f"{flags} {full}")]
    for plain_step, recomputed_step in zip(*runs, strict=True):
        for value, actual in zip(plain_step, recomputed_step, strict=True):
            within(relative(actual, value), tolerance)


def test_every_estimator_is_here() -> None:
    assert FLAGS.keys() == ESTIMATORS.keys()
    assert {one["gradient"] for one in ESTIMATORS.values()} == {*NAMES} - {"default"}
