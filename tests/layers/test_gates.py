"""Every gate and router option on a real layer, against float64 references.

Contract: with sigmoid-type gates, groups of experts, an expert bias and a scaling factor, output,
router gradient and committed vectors are those of the formula; an expert bias chooses experts and
weighs nothing; the normalised gate divides by the sum over ALL experts, in topk training too, and
Megatron's auxiliary losses reach the router through it unchanged; the other router options leave
the formula as it is, for the logits and the routing that they make.
"""

import dataclasses
from typing import Any

import pytest
import torch
from building import train_step
from layer_reference import chosen, close, expert_outputs, record_routing, scores, tokens
from torch import Tensor

from megatron_default_moe.maths import naive

EXPERTS, WIDTH, SCALE, BETA = 8, 12, 2.5, 0.3


@dataclasses.dataclass(frozen=True)
class Gate:
    """One way to weigh the experts."""

    score: str
    topk: int
    normalized: bool

    def settings(self) -> dict[str, Any]:
        return {
            "num_moe_experts": EXPERTS,
            "moe_router_score_function": self.score,
            "moe_router_topk": self.topk,
            "moe_router_pre_softmax": self.score == "softmax",
            "moe_router_topk_scaling_factor": SCALE,
            "normalized_gate": self.normalized,
            "beta": BETA,
        }

    def probs(self, logits_TE: Tensor) -> Tensor:
        """[T, E] float64: the weight of every expert, used or not."""
        scores_TE = scores(self.score, logits_TE)
        if self.normalized:
            scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        return SCALE * scores_TE


GATES = [
    Gate("softmax", 2, False),
    *(Gate(s, k, n) for s in ("sigmoid", "sqrtsoftplus") for k, n in ((1, False), (1, True))),
    *(Gate(score, 2, True) for score in ("sigmoid", "sqrtsoftplus")),
]
NORMALIZED = [gate for gate in GATES if gate.normalized]
ROUTINGS = {
    "plain": {},
    "groups": {"groups": 4},
    "bias": {"bias": 1},
    "both": {"groups": 4, "bias": 1},
}


def names(gate: Gate) -> str:
    return f"{gate.score}-k{gate.topk}{'-normalized' if gate.normalized else ''}"


def random_vectors() -> Tensor:
    return torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("gate", GATES, ids=names)
def test_output_gradient_and_vectors_are_those_of_the_formula(
    new_layer: Any, gate: Gate, routing: dict[str, int]
) -> None:
    if "bias" in routing and gate.score == "softmax":
        pytest.skip("Megatron has the expert bias for sigmoid-type gates only")
    settings = gate.settings()
    if groups := routing.get("groups", 0):
        settings |= {"moe_router_num_groups": groups, "moe_router_group_topk": 1}
    layer = new_layer(moe_router_enable_expert_bias="bias" in routing, **settings)
    layer.router.default_vectors.copy_(random_vectors())
    layer.router.weight.data.mul_(30)  # far from the uniform scores of a new router
    bias_E = torch.zeros(EXPERTS)
    if "bias" in routing:
        bias_E = torch.linspace(-0.2, 0.2, EXPERTS)
        layer.router.expert_bias.copy_(bias_E)
    x = tokens(layer)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (y,) = train_step(layer, x, grad=grad)

    x_TD = x.reshape(-1, WIDTH).double()
    weight_ED = layer.router.weight.detach().double().requires_grad_()
    logits_TE = x_TD @ weight_ED.T
    probs_TE = gate.probs(logits_TE)
    ranking_TE = scores(gate.score, logits_TE.detach()) + bias_E.double()
    active_TE = chosen(ranking_TE, gate.topk, groups or 1)
    if "bias" in routing or (groups and gate.topk > 1):
        assert not torch.equal(active_TE, chosen(probs_TE.detach(), gate.topk)), "nothing to see"
    own_TED = expert_outputs(layer, x_TD).detach()
    values_TED = torch.where(active_TE.unsqueeze(-1), own_TED, random_vectors().double())
    output_TD = (probs_TE.unsqueeze(-1) * values_TED).sum(1)
    (output_TD * grad.reshape(-1, WIDTH)).sum().backward()
    close(y.reshape(-1, WIDTH), output_TD.detach())
    close(layer.router.weight.grad, weight_ED.grad)

    weight_TE = torch.where(active_TE, probs_TE.detach(), 0.0)
    sums_ED = torch.einsum("te,ted->ed", weight_TE, own_TED)
    expected_ED = naive.ema(random_vectors(), sums_ED, weight_TE.sum(0), BETA)
    close(layer.router.default_vectors, expected_ED)


