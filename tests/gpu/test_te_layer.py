"""One MoE layer with default vectors, against float64, on whatever this machine has.

Contract: output, committed vectors and router gradient are those of the formula within the
tolerances of ``implementations.py``; rows that pad an expert's batch (for FP8, for a capacity)
enter no sum, whatever they hold; constant experts make an exact dense mixture; a checkpoint brings
every bit of the vectors back; recomputation counts every token once.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from implementations import PARAMS, Implementation, build, skip_unless_available, step, tokens
from layer_reference import expert_outputs, reference
from torch import Tensor

from megatron_default_moe.maths import naive

Close = Callable[[Tensor, Tensor, float], None]
pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(params=PARAMS)
def one(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Implementation:
    record_property("implementation", request.param.name)
    skip_unless_available(request.param)
    return request.param


def expected_vectors(layer: Any, routed: list[Any], inputs: list[Tensor]) -> Tensor:
    """[E, D] float64: the weighted mean outputs, from the recorded routing and the weights."""
    sums_ED, mass_E = 0.0, 0.0
    for x, (probs_TE, map_TE) in zip(inputs, routed, strict=True):
        weight_TE = torch.where(map_TE, probs_TE, 0).detach().double().cpu()
        own_TED = expert_outputs(layer, x.reshape(-1, x.shape[-1])).detach()
        sums_ED = sums_ED + torch.einsum("te,ted->ed", weight_TE, own_TED)
        mass_E = mass_E + weight_TE.sum(0)
    return sums_ED / mass_E.unsqueeze(-1)


def record(layer: Any) -> list[Any]:
    """Collect copies of (probs, map) of every routing: upstream pads the map in place later."""
    routed: list[Any] = []
    layer.router.register_forward_hook(
        lambda *args: routed.append(tuple(tensor.detach().clone() for tensor in args[-1]))
    )
    return routed


@pytest.mark.parametrize("topk", [1, 2], ids="k{}".format)
def test_output_and_router_gradient_are_those_of_the_formula(
    one: Implementation, topk: int, close: Close
) -> None:
    layer = build(one, moe_router_topk=topk, beta=0.5)
    step(layer, tokens(one, 1))
    layer.zero_grad()
    x, vectors_ED = tokens(one, 2), layer.router.default_vectors.clone()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    (y,) = step(layer, x, grad=grad)
    expected = reference(layer, x, vectors_ED)
    assert vectors_ED.norm() > 0
    close(y.reshape(-1, y.shape[-1]), expected["output"], one.tolerance)
    logit_grad_TE = naive.router_logit_gradient(
        expected["probs"], expected["values"], grad.reshape(-1, grad.shape[-1]).double().cpu()
    )
    close(layer.router.weight.grad, logit_grad_TE.T @ expected["x"], one.gradient_tolerance)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "capacity": {"moe_expert_capacity_factor": 0.7},
    "capacity-padded": {
        "moe_expert_capacity_factor": 1.3,
        "moe_pad_expert_input_to_capacity": True,
    },
    "uniform": {"weighting": "uniform"},
}
"""What any implementation can be asked for."""

TE_OPTIONS: dict[str, dict[str, Any]] = {
    "permute-fusion": {"moe_permute_fusion": True},
    "router-fusion": {"moe_router_fusion": True},
    "permute-and-router-fusion": {"moe_permute_fusion": True, "moe_router_fusion": True},
    "capacity-padded-permute-fusion": {**OPTIONS["capacity-padded"], "moe_permute_fusion": True},
    "op-fuser": {"use_transformer_engine_op_fuser": True},
}
"""Transformer Engine's own."""


