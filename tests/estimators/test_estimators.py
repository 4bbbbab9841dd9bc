"""Real Megatron MoE layers under every estimator, on one rank, against float64 references.

Contract: each layer's output and router gradient are those of its formula, written down here as
loops that share no code with the package; ``dense`` has TopK's forward pass and expert gradients
to the bit; state changes in taken steps only; recomputation repeats every bit.
"""

import math
from typing import Any

import pytest
import torch
from building import train_step
from layer_reference import close, expert_outputs, relative_error, tokens
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_default_moe import commit, reduce_step_sums
from megatron_default_moe.layers.moe_layer import DefaultMoELayer
from megatron_default_moe.maths import naive
from megatron_default_moe.options.estimators import ESTIMATORS


@pytest.fixture(params=["alltoall", "allgather"])
def dispatcher(request: pytest.FixtureRequest) -> str:
    return request.param


def run(layer: Any, x: Tensor, seed: int = 3) -> tuple[Tensor, Tensor]:
    """One step; the output [T, D] and the gradient of it that was sent back."""
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    (y,) = train_step(layer, x, grad=grad)
    return y.reshape(-1, y.shape[-1]), grad.reshape(-1, y.shape[-1])


def facts(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, logits and every expert's output in float64."""
    x_TD = x.detach().reshape(-1, x.shape[-1]).double()
    return x_TD, x_TD @ layer.router.weight.detach().double().T, expert_outputs(layer, x_TD)


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize("topk", [1, 2, 4], ids="k{}".format)
def test_dense_is_topk_forward_with_the_dense_gradient(
    new_layer: Any, topk: int, capacity: float | None, dispatcher: str
) -> None:
    settings = {
        "moe_router_topk": topk,
        "moe_token_dispatcher_type": dispatcher,
        "moe_expert_capacity_factor": capacity,
    }
    layer, plain = (new_layer(gradient=name, **settings) for name in ("dense", "topk"))
    x = tokens(layer, 2)
    y, grad = run(layer, x)
    assert torch.equal(y, run(plain, x)[0])
    for ours, theirs in zip(layer.experts.parameters(), plain.experts.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    x_TD, logits_TE, own_TED = facts(layer, x)
    logit_grad_TE = naive.router_logit_gradient(torch.softmax(logits_TE, -1), own_TED, grad)
    close(layer.router.weight.grad, logit_grad_TE.T @ x_TD)
    assert relative_error(plain.router.weight.grad, logit_grad_TE.T @ x_TD) > 0.01


def test_dense_runs_no_other_experts_in_evaluation(new_layer: Any) -> None:
    layer = new_layer(gradient="dense")
    calls: list[int] = []
    layer.experts.register_forward_hook(lambda *_: calls.append(1))
    layer.eval()
    layer(tokens(layer))
    assert calls == [1]
    layer.train()
    layer(tokens(layer))
    assert calls == [1] * 3


def group_reference(layer: Any, x: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
    """[T, D] the group term and [E, D] the router gradient, from the N x N table, by loops."""
    x_TD, logits_TE, own_TED = facts(layer, x)
    probs_TE = torch.softmax(logits_TE, -1)
    num_tokens, num = probs_TE.shape
    size, topk = layer.router.options.expert_group_size, layer.config.moe_router_topk
    group = [set(row.topk(size).indices.tolist()) for row in probs_TE]
    used = [set(row.topk(topk).indices.tolist()) for row in probs_TE]
    table = torch.zeros(num, num, x_TD.shape[1], dtype=torch.float64)
    for i in range(num):
        for j in range(num):
            inside = [t for t in range(num_tokens) if i in used[t] and {i, j} <= group[t]]
            if inside:
                table[i, j] = own_TED[inside, i].mean(0)
    values_TED, term_TD = own_TED.clone(), torch.zeros_like(x_TD)
    for t in range(num_tokens):
        for i in set(range(num)) - used[t]:
            values_TED[t, i] = sum(table[i, j] for j in group[t]) / size
            term_TD[t] += probs_TE[t, i] * values_TED[t, i]
    return term_TD, naive.router_logit_gradient(probs_TE, values_TED, grad_TD).T @ x_TD


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize(("size", "topk"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_expert_group_is_the_table_form(
    new_layer: Any, size: int, topk: int, in_forward: bool, dispatcher: str
) -> None:
    layer, plain = (
        new_layer(
            gradient=gradient,
            moe_router_topk=topk,
            expert_group_size=size,
            expert_group_in_forward=in_forward,
            moe_token_dispatcher_type=dispatcher,
        )
        for gradient in ("expert-group", "topk")
    )
    x = tokens(layer, 2)
    y, grad = run(layer, x)
    base = run(plain, x)[0]
    term_TD, weight_grad = group_reference(layer, x, grad)
    if in_forward:
        close(y - base, term_TD, 1e-4)
    else:
        assert torch.equal(y, base)
    close(layer.router.weight.grad, weight_grad)
    layer.eval()
    plain.eval()
    assert torch.equal(layer(x)[0], plain(x)[0])


@pytest.mark.parametrize("topk", [1, 2])
def test_remoe_is_its_formula(new_layer: Any, topk: int, dispatcher: str) -> None:
    layer = new_layer(
        gradient="remoe",
        moe_router_topk=topk,
        remoe_lambda=0.3,
        moe_token_dispatcher_type=dispatcher,
    )
    x = tokens(layer, 2)
    y, grad = run(layer, x)
    x_TD, logits_TE, own_TED = facts(layer, x)
    gates_TE = logits_TE.clamp_min(0)
    open_TE = gates_TE > 0
    assert 0 < open_TE.sum() < open_TE.numel()
    close(y, (gates_TE.unsqueeze(-1) * own_TED).sum(1))
    num_tokens, num = gates_TE.shape
    share_E = open_TE.double().sum(0) / (num_tokens * topk)
    logit_grad_TE = (own_TED * grad.double().unsqueeze(1)).sum(
        -1
    ) + 0.3 * num * share_E / num_tokens
    close(layer.router.weight.grad, (logit_grad_TE * open_TE).T @ x_TD)
    too_dense = open_TE.double().mean() > topk / num
    close(layer.router.sparsity_weight, torch.tensor([0.3 * 1.2 if too_dense else 0.3 / 1.2]))


def test_remoe_survives_a_layer_whose_gates_are_all_closed(new_layer: Any, dispatcher: str) -> None:
    layer = new_layer(gradient="remoe", moe_token_dispatcher_type=dispatcher)
    layer.router.collects_details = True
    x = tokens(layer, 2).abs()
    with torch.no_grad():
        layer.router.weight.fill_(-1.0)
    before = float(layer.router.sparsity_weight)
    y, _ = run(layer, x)
    assert (y == 0).all()
    assert float(layer.router.sparsity_weight) == pytest.approx(before / 1.2)
    assert layer.router.step_metrics.isfinite().all()
    assert layer.router.weight.grad.isfinite().all()


def mask(row: Tensor, width: float) -> list[int]:
    best = float(row.max())
    return [
        j
        for j, s in enumerate(row.tolist())
        if s > -math.inf and best - s <= width * (abs(best) + abs(s))
    ]


def drawn_reference(
    row: Tensor, numbers: list[int], value: float, version: int, width: float
) -> tuple[list[float], list[int], Tensor]:
    """Multipliers, kinds and per-choice d multiplier / d logits, from what was drawn."""
    multipliers, gradients, left = [], [], row.clone()
    for number in numbers:
        kept = mask(left, width)
        total = sum(math.exp(float(left[j])) for j in kept)
        probs = torch.tensor(
            [math.exp(float(s)) / total if j in kept else 0.0 for j, s in enumerate(left.tolist())],
            dtype=torch.float64,
        )
        p = float(probs[number])
        indicator = torch.zeros_like(probs)
        indicator[number] = 1
        multipliers.append(p)
        gradients.append((2 if version == 1 else 1) * p * (indicator - probs))
        left[number] = -math.inf
    return multipliers, [], torch.stack(gradients)


@pytest.mark.parametrize(
    ("name", "topk"), [("sparsemixer", 1), ("sparsemixer-v2", 1), ("sparsemixer-v2", 2)]
)
def test_drawn_experts_have_the_multiplier_and_gradient_of_the_formula(
    new_layer: Any, name: str, topk: int, dispatcher: str
) -> None:
    width = 0.9
    layer = new_layer(gradient=name, moe_router_topk=topk, mask_width=width,
                      moe_token_dispatcher_type=dispatcher)  # fmt: skip
    version = 1 if name == "sparsemixer" else 2
    if version == 1:
        with torch.no_grad():
            layer.router.output_scale.copy_(torch.linspace(0.5, 1.5, 12))
    x = tokens(layer, 2, sequence=101)
    seen: list[tuple[Tensor, Tensor]] = []
    choose = layer.router.choose

    def choosing(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        result = choose(logits_TE)
        seen.append((result[0].detach().double(), result[1]))
        return result

    layer.router.choose = choosing
    y, grad = run(layer, x)
    ((multipliers_TE, chosen_TE),) = seen
    x_TD, logits_TE, own_TED = facts(layer, x)
    scale = layer.router.output_scale.detach().double() if version == 1 else 1.0
    close(y, (multipliers_TE.unsqueeze(-1) * own_TED).sum(1) * scale)
    assert (chosen_TE.sum(-1) == topk).all()
    logit_grad_TE = torch.zeros_like(logits_TE)
    halved = whole = others = 0
    for t, row in enumerate(logits_TE):
        numbers = chosen_TE[t].nonzero().flatten().tolist()
        orders = [numbers, numbers[::-1]]
        fits = []
        for order in orders[: len(numbers)]:
            if any(number not in mask(left, width) for number, left in _lefts(row, order)):
                continue
            p, _, gradients = drawn_reference(row, order, 0.0, version, width)
            factors = [float(multipliers_TE[t, n]) / q for n, q in zip(order, p, strict=True)]
            low = 1 / 2 if version == 1 else 1 / 3
            best = [int(left.argmax()) for _, left in _lefts(row, order)]
            allowed = all(
                math.isclose(f, 1, rel_tol=1e-5) or (math.isclose(f, low, rel_tol=1e-5) and n != b)
                for f, n, b in zip(factors, order, best, strict=True)
            )
            if allowed:
                fits.append((order, factors, gradients))
        assert len(fits) >= 1, "no order of the drawn experts explains their multipliers"
        order, factors, gradients = fits[0]
        halved += sum(f < 0.9 for f in factors)
        best = [int(left.argmax()) for _, left in _lefts(row, order)]
        others += sum(n != b for n, b in zip(order, best, strict=True))
        whole += sum(f > 0.9 for f in factors)
        g = (own_TED[t] * (grad[t].double() * scale)).sum(-1)
        for n, gradient in zip(order, gradients, strict=True):
            logit_grad_TE[t] += g[n] * gradient
    close(layer.router.weight.grad, logit_grad_TE.T @ x_TD)
    # The coin: 1/2 of the draws beside the argmax are halved, 3/4 are cut to a third.
    expected = 1 / 2 if version == 1 else 3 / 4
    assert others > 50
    assert abs(halved / others - expected) < 4 * math.sqrt(expected * (1 - expected) / others)
    layer.eval()
    seen.clear()
    layer(x)
    best_TK = logits_TE.topk(topk, -1).indices
    assert torch.equal(seen[0][1], torch.zeros_like(chosen_TE).scatter(1, best_TK, True))


def _lefts(row: Tensor, order: list[int]) -> list[tuple[int, Tensor]]:
    """Each drawn expert with the logits it was drawn from."""
    pairs, left = [], row.clone()
    for number in order:
        pairs.append((number, left.clone()))
        left[number] = -math.inf
    return pairs


@pytest.mark.parametrize("gradient", ["topk", "default", "dense", "expert-group"])
def test_the_bias_takes_part_in_the_choice_alone_and_moves_towards_balance(
    new_layer: Any, gradient: str
) -> None:
    layer = new_layer(gradient=gradient, loss_free_bias=0.01)
    with torch.no_grad():
        layer.router.choice_bias.copy_(torch.tensor([0.5, 0.0, -0.5, 0.0, 0.1]))
    before = layer.router.choice_bias.clone()
    x = tokens(layer, 2)
    probs, chosen = [], []
    routing = layer.router.routing
    layer.router.routing = lambda *a, **k: (
        lambda r: (probs.append(r[0].detach()), chosen.append(r[1]), r)[2]
    )(routing(*a, **k))
    run(layer, x)
    _, logits_TE, _ = facts(layer, x)
    scores_TE = torch.softmax(logits_TE, -1)
    expected_TK = (scores_TE + before).topk(2, -1).indices
    map_TE = torch.zeros_like(chosen[0]).scatter(1, expected_TK, True)
    assert torch.equal(chosen[0], map_TE)
    assert not torch.equal(
        map_TE.sum(0),
        torch.zeros_like(map_TE).scatter(1, scores_TE.topk(2, -1).indices, True).sum(0),
    )
    close(probs[0], scores_TE * map_TE)
    load_E = map_TE.double().sum(0)
    close(layer.router.choice_bias, before + 0.01 * torch.sign(load_E.mean() - load_E))


@pytest.mark.parametrize("name", [one.name for one in ESTIMATORS])
@pytest.mark.parametrize("what", ["not taken", "evaluation"])
def test_state_changes_in_taken_steps_only(new_layer: Any, name: str, what: str) -> None:
    topk = 1 if name == "sparsemixer" else 2
    bias = None if name in ("sparsemixer", "sparsemixer-v2", "remoe") else 0.01
    layer = new_layer(gradient=name, moe_router_topk=topk, loss_free_bias=bias)
    run(layer, tokens(layer, 1))
    names = [n for n in layer.router.checkpointed if n != "output_scale"]
    assert set(ESTIMATORS_STATE[name]) <= set(layer.router.checkpointed)
    before = {n: getattr(layer.router, n).clone() for n in names}
    if what == "evaluation":
        layer.eval()
        layer(tokens(layer, 5))
        layer.train()
    else:
        layer(tokens(layer, 5))[0].sum().backward()
        reduce_step_sums(layer)
        commit(layer, taken=False)
    assert all(torch.equal(before[n], getattr(layer.router, n)) for n in names)
    run(layer, tokens(layer, 6))
    assert all(not torch.equal(before[n], getattr(layer.router, n)) for n in names)


ESTIMATORS_STATE = {one.name: one.checkpointed for one in ESTIMATORS}


@pytest.mark.parametrize("name", [one.name for one in ESTIMATORS])
def test_recomputation_repeats_every_bit(new_layer: Any, name: str) -> None:
    """The second micro-batch too, whose draws go on where the first one's ended."""
    topk = 1 if name == "sparsemixer" else 2
    extra = {"expert_group_in_forward": True} if name == "expert-group" else {}
    layers = [
        new_layer(gradient=name, moe_router_topk=topk, mask_width=0.9, **extra, **recompute)
        for recompute in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]})
    ]
    assert [layer.moe_layer_recompute for layer in layers] == [False, True]
    results = []
    for layer in layers:
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        outputs = []
        for step in range(2):
            layer.zero_grad()
            outputs += train_step(
                layer, *(tokens(layer, 10 * step + i).requires_grad_() for i in range(3))
            )
        results.append((outputs, layer.router.weight.grad, layer.router.state_dict()))
    (one, grad, state), (two, grad2, state2) = results
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(grad, grad2)
    assert all(torch.equal(value, state2[key]) for key, value in state.items() if value is not None)


def test_every_estimator_is_built_by_one_layer(new_layer: Any) -> None:
    stock = new_layer(gradient="topk").router.state_dict()
    for one in ESTIMATORS:
        topk = one.most_experts or 2
        layer = new_layer(gradient=one.name, moe_router_topk=topk)
        assert isinstance(layer, DefaultMoELayer) == (one.name != "topk")
        assert layer.router.chooses == one.chooses
        assert layer.router.model_wide == one.model_wide
        beyond = layer.router.state_dict().keys() - stock.keys()
        assert beyond == set(one.checkpointed) == set(layer.router.checkpointed)
        assert {name for name, _ in layer.router.named_parameters()} == {"weight", *one.trained}