@pytest.mark.parametrize("gate", NORMALIZED, ids=names)
@pytest.mark.parametrize("padded", [False, True], ids=["dropped", "padded"])
def test_the_normalised_gate_with_a_capacity_limit(
    new_layer: Any, gate: Gate, padded: bool
) -> None:
    layer = new_layer(
        **gate.settings(),
        moe_expert_capacity_factor=1.2 if padded else 0.6,
        moe_pad_expert_input_to_capacity=padded,
    )
    layer.router.default_vectors.copy_(random_vectors())
    routed, x = record_routing(layer), tokens(layer)
    y, _ = layer(x)
    ((logits_TE, probs_TE, map_TE),) = routed
    active_TE = map_TE & (probs_TE != 0)
    assert active_TE.sum() < map_TE.shape[0] * gate.topk, "nothing was dropped"
    assert (map_TE & (probs_TE == 0)).any() == padded
    dense_TE = gate.probs(logits_TE.double())
    close(probs_TE, dense_TE * active_TE)
    values_TED = expert_outputs(layer, x.reshape(-1, WIDTH)).detach()
    values_TED = torch.where(active_TE.unsqueeze(-1), values_TED, random_vectors().double())
    close(y.detach().reshape(-1, WIDTH), (dense_TE.unsqueeze(-1) * values_TED).sum(1))


@pytest.mark.parametrize("gate", NORMALIZED, ids=names)
def test_the_normalised_gate_without_default_vectors(new_layer: Any, gate: Gate) -> None:
    layer = new_layer(gradient="topk", **gate.settings())
    routed, x = record_routing(layer), tokens(layer)
    (y,) = train_step(layer, x)
    ((logits_TE, _, map_TE),) = routed
    weight_TE = gate.probs(logits_TE.double()) * map_TE
    own_TED = expert_outputs(layer, x.reshape(-1, WIDTH)).detach()
    close(y.reshape(-1, WIDTH), torch.einsum("te,ted->td", weight_TE, own_TED))


@pytest.mark.parametrize("gate", NORMALIZED, ids=names)
@pytest.mark.parametrize("gradient", ["topk", "default"])
def test_auxiliary_losses_reach_the_router_through_the_normalised_gate(
    new_layer: Any, gate: Gate, gradient: str
) -> None:
    """The gradient they add is the one they add to Megatron's own router."""
    losses = {
        "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [3.0, 2.0],
        "moe_z_loss_coeff": 1.0,
    }
    added = {}
    for kind in ("stock", "ours"):
        settings = gate.settings() | {"stock": kind == "stock", "gradient": gradient}
        grads = []
        for extra in ({}, losses):
            layer = new_layer(**settings | extra)
            layer(tokens(layer))[0].sum().backward()
            grads.append(layer.router.weight.grad)
        added[kind] = grads[1] - grads[0]
    assert added["stock"].abs().max() > 0
    close(added["ours"], added["stock"], 1e-4)


def test_the_metrics_see_the_normalised_gate(new_layer: Any) -> None:
    """The entropy is of the probabilities in use, whatever their sum."""
    gate = Gate("sigmoid", 2, True)
    layer = new_layer(**gate.settings())
    layer.router.collects_details = True
    routed = record_routing(layer)
    train_step(layer, tokens(layer))
    probs_TE = gate.probs(routed[0][0].double()) / SCALE
    entropy = torch.special.entr(probs_TE).sum(-1).mean()
    from megatron_default_moe.layers.layer_metrics import NAMES

    assert float(layer.router.step_metrics[NAMES.index("router entropy")]) == pytest.approx(
        float(entropy), rel=1e-5
    )


# The other options of Megatron's router: the formula holds for the logits and routing they make


def replay(layer: Any) -> None:
    """Send every token to experts 1 and 3, as a recorded routing would."""
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    indices = torch.tensor([[3, 1]]).expand(30, 2)
    layer.router.router_replay.set_target_indices(indices)
    layer.router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def jitter(layer: Any) -> None:
    """A jitter that is known: every third number of the router's input times 1.5."""
    factors = torch.ones(10, 3, WIDTH)
    factors.view(-1)[::3] = 1.5
    layer.router.input_jitter = lambda shape: factors.view(shape)


def tilt(layer: Any) -> None:
    layer.router.qb_beta.copy_(torch.linspace(-1.0, 1.0, 5))


OPTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "quantile balancing": ({"moe_router_load_balancing_type": "quantile_balancing"}, tilt),
    "router replay": ({"moe_enable_routing_replay": True}, replay),
    "input jitter": ({"moe_input_jitter_eps": 0.1}, jitter),
    "router in float64": ({"moe_router_dtype": "fp64"}, None),
    "shared experts": ({"moe_shared_expert_intermediate_size": 16}, None),
    "forced balance": ({"moe_router_force_load_balancing": True}, None),
    "forced bias": ({"moe_router_force_biased": 2.0}, None),
}


