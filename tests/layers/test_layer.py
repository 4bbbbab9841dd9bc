"""One real Megatron MoE layer with default vectors, on one rank.

Contract: the layer computes the paper's formula and its gradient (against float64 references that
share no code with it); constant experts make it exactly a dense mixture; the forward of the
backward-only form and of topk is Megatron's, bit for bit; the committed vectors are S/N of what
the experts returned; only steps that the optimizer took leave a trace; state stays float32.
"""

from typing import Any

import pytest
import torch
from building import train_step
from layer_reference import close, expert_outputs, reference, tokens
from torch import Tensor

from megatron_default_moe import commit, reduce_step_sums
from megatron_default_moe.estimators.default import DefaultMoERouter
from megatron_default_moe.maths import naive


@pytest.fixture(params=["alltoall", "allgather"])
def dispatcher(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("topk", [1, 2, 4], ids="k{}".format)
def test_output_and_router_gradient_are_those_of_the_formula(
    new_layer: Any, topk: int, dispatcher: str
) -> None:
    layer = new_layer(moe_router_topk=topk, moe_token_dispatcher_type=dispatcher, beta=0.5)
    train_step(layer, tokens(layer, 1))
    layer.zero_grad()
    x, vectors_ED = tokens(layer, 2), layer.router.default_vectors.clone()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (y,) = train_step(layer, x, grad=grad)
    expected = reference(layer, x, vectors_ED)
    assert vectors_ED.norm() > 0
    close(y.reshape(-1, y.shape[-1]), expected["output"])
    logit_grad_TE = naive.router_logit_gradient(
        expected["probs"], expected["values"], grad.reshape(-1, grad.shape[-1])
    )
    close(layer.router.weight.grad, logit_grad_TE.T @ expected["x"])


@pytest.mark.parametrize("topk", [1, 2], ids="k{}".format)
def test_topk_router_gradient_has_zero_values_for_unused_experts(new_layer: Any, topk: int) -> None:
    layer = new_layer(gradient="topk", moe_router_topk=topk)
    x = tokens(layer)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    train_step(layer, x, grad=grad)
    expected = reference(layer, x, torch.zeros(5, x.shape[-1]))
    logit_grad_TE = naive.router_logit_gradient(
        expected["probs"], expected["values"], grad.reshape(-1, grad.shape[-1])
    )
    assert logit_grad_TE[~expected["active"]].abs().max() > 0
    close(layer.router.weight.grad, logit_grad_TE.T @ expected["x"])


@pytest.mark.parametrize("weighting", ["router", "uniform"])
@pytest.mark.parametrize("topk", [1, 2], ids="k{}".format)
def test_constant_experts_make_a_dense_mixture(
    new_layer: Any, topk: int, weighting: str, dispatcher: str
) -> None:
    layer = new_layer(
        moe_router_topk=topk,
        moe_token_dispatcher_type=dispatcher,
        weighting=weighting,
        add_bias_linear=True,
        beta=0.0,
    )
    constants = []
    for expert in layer.experts.local_experts:
        # On one rank Megatron's local linear returns a view here, to which its MLP then adds the
        # bias in place: autograd refuses. With expert parallelism it takes this branch instead.
        expert.linear_fc2.explicit_expert_comm = True
        torch.nn.init.zeros_(expert.linear_fc2.weight)
        torch.nn.init.normal_(expert.linear_fc2.bias)
        constants.append(expert.linear_fc2.bias.detach().double())
    train_step(layer, tokens(layer, 1, sequence=101))
    assert (layer.router.default_vector_updates == 1).all(), "an expert got no token"
    layer.zero_grad()
    x = tokens(layer, 2)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (y,) = train_step(layer, x, grad=grad)

    weight = layer.router.weight.detach().double().requires_grad_()
    x_TD = x.reshape(-1, x.shape[-1]).double()
    probs_TE = torch.softmax(x_TD @ weight.T + layer.router.bias.detach().double(), dim=-1)
    mixture_TD = probs_TE @ torch.stack(constants)
    (mixture_TD * grad.reshape(mixture_TD.shape)).sum().backward()
    close(y.reshape(mixture_TD.shape), mixture_TD.detach())
    close(layer.router.weight.grad, weight.grad)


def test_backward_only_has_topk_forward_and_default_gradient(new_layer: Any) -> None:
    layers = {
        name: new_layer(**options)
        for name, options in {
            "stock": {"stock": True},
            "off": {"in_forward": False},
            "on": {"in_forward": True},
        }.items()
    }
    vectors = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    x = tokens(layers["stock"])
    outputs, grads = {}, {}
    for name, layer in layers.items():
        if name != "stock":
            layer.router.default_vectors.copy_(vectors)
        y, _ = layer(x)
        y.sum().backward()
        outputs[name], grads[name] = y.detach(), layer.router.weight.grad
    assert torch.equal(outputs["off"].view(torch.int32), outputs["stock"].view(torch.int32))
    assert torch.equal(grads["off"], grads["on"])
    assert not torch.equal(outputs["on"], outputs["stock"])
    assert not torch.allclose(grads["off"], grads["stock"])


@pytest.mark.parametrize("order", ["after-use", "before-use"])
def test_a_fade_in_lets_the_term_into_the_forward_over_its_steps(
    new_layer: Any, order: str
) -> None:
    """y_topk + n/N y' in training and evaluation, with the router gradient of all of y'."""
    layer, whole = new_layer(order=order, fade_in=3), new_layer(order=order)
    topk = new_layer(gradient="topk")
    assert {"default_vector_steps"} == layer.router.state_dict().keys() - whole.router.state_dict()
    start_ED = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    for one in (layer, whole):
        one.router.default_vectors.copy_(start_ED)
    for step in range(5):
        x = tokens(layer, step)
        outputs, grads = [], []
        for one in (layer, whole, topk):
            one.zero_grad()
            one.eval()
            with torch.no_grad():
                evaluated = one(x)[0]
            one.train()
            train_step(one, x, taken=False)  # neither this nor evaluation counts
            one.zero_grad()
            outputs.append([evaluated, *train_step(one, x)])
            grads.append(one.router.weight.grad)
        for part, full, none in zip(*outputs, strict=True):
            if step:
                close(part - none, min(step / 3, 1) * (full - none), 1e-4)
            assert torch.equal(part, full) == (step >= 3)
            assert torch.equal(part, none) == (step == 0)
        close(grads[0], grads[1])
        assert torch.equal(layer.router.default_vectors, whole.router.default_vectors)
        assert int(layer.router.default_vector_steps) == step + 1


@pytest.mark.parametrize("balance", ["none", "aux_loss"])
def test_topk_is_stock_bit_for_bit(new_layer: Any, balance: str, dispatcher: str) -> None:
    settings = {
        "moe_router_load_balancing_type": balance,
        "moe_aux_loss_coeff": 0.01 if balance != "none" else 0.0,
        "moe_token_dispatcher_type": dispatcher,
    }
    stock = new_layer(stock=True, **settings)
    ours = new_layer(gradient="topk", **settings)
    x = tokens(stock)
    y_stock, _ = stock(x)
    y_stock.sum().backward()
    (y_ours,) = train_step(ours, x)
    assert torch.equal(y_stock, y_ours)
    ours_grads = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter.grad, ours_grads[name].grad), name
    assert ours.state_dict().keys() == stock.state_dict().keys()