@pytest.mark.parametrize("name", [*OPTIONS, *TE_OPTIONS])
def test_committed_vectors_are_the_mean_outputs(
    one: Implementation, name: str, close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in TE_OPTIONS and not one.te:
        pytest.skip("an option of Transformer Engine")
    if name == "op-fuser" and one.fp8_recipe == "blockwise":
        pytest.skip("Transformer Engine's operation fuser knows no blockwise FP8")
    # Megatron takes the fuser for SwiGLU experts only with this; where the chip has no such kernel,
    # Transformer Engine runs the operations one by one.
    monkeypatch.setenv("NVTE_CUTEDSL_FUSED_GROUPED_MLP", "1")
    if name == "uniform" and one.fp8_recipe:
        pytest.skip("uniform weighting divides FP8 rows by their probability: warned of, not exact")
    settings = {**OPTIONS, **TE_OPTIONS}[name]
    layer = build(one, beta=0.0, **settings)
    routed = record(layer)
    inputs = [tokens(one, seed) for seed in (1, 2, 3)]
    step(layer, *inputs)
    if settings.get("weighting") == "uniform":
        routed = [((probs_TE != 0).double(), map_TE) for probs_TE, map_TE in routed]
    close(layer.router.default_vectors, expected_vectors(layer, routed, inputs), one.tolerance)


def build_with_router_padding(one: Implementation, **settings: Any) -> Any:
    """A layer whose dispatcher fills each expert up to FP8's multiple of rows."""
    padding = {
        "moe_router_padding_for_quantization": True,
        "fp8": "hybrid",
        "fp8_recipe": one.fp8_recipe or "delayed",
    }
    if one.te:
        return build(one, **settings, **padding)
    # Megatron takes these flags only with Transformer Engine; the padding itself needs none.
    layer = build(one, **settings)
    for part in (layer, layer.experts, layer.token_dispatcher):
        for flag, value in padding.items():
            setattr(part.config, flag, value)
    return layer


@pytest.mark.parametrize("weighting", ["router", "uniform"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "permute-fusion"])
def test_router_padding_enters_no_sum(
    one: Implementation, fused: bool, weighting: str, close: Close
) -> None:
    """Filler rows are real tokens with probability zero; here their outputs are made wild."""
    if fused and not one.te:
        pytest.skip("an option of Transformer Engine")
    if one.te and not one.fp8_recipe:
        pytest.skip("Megatron pads for FP8 only")
    if one.fp8_recipe and weighting == "uniform":
        pytest.skip("uniform weighting divides FP8 rows by their probability: warned of, not exact")
    layer = build_with_router_padding(one, beta=0.0, weighting=weighting, moe_permute_fusion=fused)
    routed = record(layer)
    fillers: list[int] = []

    def make_fillers_wild(module: Any, args: Any, output: Any) -> Any:
        rows, bias = output
        _, tokens_per_expert, probs = args
        assert (tokens_per_expert % 16 == 0).all()
        fillers.append(int((probs == 0).sum()))
        return torch.where(probs.reshape(-1, 1) == 0, 1e9, rows), bias

    layer.experts.register_forward_hook(make_fillers_wild)
    inputs = [tokens(one, seed, sequence=37) for seed in (1, 2)]
    step(layer, *inputs)
    assert min(fillers) > 0, "nothing was padded"
    if weighting == "uniform":
        routed = [((probs_TE != 0).double(), map_TE) for probs_TE, map_TE in routed]
    close(layer.router.default_vectors, expected_vectors(layer, routed, inputs), one.tolerance)


def make_constant(layer: Any) -> Tensor:
    """Let every expert return its output bias only; returns [E, D] float64."""
    fc2 = getattr(layer.experts, "linear_fc2", None)
    with torch.no_grad():
        if fc2 is None:
            for expert in layer.experts.local_experts:
                # See test_layer.py: the local linear's other branch, which autograd accepts.
                expert.linear_fc2.explicit_expert_comm = True
                expert.linear_fc2.weight.zero_()
                expert.linear_fc2.bias.normal_()
            biases = [expert.linear_fc2.bias for expert in layer.experts.local_experts]
        else:
            indices = range(layer.experts.num_local_experts)
            for i in indices:
                getattr(fc2, f"weight{i}").zero_()
                getattr(fc2, f"bias{i}").normal_()
            biases = [getattr(fc2, f"bias{i}") for i in indices]
    return torch.stack([bias.detach().double().cpu() for bias in biases])


def test_constant_experts_make_a_dense_mixture(one: Implementation, close: Close) -> None:
    layer = build(one, add_bias_linear=True, beta=0.0)
    constants_ED = make_constant(layer)
    step(layer, tokens(one, 1))
    assert (layer.router.default_vector_updates == 1).all(), "an expert got no token"
    # Zero products are exact in FP8 too: only the rounding of the rows is left.
    tolerance = 1e-5 if one.dtype == torch.float32 else 2e-2
    close(layer.router.default_vectors, constants_ED, tolerance)
    layer.zero_grad()
    x = tokens(one, 2)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    (y,) = step(layer, x, grad=grad)

    weight = layer.router.weight.detach().double().cpu().requires_grad_()
    bias = layer.router.bias.detach().double().cpu()
    x_TD = x.reshape(-1, x.shape[-1]).double().cpu()
    mixture_TD = torch.softmax(x_TD @ weight.T + bias, dim=-1) @ constants_ED
    (mixture_TD * grad.reshape(mixture_TD.shape).double().cpu()).sum().backward()
    close(y.reshape(mixture_TD.shape), mixture_TD.detach(), tolerance)
    close(layer.router.weight.grad, weight.grad, tolerance)


def test_a_checkpoint_brings_every_bit_back(
    one: Implementation, tmp_path: Any, close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The scales of delayed scaling are a pickle, which Transformer Engine 2.17 distrusts.
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    layer = build(one, beta=0.5)
    step(layer, tokens(one, 1), tokens(one, 2))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = build(one, seed=7, beta=0.5)
    assert not torch.equal(loaded.router.default_vectors, layer.router.default_vectors)
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=False))
    for name in ("default_vectors", "default_vector_updates"):
        before, after = getattr(layer.router, name), getattr(loaded.router, name)
        assert before.dtype == after.dtype
        assert torch.equal(before, after), name
    x = tokens(one, 3)
    # Delayed scaling's history is part of the checkpoint, so this holds there too.
    close(step(loaded, x)[0], step(layer, x)[0], 1e-6)


