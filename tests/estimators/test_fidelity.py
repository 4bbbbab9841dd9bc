"""The fidelity of the router's gradient, on one rank, against dense mixtures in float64.

Contract: under every estimator the two gradients that are compared are the router's own (without
balance losses) and the dense mixture's; dense reads 1; a probed step has the same bits as one that
is not; activation recomputation probes alike; only the first micro-batch is probed.
"""

from typing import Any

import pytest
import torch
from building import train_step
from layer_reference import close, expert_outputs, relative_error, tokens
from torch import Tensor

from megatron_default_moe.maths import naive
from megatron_default_moe.options.estimators import ESTIMATORS

NAMES = [one.name for one in ESTIMATORS]


def settings(name: str, **more: Any) -> dict[str, Any]:
    topk = 1 if name == "sparsemixer" else 2
    return {"gradient": name, "moe_router_topk": topk, "mask_width": 0.9, "beta": 0.5, **more}


def step(layer: Any, x: Tensor, probes: bool) -> tuple[Tensor, Tensor]:
    """A step of one micro-batch: the output, and the gradient that was sent back."""
    layer.router.probes = probes
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (y,) = train_step(layer, x, grad=grad)
    return y, grad.reshape(-1, grad.shape[-1]).double()


def true_gradient(layer: Any, x: Tensor, grad: Tensor) -> Tensor:
    """[E, H] float64: that of the dense mixture of the layer's own gates."""
    x_TD = x.detach().reshape(-1, x.shape[-1]).double()
    logits_TE = x_TD @ layer.router.weight.detach().double().T
    own_TED = expert_outputs(layer, x_TD).detach()
    if layer.router.options.gradient == "sparsemixer":
        own_TED = own_TED * layer.router.output_scale.detach().double()
    if layer.router.options.gradient == "remoe":
        return ((own_TED * grad.unsqueeze(1)).sum(-1) * (logits_TE > 0)).T @ x_TD
    return naive.router_logit_gradient(torch.softmax(logits_TE, -1), own_TED, grad).T @ x_TD


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", NAMES)
def test_the_two_gradients_are_the_routers_and_the_dense_mixtures(
    new_layer: Any, name: str, dispatcher: str
) -> None:
    balance = {} if name == "remoe" else {
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}  # fmt: skip
    probed = new_layer(**settings(name, moe_token_dispatcher_type=dispatcher, **balance))
    plain = new_layer(**settings(name, moe_token_dispatcher_type=dispatcher))
    for layer in (probed, plain):
        step(layer, tokens(layer, 1), probes=False)
        if name == "sparsemixer":
            with torch.no_grad():
                layer.router.output_scale.copy_(torch.linspace(0.5, 1.5, 12))
        layer.zero_grad()
    x = tokens(probed, 2)
    _, grad = step(probed, x, probes=True)
    step(plain, x, probes=False)
    own, true = plain.router.weight.grad.double(), true_gradient(probed, x, grad)
    if name == "remoe":
        own = true  # The layer's gradient also has its sparsity loss.
    cosine, ratio = probed.router.fidelity.tolist()
    assert cosine == pytest.approx(float((own * true).sum() / (own.norm() * true.norm())), abs=2e-5)
    assert ratio == pytest.approx(float(own.norm() / true.norm()), rel=2e-5)
    if name in ("dense", "remoe"):
        assert (cosine, ratio) == pytest.approx((1, 1), abs=1e-5)
    else:
        assert cosine < 0.999


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_probe_changes_no_bit(new_layer: Any, name: str, recompute: bool) -> None:
    more = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recompute else {}
    results, fidelities = [], []
    for probes in (False, True):
        layer = new_layer(**settings(name, moe_expert_capacity_factor=None, **more))
        for count in range(2):
            layer.zero_grad()
            x = tokens(layer, count).requires_grad_()
            step(layer, x, probes)
        grads = [p.grad for p in layer.parameters()]
        results.append([x.grad, *grads, *layer.router.state_dict().values()])
        fidelities.append(layer.router.fidelity)
    off, on = results
    assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True) if a is not None)
    assert fidelities[0] is None
    assert fidelities[1].isfinite().all()
    other = new_layer(**settings(name))
    for count in range(2):
        step(other, tokens(other, count).requires_grad_(), probes=True)
    assert torch.equal(other.router.fidelity, fidelities[1])


def test_the_first_micro_batch_alone_is_probed(new_layer: Any) -> None:
    layers = [new_layer(**settings("topk")) for _ in range(2)]
    for layer, batches in zip(layers, ((1,), (1, 5, 6)), strict=True):
        layer.router.probes = True
        train_step(layer, *(tokens(layer, seed) for seed in batches))
    assert torch.equal(layers[0].router.fidelity, layers[1].router.fidelity)
    layers[0].router.probes = False
    train_step(layers[0], tokens(layers[0], 1))
    assert layers[0].router.fidelity is None


def test_capacity_is_part_of_both(new_layer: Any) -> None:
    """What an expert's limit drops, the estimator does not see and the dense mixture does."""
    layer = new_layer(**settings("topk", moe_expert_capacity_factor=0.6))
    x = tokens(layer, 2)
    _, grad = step(layer, x, probes=True)
    own, true = layer.router.weight.grad, true_gradient(layer, x, grad)
    assert float(layer.router.fidelity[1]) == pytest.approx(float(own.norm() / true.norm()), 2e-5)
    assert relative_error(own, true) > 0.1
    close(own, own)