CAPACITY: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"moe_expert_capacity_factor": 0.6},
    "capacity-padded": {
        "moe_expert_capacity_factor": 1.2,
        "moe_pad_expert_input_to_capacity": True,
    },
}


@pytest.mark.parametrize("capacity", CAPACITY.values(), ids=CAPACITY.keys())
@pytest.mark.parametrize("weighting", ["router", "uniform"])
@pytest.mark.parametrize("topk", [1, 2], ids="k{}".format)
def test_committed_vectors_are_the_mean_outputs_of_the_step(
    new_layer: Any, topk: int, weighting: str, capacity: dict[str, Any]
) -> None:
    layer = new_layer(moe_router_topk=topk, weighting=weighting, beta=0.3, **capacity)
    before_ED = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    layer.router.default_vectors.copy_(before_ED)
    routed: list[tuple[Tensor, Tensor]] = []
    layer.router.register_forward_hook(lambda *args: routed.append(args[-1]))
    inputs = [tokens(layer, seed) for seed in (1, 2, 3)]
    train_step(layer, *inputs)

    sums_ED, mass_E = torch.zeros(5, 12, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    dropped = 0
    for x, (probs_TE, map_TE) in zip(inputs, routed, strict=True):
        own_TED = expert_outputs(layer, x.reshape(-1, 12)).detach()
        used_TE = map_TE & (probs_TE != 0)
        dropped += probs_TE.shape[0] * topk - int(used_TE.sum())
        weight_TE = used_TE.double() * (probs_TE.double() if weighting == "router" else 1.0)
        sums_ED += torch.einsum("te,ted->ed", weight_TE, own_TED)
        mass_E += weight_TE.sum(0)
    assert (dropped > 0) == bool(capacity)
    expected_ED = naive.ema(before_ED, sums_ED, mass_E, 0.3)
    close(layer.router.default_vectors, expected_ED)


def test_a_dropped_token_sees_the_default_vector_of_the_expert_that_dropped_it(
    new_layer: Any,
) -> None:
    layer = new_layer(moe_router_topk=1, moe_expert_capacity_factor=0.5)
    vectors_ED = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    layer.router.default_vectors.copy_(vectors_ED)
    routed: list[tuple[Tensor, Tensor]] = []
    layer.router.register_forward_hook(lambda *args: routed.append(args[-1]))
    x = tokens(layer)
    y, _ = layer(x)
    full = reference(layer, x, vectors_ED)
    dropped_T = ~routed[0][1].any(-1)
    assert dropped_T.any()
    expected_TD = full["probs"] @ vectors_ED.double()
    close(y.reshape(-1, 12)[dropped_T].detach(), expected_TD[dropped_T])


def test_micro_batches_of_a_step_all_use_the_vectors_before_it(new_layer: Any) -> None:
    layer = new_layer(beta=0.2)
    train_step(layer, tokens(layer, 1))
    vectors_ED = layer.router.default_vectors.clone()
    outputs = train_step(layer, tokens(layer, 2), tokens(layer, 3))
    for seed, y in zip((2, 3), outputs, strict=True):
        close(y.reshape(-1, 12), reference(layer, tokens(layer, seed), vectors_ED)["output"])
    assert not torch.equal(layer.router.default_vectors, vectors_ED)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_before_use_is_the_papers_formula(new_layer: Any, beta: float) -> None:
    layer = new_layer(order="before-use", beta=beta, weighting="uniform")
    old_ED = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    layer.router.default_vectors.copy_(old_ED)
    x = tokens(layer)
    (y,) = train_step(layer, x)
    first = reference(layer, x, old_ED)
    weight_TE = first["active"].double()
    sums_ED = torch.einsum("te,ted->ed", weight_TE, first["own"])
    new_ED = naive.ema(old_ED, sums_ED, weight_TE.sum(0), beta)
    close(y.reshape(-1, 12), reference(layer, x, new_ED)["output"])
    close(layer.router.default_vectors, new_ED)


@pytest.mark.parametrize("order", ["after-use", "before-use"])
def test_only_steps_taken_leave_a_trace(new_layer: Any, order: str) -> None:
    layer = new_layer(order=order)
    train_step(layer, tokens(layer, 1))
    state = {name: tensor.clone() for name, tensor in layer.router.state_dict().items()}

    def unchanged() -> bool:
        return all(torch.equal(state[n], t) for n, t in layer.router.state_dict().items())

    train_step(layer, tokens(layer, 2), taken=False)
    assert unchanged(), "a skipped step"
    layer.eval()
    with torch.no_grad():
        layer(tokens(layer, 3))
    layer.train()
    assert unchanged(), "an evaluation pass"
    with torch.no_grad():
        layer(tokens(layer, 4))  # the first of recomputation's two passes
    assert (layer.router.local_stats == 0).all(), "a pass without gradients"
    assert (layer.router.local_sums == 0).all(), "a pass without gradients"

    twin = new_layer(order=order)
    twin.load_state_dict(layer.state_dict())
    train_step(twin, tokens(twin, 5))
    layer(tokens(layer, 6))  # the attempt that is thrown away
    reduce_step_sums(layer)
    train_step(layer, tokens(layer, 5))
    for name, tensor in twin.router.state_dict().items():
        assert torch.equal(tensor, layer.router.state_dict()[name]), f"a rerun changed {name}"


@pytest.mark.parametrize("order", ["after-use", "before-use"])
def test_recomputation_changes_nothing(new_layer: Any, order: str) -> None:
    results = []
    for recompute in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}):
        layer = new_layer(order=order, **recompute)
        assert layer.moe_layer_recompute == bool(recompute)
        outputs = [
            *train_step(layer, tokens(layer, 1).requires_grad_()),
            *train_step(
                layer, tokens(layer, 2).requires_grad_(), tokens(layer, 3).requires_grad_()
            ),
        ]
        results.append([*outputs, layer.router.default_vectors, layer.router.weight.grad])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_evaluation_uses_the_vectors_unless_told_otherwise(new_layer: Any) -> None:
    outputs = {}
    for name, settings in {"on": {}, "off": {"in_eval": False}, "stock": {"stock": True}}.items():
        layer = new_layer(**settings)
        if name != "stock":
            layer.router.default_vectors.fill_(1.0)
        with torch.no_grad():
            outputs[name], _ = layer.eval()(tokens(layer))
    assert torch.equal(outputs["off"], outputs["stock"])
    assert not torch.allclose(outputs["on"], outputs["stock"])


