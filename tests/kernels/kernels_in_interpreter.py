"""The Triton kernels against ``functional`` and the float64 loops of ``naive``.

Run by ``test_kernels.py`` in a process of its own, because Triton's interpreter is chosen when
Triton is imported: TRITON_INTERPRET=1 on a CPU; without it, compiled, on a CUDA device.

Contract: the same numbers as the references at odd sizes and in every dtype; memory that does not
count may hold anything; two runs give the same bits; gradients are autograd's; a whole layer gives
what the PyTorch layer gives, with two launches forward and one backward.

Tolerances as in ``test_functional.py``, relative in the norm; for the term in a 16-bit output
2^-8 (one rounding of the output), and 2^-7 of gradients in bf16 logits.
"""

import collections
import os
from typing import Any

import pytest
import torch
from building import build_layer, train_step
from layer_reference import tokens
from maths import normal, routing, same_bits, sorted_rows

from megatron_default_moe.estimators.fused_default import FusedDefaultMoERouter
from megatron_default_moe.kernels import sums, term
from megatron_default_moe.loop import model
from megatron_default_moe.maths import functional, naive

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16", "float16"])
weightings = pytest.mark.parametrize("weighting", ["router", "uniform"])
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="layers are built on the CPU here")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


# Sums, mass, load


def statistics(
    rows_RD: Any, counts_e: Any, probs_R: Any, probs_TE: Any, weighting: Any
) -> sums.StatisticsOut:
    num_local, width = counts_e.numel(), rows_RD.shape[1]
    num_experts = probs_TE.shape[1]
    shapes = [(num_local, width), (num_experts,), (num_experts,), (1,)]
    out = sums.StatisticsOut(*(torch.zeros(shape, device=DEVICE) for shape in shapes))
    tickets = torch.zeros(sums.num_tickets(num_local, width), dtype=torch.int32, device=DEVICE)
    arguments = [x.to(DEVICE) for x in (rows_RD, counts_e, probs_R, probs_TE)]
    sums.add_statistics(*arguments, weighting, tickets, out)
    assert not tickets.any()
    return out