@pytest.mark.parametrize(("settings", "prepare"), OPTIONS.values(), ids=OPTIONS.keys())
def test_the_formula_holds_under(new_layer: Any, settings: dict[str, Any], prepare: Any) -> None:
    layer = new_layer(moe_aux_loss_coeff=0.0, **settings)
    vectors_ED = random_vectors()[:5]
    layer.router.default_vectors.copy_(vectors_ED)
    if prepare is not None:
        prepare(layer)
    # Quantile balancing wants T * K divisible by E.
    routed, x = record_routing(layer), tokens(layer, sequence=10)
    (y,) = train_step(layer, x)
    ((logits_TE, _, active_TE),) = routed
    x_TD = x.reshape(-1, WIDTH).double()
    plain_TE = x_TD @ layer.router.weight.detach().double().T
    probs_TE = torch.softmax(logits_TE.double(), dim=-1)
    differs = {"router in float64", "shared experts"}
    if settings not in [OPTIONS[name][0] for name in differs]:
        assert not torch.equal(active_TE, chosen(plain_TE, 2)), "the option changed nothing"
    assert (active_TE.sum(-1) == 2).all()
    own_TED = expert_outputs(layer, x_TD).detach()
    values_TED = torch.where(active_TE.unsqueeze(-1), own_TED, vectors_ED.double())
    output_TD = (probs_TE.unsqueeze(-1) * values_TED).sum(1)
    if layer.use_shared_expert:
        output_TD += layer.shared_experts(x).detach().reshape(-1, WIDTH).double()
    assert y.dtype == x.dtype
    close(y.reshape(-1, WIDTH), output_TD)
    sums_ED = torch.einsum("te,ted->ed", probs_TE * active_TE, own_TED)
    expected_ED = naive.ema(vectors_ED, sums_ED, (probs_TE * active_TE).sum(0), 0.99)
    close(layer.router.default_vectors, expected_ED)


def test_padding_tokens_are_routed_and_count(new_layer: Any) -> None:
    """Upstream's padding mask concerns the auxiliary losses only: experts see padding tokens."""
    layers, outputs = [new_layer(), new_layer()], []
    for layer, masked in zip(layers, (False, True), strict=True):
        x = tokens(layer)
        mask = torch.zeros(x.shape[1], x.shape[0], dtype=torch.bool)
        mask[:, -4:] = True
        y, _ = layer(x, padding_mask=mask if masked else None)
        y.sum().backward()
        outputs.append(y)
        train_step(layer)
    assert torch.equal(*outputs)
    assert torch.equal(*(layer.router.default_vectors for layer in layers))
    assert layers[0].router.default_vectors.any()


def test_a_latent_moe_keeps_vectors_of_the_latent_width(
    new_layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its projections are Transformer Engine's; here torch's stand in for those two linears."""
    from megatron.core.transformer.moe import moe_layer

    class Projection(torch.nn.Linear):
        def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
            super().__init__(inputs, outputs, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return super().forward(x), None

    monkeypatch.setattr(moe_layer, "HAVE_TE", True)
    monkeypatch.setattr(moe_layer, "TELinear", Projection)
    layer = new_layer(moe_latent_size=7, beta=BETA)
    vectors_ED = torch.randn(5, 7, generator=torch.Generator().manual_seed(4))
    assert layer.router.default_vectors.shape == vectors_ED.shape
    layer.router.default_vectors.copy_(vectors_ED)
    routed, x = record_routing(layer), tokens(layer)
    (y,) = train_step(layer, x)
    ((logits_TE, _, active_TE),) = routed
    assert logits_TE.shape[1] == 5
    down, up = layer.fc1_latent_proj.weight, layer.fc2_latent_proj.weight
    own_TED = expert_outputs(layer, x.reshape(-1, WIDTH).double() @ down.double().T).detach()
    probs_TE = torch.softmax(logits_TE.double(), dim=-1)
    values_TED = torch.where(active_TE.unsqueeze(-1), own_TED, vectors_ED.double())
    latent_TD = (probs_TE.unsqueeze(-1) * values_TED).sum(1)
    close(y.reshape(-1, WIDTH), latent_TD @ up.detach().double().T)
    sums_ED = torch.einsum("te,ted->ed", probs_TE * active_TE, own_TED)
    expected_ED = naive.ema(vectors_ED, sums_ED, (probs_TE * active_TE).sum(0), BETA)
    close(layer.router.default_vectors, expected_ED)