def test_bias_correction_gives_the_mean_from_the_first_update(new_layer: Any) -> None:
    layer, plain = new_layer(beta=0.9, bias_correction=True), new_layer(beta=0.0)
    for one in (layer, plain):
        train_step(one, tokens(one, 1))
    close(layer.router.vectors_in_use(), plain.router.vectors_in_use())
    close(layer.router.default_vectors, 0.1 * plain.router.default_vectors)


def test_gaussian_start_depends_on_the_layer_alone(new_layer: Any) -> None:
    first, second = new_layer(init="gaussian", seed=1), new_layer(init="gaussian", seed=2)
    assert torch.equal(first.router.default_vectors, second.router.default_vectors)
    assert 0 < first.router.default_vectors.std() < 3 * first.config.init_method_std
    second.set_layer_number(2)
    assert not torch.equal(first.router.default_vectors, second.router.default_vectors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_keeps_every_bit_in_half_precision_models(new_layer: Any, dtype: Any) -> None:
    layer = new_layer()
    train_step(layer, tokens(layer, 1))
    before = {name: buffer.clone() for name, buffer in layer.router.named_buffers()}
    layer.to(dtype)
    assert layer.router.weight.dtype == dtype
    for name, buffer in layer.router.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert buffer.dtype == before[name].dtype, name
    x = tokens(layer, 2).to(dtype)
    (y,) = train_step(layer, x)
    assert y.dtype == dtype
    assert layer.router.default_vectors.dtype == torch.float32
    assert layer.router.default_vectors.isfinite().all()


def test_meta_device_build_leaves_no_garbage(new_layer: Any, one_rank: None) -> None:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.training.models.dist_utils import to_empty_if_meta_device

    config = new_layer().config
    with torch.device("meta"):
        router = DefaultMoERouter(config, get_default_pg_collection())
    assert router.weight.is_meta
    to_empty_if_meta_device(router, device=torch.device("cpu"))
    for name, buffer in router.named_buffers():
        assert (buffer == 0).all(), name


def test_a_bad_expert_output_never_reaches_the_vectors(new_layer: Any) -> None:
    layer, clean = new_layer(moe_router_topk=1), new_layer(moe_router_topk=1)
    for one in (layer, clean):
        train_step(one, tokens(one, 1))
    before_ED = layer.router.default_vectors.clone()
    with torch.no_grad():
        layer.experts.local_experts[2].linear_fc2.weight[0, 0] = float("nan")
    train_step(layer, tokens(layer, 2))
    train_step(clean, tokens(clean, 2))
    assert torch.equal(layer.router.default_vectors[2], before_ED[2])
    others = [0, 1, 3, 4]
    assert torch.equal(layer.router.default_vectors[others], clean.router.default_vectors[others])
    assert layer.router.rejected_updates.item() == 1


@pytest.mark.parametrize(("order", "in_forward"), [("after-use", 0), ("before-use", 2)])
def test_every_collective_of_a_step_is_accounted_for(
    new_layer: Any, monkeypatch: pytest.MonkeyPatch, order: str, in_forward: int
) -> None:
    layers = torch.nn.ModuleList([new_layer(order=order), new_layer(order=order)])
    calls: list[str] = []
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single",
                 "broadcast", "reduce_scatter", "reduce_scatter_tensor"):  # fmt: skip
        original = getattr(torch.distributed, name)

        def counted(*args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _call(*args, **kwargs)

        monkeypatch.setattr(torch.distributed, name, counted)
    for layer in layers:
        layer(tokens(layer))
    assert calls == ["all_reduce"] * in_forward, "one per layer and pass before-use, else none"
    calls.clear()
    reduce_step_sums(layers)
    commit(layers, taken=True)
    assert calls == ["all_reduce"], "one per step, for all layers"
    assert all((layer.router.default_vector_updates > 0).any() for layer in layers)