COUNTS = {
    "7 experts": [20, 0, 1, 7, 0, 34, 1],
    "1 expert over several chunks": [301],
    "chunk borders": [128, 0, 128, 127, 2, 0],
    "large among small": [3, 290, 2, 0, 140, 1, 1, 130, 0],
    "no rows": [0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@weightings
@dtypes
def test_statistics(counts: list[int], weighting: Any, dtype: torch.dtype) -> None:
    rows_RD, counts_e, probs_R = sorted_rows(counts, 300, dtype)
    probs_TE, active_TE = routing(63, len(counts), 1, dtype)
    out = statistics(rows_RD, counts_e, probs_R, probs_TE * active_TE, weighting)
    # float32 sums of any rows; the bound of float32 for each of them.
    assert error(out.sums_eD, naive.expert_sums(rows_RD, counts_e, probs_R, weighting)) < 2e-6
    assert error(out.mass_E, naive.router_mass(probs_TE, active_TE, weighting)) < 2e-6
    assert torch.equal(out.load_E.cpu(), active_TE.sum(0).float())
    assert out.tokens.item() == 63
    assert not out.sums_eD.cpu()[counts_e == 0].any()


@weightings
def test_statistics_are_added_to_what_is_there(weighting: Any) -> None:
    """And into views of one buffer, from strided rows and a column of probabilities."""
    rows_RD, counts_e, probs_R = sorted_rows([130, 0, 31], 33, torch.float32)
    probs_TE, active_TE = routing(9, 3, 1, torch.float32)
    inputs = (probs_TE * active_TE, weighting)
    once = statistics(rows_RD, counts_e, probs_R, *inputs)
    wide_RD = torch.full((161, 50), float("nan"))
    wide_RD[:, :33] = rows_RD
    flat = torch.zeros(3 * 33 + 7, device=DEVICE)
    sums_eD, mass, load, count = flat.split([99, 3, 3, 1])
    out = sums.StatisticsOut(sums_eD.view(3, 33), mass, load, count)
    tickets = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    arguments = [x.to(DEVICE) for x in (counts_e, probs_R.unsqueeze(1), probs_TE * active_TE)]
    for _ in range(2):
        sums.add_statistics(wide_RD.to(DEVICE)[:, :33], *arguments, weighting, tickets, out)
    for twice, single in zip(out, once, strict=True):
        assert same_bits(twice.cpu(), 2 * single.cpu())


@weightings
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_does_not_count_may_hold_anything(weighting: Any, poison: float) -> None:
    """Rows beyond the counts, and rows of probability zero."""
    rows_RD, counts_e, probs_R = sorted_rows([20, 0, 200, 7], 33, torch.float32)
    padding = [0, 19, 20, 130, 226]
    probs_R[padding], rows_RD[padding] = 0.0, 0.0
    probs_TE, active_TE = routing(63, 4, 2, torch.float32)
    probs_TE = probs_TE * active_TE
    clean = statistics(rows_RD, counts_e, probs_R, probs_TE, weighting)
    rows_RD[padding] = poison
    rows_RD = torch.cat([rows_RD, torch.full((200, 33), poison)])
    probs_R = torch.cat([probs_R, torch.full((200,), 0.5)])
    poisoned = statistics(rows_RD, counts_e, probs_R, probs_TE, weighting)
    close = [error(a, b) < 1e-6 for a, b in zip(poisoned, clean, strict=True)]
    assert all(close)


def test_a_token_with_probability_zero_does_not_count() -> None:
    rows_RD, counts_e, probs_R = sorted_rows([3, 2], 4, torch.float32)
    probs_TE = torch.tensor([[0.5, 0.0], [0.0, 0.25]])
    out = statistics(rows_RD, counts_e, probs_R, probs_TE, "router")
    assert out.load_E.tolist() == [1, 1]
    assert out.mass_E.tolist() == [0.5, 0.25]


def test_no_tokens_and_no_rows_leave_everything_as_it_is() -> None:
    empty = torch.empty(0)
    out = statistics(
        empty.view(0, 5), torch.zeros(2, dtype=torch.int64), empty, empty.view(0, 2),
        "router",
    )  # fmt: skip
    assert not any(total.any() for total in out)


def test_statistics_repeat_to_the_bit() -> None:
    rows_RD, counts_e, probs_R = sorted_rows([3, 700, 2, 295], 300, torch.bfloat16)
    probs_TE, active_TE = routing(301, 4, 2, torch.float32)
    inputs = (rows_RD, counts_e, probs_R, probs_TE * active_TE, "router")
    for a, b in zip(statistics(*inputs), statistics(*inputs), strict=True):
        assert same_bits(a, b)


# The token side


TERM_SIZES = [(63, 7, 33, 2), (1, 9, 300, 1), (130, 1, 5, 1), (65, 70, 130, 4), (5, 3, 1, 3)]
term_sizes = pytest.mark.parametrize(
    "size", TERM_SIZES, ids=[f"T{t}-E{e}-D{d}-K{k}" for t, e, d, k in TERM_SIZES]
)


def term_inputs(size: tuple[int, int, int, int], dtype: torch.dtype, logits: torch.dtype) -> Any:
    num_tokens, num_experts, width, topk = size
    logits_TE = normal(num_tokens, num_experts, dtype=logits, seed=3)
    dense_TE = logits_TE.softmax(-1, dtype=torch.float32).to(logits)
    probs_TE = torch.zeros_like(dense_TE)
    chosen_TK = dense_TE.topk(topk).indices
    probs_TE.scatter_(1, chosen_TK, dense_TE.gather(1, chosen_TK))
    # A filler token of a padded expert is not active.
    probs_TE[0, -1] = 0
    vectors_ED = normal(num_experts, width, dtype=torch.float32, seed=4)
    output_TD = normal(num_tokens, width, dtype=dtype, seed=5)
    return [x.to(DEVICE) for x in (output_TD, logits_TE, probs_TE, vectors_ED)]


def in_pytorch(
    output_TD: Any, scores_TE: Any, probs_TE: Any, vectors_ED: Any, scale: Any
) -> torch.Tensor:
    if scale is not None:
        soft_TE = scores_TE.softmax(-1, dtype=torch.float32) * scale
        scores_TE = soft_TE.type_as(scores_TE)
    inactive_TE = functional.inactive_probs(scores_TE, probs_TE != 0)
    return functional.add_default_term(output_TD, inactive_TE, vectors_ED)


def both_ways(inputs: Any, scale: Any, in_forward: bool = True) -> Any:
    """(result, gradient of the output, gradient of the scores) of the kernels and of PyTorch."""
    output_TD, scores_TE, *constants = inputs
    upstream_TD = normal(*output_TD.shape, dtype=output_TD.dtype, seed=8).to(DEVICE)
    found = []
    for function in ("kernels", "pytorch"):
        y, x = output_TD.clone().requires_grad_(), scores_TE.clone().requires_grad_()
        if function == "kernels":
            result = term.add_default_term(
                y, x, *constants, softmax_scale=scale, in_forward=in_forward
            )
        else:
            # In float32: the kernels round once, the functions twice (the interpreter cuts off).
            result = in_pytorch(y.float(), x, *constants, scale)
        result.backward(upstream_TD.to(result.dtype))
        found.append((result.detach(), y.grad, x.grad))
    return found


@pytest.mark.parametrize("scale", [None, 1.0, 2.5], ids=["probs", "softmax", "scaled softmax"])
@term_sizes
@dtypes
def test_term_and_gradients(size: Any, dtype: torch.dtype, scale: Any) -> None:
    inputs = term_inputs(size, dtype, torch.float32)
    (result, output_grad, scores_grad), expected = both_ways(inputs, scale)
    assert result.dtype == dtype
    assert error(result, expected[0]) < TOLERANCE[dtype]
    assert same_bits(output_grad, expected[1])
    assert scores_grad.dtype == torch.float32
    # Without an inactive expert the gradient is zero to the bit; else relative in the norm.
    bound = 2e-6 if INTERPRETED or dtype == torch.float32 else 2.0**-14
    assert float((scores_grad - expected[2]).norm()) <= bound * float(expected[2].norm())


@pytest.mark.parametrize("logits", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_logits_of_every_dtype(logits: torch.dtype) -> None:
    """Megatron's router may compute in the model's dtype or in float64."""
    inputs = term_inputs((63, 7, 33, 2), torch.bfloat16, logits)
    ours, expected = both_ways(inputs, 1.0)
    assert ours[2].dtype == logits
    assert error(ours[0], expected[0]) < 2.0**-8
    assert error(ours[2], expected[2]) < (2.0**-7 if logits == torch.bfloat16 else 2.0**-14)


@term_sizes
def test_term_against_the_loops(size: Any) -> None:
    output_TD, logits_TE, probs_TE, vectors_ED = term_inputs(size, torch.float32, torch.float32)
    result = term.add_default_term(output_TD, logits_TE, probs_TE, vectors_ED, softmax_scale=1.0)
    active_TE = (probs_TE != 0).cpu()
    dense_TE = logits_TE.double().softmax(-1).cpu()
    term_TD = naive.default_term(dense_TE, active_TE, vectors_ED.cpu())
    assert error(result, output_TD.cpu().double() + term_TD) < 2e-6


@dtypes
def test_backward_only_returns_the_output_to_the_bit(dtype: torch.dtype) -> None:
    inputs = term_inputs((63, 7, 33, 2), dtype, torch.float32)
    inputs[0][0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    attached, added = both_ways(inputs, 1.0, in_forward=False), both_ways(inputs, 1.0)
    assert same_bits(attached[0][0], inputs[0])
    assert same_bits(attached[0][2], added[0][2])


def test_term_ignores_poison_at_active_experts_and_in_what_it_is_given_to_write() -> None:
    output_TD, _, probs_TE, vectors_ED = term_inputs((63, 7, 33, 2), torch.float32, torch.float32)
    dense_TE = normal(63, 7, dtype=torch.float32).to(DEVICE)
    active_TE = probs_TE != 0
    poisoned_TE = dense_TE.masked_fill(active_TE, float("nan"))
    clean, poisoned = (
        both_ways([output_TD, scores_TE, probs_TE, vectors_ED], None)[0]
        for scores_TE in (dense_TE, poisoned_TE)
    )
    for a, b in zip(clean, poisoned, strict=True):
        assert same_bits(a, b)
    assert not poisoned[2][active_TE].any()


def test_term_repeats_to_the_bit_and_gives_the_vectors_no_gradient() -> None:
    inputs = term_inputs((65, 70, 130, 4), torch.bfloat16, torch.float32)
    inputs[-1].requires_grad_()
    first, second = both_ways(inputs, 1.0)[0], both_ways(inputs, 1.0)[0]
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)
    result = term.add_default_term(*inputs, softmax_scale=1.0)
    assert not result.requires_grad


@pytest.mark.parametrize("in_forward", [True, False])
def test_no_tokens(in_forward: bool) -> None:
    inputs = term_inputs((63, 7, 33, 2), torch.float32, torch.float32)
    inputs = [x[:0] if x.shape[0] == 63 else x for x in inputs]
    inputs[1].requires_grad_()
    term.add_default_term(*inputs, softmax_scale=1.0, in_forward=in_forward).sum().backward()
    assert inputs[1].grad.shape == (0, 7)


@pytest.mark.parametrize("num_experts", [7, term.MAX_EXPERTS_FLOAT32 + 3])
def test_a_fraction_of_the_term_has_the_gradient_of_all_of_it(num_experts: int) -> None:
    inputs = term_inputs((33, num_experts, 20, 2), torch.float32, torch.float32)
    fraction = torch.tensor([0.25], device=inputs[0].device)
    inputs[1].requires_grad_()
    found = []
    for part in ({}, {"fraction": fraction}, {"in_forward": False}):
        result = term.add_default_term(*inputs, softmax_scale=1.0, **part)
        (grad_TE,) = torch.autograd.grad(result.sum(), inputs[1])
        found.append((result.detach(), grad_TE))
    (whole, full_TE), (part_TD, part_TE), (none, _) = found
    assert error(part_TD - none, 0.25 * (whole - none)) < 1e-5
    assert same_bits(part_TE, full_TE)


def test_more_experts_than_a_program_holds_take_the_functions() -> None:
    size = (9, term.MAX_EXPERTS_FLOAT32 + 3, 5, 2)
    ours, expected = both_ways(term_inputs(size, torch.float32, torch.float32), 1.5)
    for a, b in zip(ours, expected, strict=True):
        assert same_bits(a, b)


# A whole layer


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "top-1, allgather": {"moe_router_topk": 1, "moe_token_dispatcher_type": "allgather"},
    "uniform": {"weighting": "uniform"},
    "before-use": {"order": "before-use"},
    "backward only": {"in_forward": False},
    # Two steps of three: the evaluation at the end uses two thirds.
    "fade-in": {"fade_in": 3},
    "bias correction": {"bias_correction": True, "moe_router_topk_scaling_factor": 1.5},
    "capacity": {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"},
    "padded capacity": {
        "moe_expert_capacity_factor": 0.7,
        "moe_pad_expert_input_to_capacity": True,
    },
    "sigmoid": {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk": 1,
        "moe_router_pre_softmax": False,
    },
    "normalized sigmoid": {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "normalized_gate": True,
    },
}


@in_the_interpreter
@pytest.mark.parametrize(
    ("name", "details"),
    [
        *((name, False) for name in SETTINGS),
        *((name, True) for name in ("default", "fade-in", "normalized sigmoid")),
    ],
)
def test_layer_equals_the_pytorch_layer(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, name: str, details: bool
) -> None:
    """Outputs, gradients, committed vectors and metrics of two steps of two micro-batches."""
    found = []
    for fused in (False, True):
        if fused:
            monkeypatch.setattr(model, "router_class", lambda options: FusedDefaultMoERouter)
        layer = build_layer(beta=0.5, **SETTINGS[name])
        assert isinstance(layer.router, FusedDefaultMoERouter) == fused
        layer.router.collects_details = details
        outputs = train_step(layer, tokens(layer, 1), tokens(layer, 2))
        outputs += train_step(layer, tokens(layer, 3), tokens(layer, 4))
        outputs.append(layer.eval()(tokens(layer, 5))[0].detach())
        grads = [parameter.grad for parameter in layer.parameters()]
        router = layer.router
        state = [router.default_vectors, router.default_vector_updates, *outputs, *grads]
        found.append(state + ([router.step_metrics] if details else []))
        assert router.default_vectors.norm() > 0
        assert not router.local_sums.any()
    for pytorch, fused_one in zip(*found, strict=True):
        assert error(fused_one, pytorch) < 1e-5


@in_the_interpreter
@pytest.mark.parametrize("in_forward", [True, False])
def test_launches_of_a_layer(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, in_forward: bool
) -> None:
    """Two forward (one without the forward term) and one backward; none of rows in evaluation."""
    launched: collections.Counter[str] = collections.Counter()
    kernel_class = type(term.forward_kernel)
    run = kernel_class.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched[self.__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kernel_class, "run", counting)
    monkeypatch.setattr(model, "router_class", lambda options: FusedDefaultMoERouter)
    layer = build_layer(in_forward=in_forward)
    y, _ = layer(tokens(layer))
    forward = {"statistics_kernel": 1} | ({"forward_kernel": 1} if in_forward else {})
    assert launched == forward
    y.sum().backward()
    assert launched == {**forward, "backward_kernel": 1}
    launched.clear()
    with torch.no_grad():
        layer(tokens(layer))
    assert launched == ({"forward_kernel": 1} if in_forward else {})