RECOMPUTED = {"moe": ["moe"], "moe_act": ["moe_act"]}


@pytest.mark.parametrize("order", ["after-use", "before-use"])
@pytest.mark.parametrize("module", RECOMPUTED)
def test_recomputation_counts_every_token_once(
    one: Implementation, module: str, order: str, close: Close
) -> None:
    if module == "moe_act" and not one.te:
        pytest.skip("an option of grouped experts")
    if module == "moe_act" and one.fp8_recipe == "delayed":
        pytest.skip("Megatron refuses this recomputation with delayed scaling")
    recompute = {"recompute_granularity": "selective", "recompute_modules": RECOMPUTED[module]}
    results = []
    for settings in ({}, recompute):
        layer = build(one, beta=0.5, order=order, **settings)
        step(layer, tokens(one, 1).requires_grad_())
        inputs = [tokens(one, seed).requires_grad_() for seed in (2, 3)]
        outputs = step(layer, *inputs)
        results.append([*outputs, layer.router.default_vectors, layer.router.weight.grad])
        assert (layer.router.default_vector_updates == 2).all()
    # Equal to the bit but under FP8, whose scales may see another history in the second pass.
    tolerance = one.tolerance if one.fp8_recipe else 0.0
    for plain, recomputed in zip(*results, strict=True):
        close(recomputed, plain, tolerance)


def test_shared_experts_beside_the_communication(one: Implementation, close: Close) -> None:
    """``--moe-shared-expert-overlap`` adds the shared expert before the default term."""
    if not one.te:
        pytest.skip("the overlap needs CUDA streams")
    results = []
    for overlap in (False, True):
        layer = build(
            one,
            beta=0.5,
            moe_shared_expert_intermediate_size=256,
            moe_shared_expert_overlap=overlap,
        )
        step(layer, tokens(one, 1))
        results.append([*step(layer, tokens(one, 2)), layer.router.default_vectors])
    for apart, overlapped in zip(*results, strict=True):
        close(overlapped, apart, 2e-2)
