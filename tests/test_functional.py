"""The maths of Default MoE, held against loops in float64.

Contract: every function of ``functional`` equals its loop in ``naive`` at odd sizes and in every
dtype a model may use, and its gradient equals autograd's; sums are taken in float32 at least;
memory that does not count may hold anything; a sum that is not finite touches nothing but the
expert it belongs to, whose vector stays; and what a formula promises (order of tokens, splitting
a batch, a mean, a convex combination) holds for any input that hypothesis finds.

Tolerances, as the norm of the error over the norm of the expected value: float64 1e-12, float32
1e-6 (design.md allows 1e-5 for a whole model), bfloat16 results 2^-8, one rounding to 8 bits.
"""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from megatron_default_moe import functional, naive

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
WEIGHTINGS = ["router", "uniform"]

dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16],
    ids=["float64", "float32", "bfloat16"],
)
weightings = pytest.mark.parametrize("weighting", WEIGHTINGS)
sizes = pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width", "topk"),
    [(63, 7, 33, 2), (63, 7, 33, 1), (1, 7, 33, 2), (63, 1, 33, 1), (5, 3, 1, 3)],
    ids=["T63-E7-D33-K2", "T63-E7-D33-K1", "T1-E7-D33-K2", "T63-E1-D33-K1", "T5-E3-D1-K3"],
)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    error = float((actual.double() - expected.double()).norm())
    bound = TOLERANCE[dtype] * float(expected.double().norm())
    assert error <= bound, f"error {error:.3e}, allowed {bound:.3e}"


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Unlike torch.equal, tells -0.0 from 0.0, and one NaN equals itself."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    return actual.dtype == expected.dtype and torch.equal(
        actual.contiguous().view(integers), expected.contiguous().view(integers)
    )


def routing(
    num_tokens: int, num_experts: int, topk: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """[T, E] probabilities of a softmax gate and the experts of each token."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    probs_TE = logits.softmax(-1).to(dtype)
    active_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    active_TE.scatter_(1, logits.topk(topk).indices, True)
    return probs_TE, active_TE


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def sorted_rows(
    counts: list[int], width: int, dtype: torch.dtype, seed: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert, their counts, and probabilities in (0.1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    probs_R = 0.1 + 0.9 * torch.rand(sum(counts), generator=generator, dtype=torch.float64)
    rows_RD = normal(sum(counts), width, dtype=dtype, seed=seed + 1)
    return rows_RD, torch.tensor(counts), probs_R.to(dtype)


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """The state's dtype beside activations of this dtype: float32 unless the test is in float64."""
    return torch.promote_types(dtype, torch.float32)


# The default term


@dtypes
@sizes
def test_default_term_is_the_sum_over_the_inactive_experts(
    num_tokens: int, num_experts: int, width: int, topk: int, dtype: torch.dtype
) -> None:
    probs_TE, active_TE = routing(num_tokens, num_experts, topk, dtype)
    vectors_ED = normal(num_experts, width, dtype=vector_dtype(dtype))
    term_TD = functional.default_term(probs_TE, active_TE, vectors_ED)
    assert term_TD.dtype == vectors_ED.dtype
    # The product is in the dtype of the vectors, so bfloat16 probabilities cost no precision.
    close(term_TD, naive.default_term(probs_TE, active_TE, vectors_ED), vectors_ED.dtype)


@dtypes
@sizes
def test_add_default_term_is_output_plus_term(
    num_tokens: int, num_experts: int, width: int, topk: int, dtype: torch.dtype
) -> None:
    probs_TE, active_TE = routing(num_tokens, num_experts, topk, dtype)
    vectors_ED = normal(num_experts, width, dtype=vector_dtype(dtype))
    output_TD = normal(num_tokens, width, dtype=dtype, seed=5)
    inactive_TE = functional.inactive_probs(probs_TE, active_TE)
    result_TD = functional.add_default_term(output_TD, inactive_TE, vectors_ED)
    expected_TD = output_TD.double() + naive.default_term(probs_TE, active_TE, vectors_ED)
    assert result_TD.dtype == dtype
    close(result_TD, expected_TD, dtype)


def test_add_default_term_multiplies_in_float32_and_casts_once() -> None:
    """256.5 is 256 in bfloat16: vectors that nearly cancel would cancel to nothing."""
    inactive_TE, vectors_ED = torch.tensor([[0.5, 0.5]]), torch.tensor([[256.5], [-256.0]])
    output_TD = torch.zeros(1, 1, dtype=torch.bfloat16)
    result_TD = functional.add_default_term(output_TD, inactive_TE, vectors_ED)
    assert result_TD.dtype == torch.bfloat16
    assert result_TD.item() == 0.25


@dtypes
def test_inactive_probs_are_zero_at_active_entries_only(dtype: torch.dtype) -> None:
    probs_TE, active_TE = routing(63, 7, 2, dtype)
    inactive_TE = functional.inactive_probs(probs_TE, active_TE)
    assert inactive_TE.dtype == vector_dtype(dtype)
    assert torch.equal(inactive_TE[~active_TE], probs_TE[~active_TE].to(inactive_TE.dtype))
    assert not inactive_TE[active_TE].any()


def test_default_term_ignores_poison_in_active_probabilities() -> None:
    probs_TE, active_TE = routing(63, 7, 2, torch.float32)
    vectors_ED = normal(7, 33, dtype=torch.float32)
    clean_TD = functional.default_term(probs_TE, active_TE, vectors_ED)
    for poison in (float("nan"), float("inf")):
        poisoned_TE = probs_TE.masked_fill(active_TE, poison).requires_grad_()
        term_TD = functional.default_term(poisoned_TE, active_TE, vectors_ED)
        term_TD.sum().backward()
        assert same_bits(term_TD.detach(), clean_TD)
        assert not poisoned_TE.grad[active_TE].any()


# Gradients


def gradient_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probs_TE, active_TE = routing(5, 7, 2, torch.float64)
    return probs_TE.requires_grad_(), active_TE, normal(7, 3), normal(5, 3, seed=6).requires_grad_()


def test_gradcheck_default_term() -> None:
    probs_TE, active_TE, vectors_ED, _ = gradient_inputs()
    assert torch.autograd.gradcheck(
        lambda probs: functional.default_term(probs, active_TE, vectors_ED), [probs_TE]
    )


@pytest.mark.parametrize("vectors", [torch.float64, torch.float32], ids=["addmm", "cast"])
def test_gradcheck_add_default_term(vectors: torch.dtype) -> None:
    """Both branches: equal dtypes, and vectors that are narrower than the output."""
    probs_TE, active_TE, vectors_ED, output_TD = gradient_inputs()

    def function(output: Tensor, probs: Tensor) -> Tensor:
        inactive_TE = functional.inactive_probs(probs, active_TE)
        return functional.add_default_term(output, inactive_TE, vectors_ED.to(vectors))

    # Differences of float32 products need wider steps and tolerances; the function is linear.
    steps = {} if vectors == torch.float64 else {"eps": 1e-2, "atol": 1e-4, "rtol": 1e-4}
    assert torch.autograd.gradcheck(function, [output_TD, probs_TE], **steps)


def test_gradcheck_attach_default_gradient() -> None:
    """Into the output, the function it computes; into the probabilities, the one it stands for.

    The forward does not depend on the probabilities, so their gradient is checked against
    ``y' - stopgrad(y')``, whose finite differences are those of y'.
    """
    probs_TE, active_TE, vectors_ED, output_TD = gradient_inputs()
    inactive_TE = functional.inactive_probs(probs_TE, active_TE)
    assert torch.autograd.gradcheck(
        lambda output: functional.attach_default_gradient(output, inactive_TE.detach(), vectors_ED),
        [output_TD],
    )

    class StandIn(torch.autograd.Function):
        """Forward of the default term, backward of attach_default_gradient."""

        @staticmethod
        def forward(ctx: Any, probs: Tensor) -> Tensor:
            ctx.save_for_backward(probs)
            return functional.default_term(probs, active_TE, vectors_ED)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            with torch.enable_grad():
                probs = ctx.saved_tensors[0].detach().requires_grad_()
                inactive = functional.inactive_probs(probs, active_TE)
                result = functional.attach_default_gradient(
                    torch.zeros_like(grads[0]), inactive, vectors_ED
                )
                return torch.autograd.grad(result, probs, grads[0])[0]

    assert torch.autograd.gradcheck(StandIn.apply, [probs_TE])


@dtypes
@sizes
def test_attached_gradient_equals_that_of_the_added_term(
    num_tokens: int, num_experts: int, width: int, topk: int, dtype: torch.dtype
) -> None:
    probs_TE, active_TE = routing(num_tokens, num_experts, topk, dtype)
    vectors_ED = normal(num_experts, width, dtype=vector_dtype(dtype))
    upstream_TD = normal(num_tokens, width, dtype=dtype, seed=8)
    grads = []
    for combine in (functional.add_default_term, functional.attach_default_gradient):
        output_TD = normal(num_tokens, width, dtype=dtype, seed=5).requires_grad_()
        probs = probs_TE.clone().requires_grad_()
        combine(output_TD, functional.inactive_probs(probs, active_TE), vectors_ED).backward(
            upstream_TD
        )
        grads.append((output_TD.grad, probs.grad))
    (added_TD, added_TE), (attached_TD, attached_TE) = grads
    assert added_TE.dtype == attached_TE.dtype == dtype
    assert torch.equal(attached_TD, added_TD)
    assert torch.equal(attached_TD, upstream_TD)
    close(attached_TE, added_TE, dtype)
    # And both equal the formula: <dy, Ê_i> for inactive experts, zero for the others.
    expected_TE = (upstream_TD.double() @ vectors_ED.double().T).masked_fill(active_TE, 0.0)
    close(added_TE, expected_TE, dtype)


@dtypes
def test_attach_default_gradient_returns_the_output_to_the_bit(dtype: torch.dtype) -> None:
    probs_TE, active_TE = routing(4, 7, 2, dtype)
    vectors_ED = normal(7, 3, dtype=vector_dtype(dtype))
    output_TD = normal(4, 3, dtype=dtype)
    # What adding a zero term would change or keep by luck: signed zero, NaN, infinity, subnormal.
    output_TD[0] = torch.tensor([-0.0, 0.0, float("nan")])
    output_TD[1] = torch.tensor([float("inf"), -float("inf"), torch.finfo(dtype).tiny / 2])
    output_TD.requires_grad_()
    inactive_TE = functional.inactive_probs(probs_TE.requires_grad_(), active_TE)
    result_TD = functional.attach_default_gradient(output_TD, inactive_TE, vectors_ED)
    assert result_TD.requires_grad
    assert same_bits(result_TD.detach(), output_TD.detach())


@pytest.mark.parametrize("name", ["default_term", "add_default_term", "attach_default_gradient"])
def test_default_vectors_receive_no_gradient(name: str) -> None:
    probs_TE, active_TE, vectors_ED, output_TD = gradient_inputs()
    vectors_ED.requires_grad_()
    if name == "default_term":
        result_TD = functional.default_term(probs_TE, active_TE, vectors_ED)
    else:
        inactive_TE = functional.inactive_probs(probs_TE, active_TE)
        result_TD = getattr(functional, name)(output_TD, inactive_TE, vectors_ED)
    result_TD.sum().backward()
    assert vectors_ED.grad is None
    assert probs_TE.grad is not None


@pytest.mark.parametrize("substitute", ["zero", "default-vector"])
@pytest.mark.parametrize("topk", [1, 2])
def test_router_logit_gradient_equals_autograd_through_softmax(substitute: str, topk: int) -> None:
    """TopK: v = 0 for inactive experts. Default: v = Ê."""
    num_tokens, num_experts, width = 9, 7, 5
    logits_TE = normal(num_tokens, num_experts, seed=20).requires_grad_()
    probs_TE = logits_TE.softmax(-1)
    active_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    active_TE.scatter_(1, probs_TE.topk(topk).indices, True)
    own_TED = normal(num_tokens, num_experts, width, seed=21)
    vectors_ED = normal(num_experts, width, seed=22)
    upstream_TD = normal(num_tokens, width, seed=23)

    output_TD = torch.einsum("te,ted->td", probs_TE * active_TE, own_TED)
    stand_in_ED = torch.zeros_like(vectors_ED)
    if substitute == "default-vector":
        inactive_TE = functional.inactive_probs(probs_TE, active_TE)
        output_TD = functional.add_default_term(output_TD, inactive_TE, vectors_ED)
        stand_in_ED = vectors_ED
    output_TD.backward(upstream_TD)

    values_TED = torch.where(active_TE.unsqueeze(-1), own_TED, stand_in_ED)
    expected_TE = naive.router_logit_gradient(probs_TE.detach(), values_TED, upstream_TD)
    close(logits_TE.grad, expected_TE, torch.float64)
    # Inactive logits receive a gradient in both cases: the softmax's second term.
    assert logits_TE.grad[~active_TE].abs().min() > 0


# Sums of the experts' rows


@pytest.mark.parametrize(
    "counts", [[20, 0, 1, 7, 0, 34, 1], [63], [0, 0, 5], [0, 0]], ids=["7", "1", "last", "none"]
)
@weightings
@dtypes
def test_expert_sums(counts: list[int], weighting: Any, dtype: torch.dtype) -> None:
    rows_RD, counts_e, probs_R = sorted_rows(counts, 33, dtype)
    sums_eD = functional.expert_sums(rows_RD, counts_e, probs_R, weighting)
    assert sums_eD.dtype == vector_dtype(dtype)
    expected_eD = naive.expert_sums(rows_RD, counts_e, probs_R, weighting)
    close(sums_eD, expected_eD, sums_eD.dtype)
    assert not sums_eD[counts_e == 0].any()


@weightings
def test_expert_sums_of_wide_probabilities_and_narrow_rows(weighting: Any) -> None:
    """Megatron's probabilities may be float32 beside bfloat16 rows, as a column or flat."""
    rows_RD, counts_e, _ = sorted_rows([20, 0, 43], 33, torch.bfloat16)
    _, _, probs_R = sorted_rows([20, 0, 43], 33, torch.float32)
    sums_eD = functional.expert_sums(rows_RD, counts_e, probs_R, weighting)
    close(sums_eD, naive.expert_sums(rows_RD, counts_e, probs_R, weighting), torch.float32)
    column = functional.expert_sums(rows_RD, counts_e, probs_R.unsqueeze(-1), weighting)
    assert same_bits(column, sums_eD)


@pytest.mark.parametrize("counts_on", ["host", "device"])
@pytest.mark.parametrize("count", [255, 4096])
def test_bfloat16_rows_are_summed_in_float32(counts_on: str, count: int) -> None:
    """In bfloat16, 1 + 2^-8 is 1 and 256 + 1 is 256: such a sum would stand still."""
    rows_RD = torch.full((count, 1), 2.0**-8, dtype=torch.bfloat16)
    rows_RD[0] = 1.0
    probs_R, counts_e = torch.ones(count, dtype=torch.bfloat16), torch.tensor([count])
    if counts_on == "host":
        sums_eD = functional.expert_sums(rows_RD, counts_e, probs_R, "router")
    else:
        sums_eD = functional._segment_sums_on_device(rows_RD, counts_e, torch.float32)
    assert sums_eD.dtype == torch.float32
    assert sums_eD.item() == 1.0 + (count - 1) * 2.0**-8


def test_expert_sums_carries_no_gradient() -> None:
    rows_RD, counts_e, probs_R = sorted_rows([3, 2], 4, torch.float32)
    for weighting in WEIGHTINGS:
        sums_eD = functional.expert_sums(
            rows_RD.requires_grad_(), counts_e, probs_R.requires_grad_(), weighting
        )
        assert not sums_eD.requires_grad


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@weightings
def test_rows_that_do_not_count_may_hold_anything(weighting: Any, poison: float) -> None:
    """Rows beyond the counts, whatever their probability, and rows with probability zero."""
    counts = [20, 0, 1, 7, 0, 34, 1]
    rows_RD, counts_e, probs_R = sorted_rows(counts, 33, torch.float32)
    padding = [0, 19, 20, 21, 62]
    probs_R[padding] = 0.0
    rows_RD[padding] = 0.0
    clean_eD = functional.expert_sums(rows_RD, counts_e, probs_R, weighting)
    assert clean_eD.isfinite().all()

    rows_RD[padding] = poison
    beyond_RD = torch.full((5, 33), poison)
    beyond_R = torch.tensor([0.0, 0.5, poison, 1.0, 0.0])
    rows_RD, probs_R = torch.cat([rows_RD, beyond_RD]), torch.cat([probs_R, beyond_R])
    poisoned_eD = functional.expert_sums(rows_RD, counts_e, probs_R, weighting)
    assert same_bits(poisoned_eD, clean_eD)
    on_device = functional._segment_sums_on_device(
        torch.where(probs_R.unsqueeze(-1) != 0, rows_RD, 0), counts_e, torch.float32
    )
    assert on_device.isfinite().all()


@dtypes
@pytest.mark.parametrize("beyond", [0, 9], ids=["exact", "rows-beyond-the-counts"])
def test_device_counts_give_the_sums_of_host_counts(dtype: torch.dtype, beyond: int) -> None:
    """The path for counts that only the device knows, run here on the CPU."""
    for counts in ([20, 0, 1, 7, 0, 34, 1], [63], [0, 0, 5], [5, 0, 0], [0, 0]):
        rows_RD, counts_e, probs_R = sorted_rows(counts, 33, dtype)
        host_eD = functional.expert_sums(rows_RD, counts_e, probs_R, "router")
        rows_RD = torch.cat([rows_RD, torch.full((beyond, 33), float("nan"), dtype=dtype)])
        device_eD = functional._segment_sums_on_device(rows_RD, counts_e, host_eD.dtype)
        assert device_eD.dtype == host_eD.dtype
        close(device_eD, host_eD, host_eD.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@weightings
@dtypes
def test_expert_sums_on_a_gpu(weighting: Any, dtype: torch.dtype) -> None:
    rows_RD, counts_e, probs_R = sorted_rows([20, 0, 1, 7, 0, 34, 1], 33, dtype)
    expected_eD = naive.expert_sums(rows_RD, counts_e, probs_R, weighting)
    rows_RD, probs_R = rows_RD.cuda(), probs_R.cuda()
    for counts in (counts_e, counts_e.cuda()):
        sums_eD = functional.expert_sums(rows_RD, counts, probs_R, weighting)
        close(sums_eD.cpu(), expected_eD, sums_eD.dtype)


# The mass: denominator of the mean


@weightings
@dtypes
@sizes
def test_router_mass(
    num_tokens: int, num_experts: int, width: int, topk: int, dtype: torch.dtype, weighting: Any
) -> None:
    probs_TE, active_TE = routing(num_tokens, num_experts, topk, dtype)
    mass_E = functional.router_mass(probs_TE.requires_grad_(), active_TE, weighting)
    assert mass_E.dtype == vector_dtype(dtype)
    assert not mass_E.requires_grad
    close(mass_E, naive.router_mass(probs_TE.detach(), active_TE, weighting), mass_E.dtype)


def test_bfloat16_probabilities_are_summed_in_float32() -> None:
    probs_TE = torch.full((4096, 1), 2.0**-8, dtype=torch.bfloat16)
    probs_TE[0] = 1.0
    active_TE = torch.ones(4096, 1, dtype=torch.bool)
    mass_E = functional.router_mass(probs_TE, active_TE, "router")
    assert mass_E.item() == 1.0 + 4095 * 2.0**-8
    assert functional.router_mass(probs_TE, active_TE, "uniform").item() == 4096


@weightings
def test_router_mass_ignores_poison_in_inactive_probabilities(weighting: Any) -> None:
    probs_TE, active_TE = routing(63, 7, 2, torch.float32)
    clean_E = functional.router_mass(probs_TE, active_TE, weighting)
    poisoned_TE = probs_TE.masked_fill(~active_TE, float("nan"))
    assert same_bits(functional.router_mass(poisoned_TE, active_TE, weighting), clean_E)


@weightings
@dtypes
def test_sums_over_mass_is_the_mean_expert_output(weighting: Any, dtype: torch.dtype) -> None:
    """Both sides together: experts return ``p E(x)``; S/N is the weighted mean of ``E(x)``."""
    probs_TE, active_TE = routing(63, 7, 2, dtype)
    own_TED = normal(63, 7, 33, seed=31)
    weights_TE = probs_TE.double() * active_TE if weighting == "router" else active_TE.double()
    expected_ED = torch.einsum("te,ted->ed", weights_TE, own_TED) / weights_TE.sum(0)[:, None]

    expert_R, token_R = active_TE.T.nonzero(as_tuple=True)
    probs_R = probs_TE[token_R, expert_R]
    rows_RD = (probs_R.unsqueeze(-1).double() * own_TED[token_R, expert_R]).to(dtype)
    sums_ED = functional.expert_sums(rows_RD, active_TE.sum(0), probs_R, weighting)
    mass_E = functional.router_mass(probs_TE, active_TE, weighting)
    means_ED = functional.ema(torch.zeros_like(sums_ED), sums_ED, mass_E, 0.0)
    # In bfloat16 the rows themselves are rounded once each.
    close(means_ED, expected_ED, dtype)


# The moving average


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_ema(dtype: torch.dtype, beta: float) -> None:
    vectors_ED, sums_ED = normal(7, 33, dtype=dtype), normal(7, 33, dtype=dtype, seed=2)
    mass_E = torch.tensor([3.0, 0.0, 1e-3, 40.0, 0.5, 1.0, 0.0], dtype=dtype)
    before_ED = vectors_ED.clone()
    after_ED = functional.ema(vectors_ED, sums_ED, mass_E, beta)
    close(after_ED, naive.ema(vectors_ED, sums_ED, mass_E, beta), dtype)
    assert same_bits(vectors_ED, before_ED)
    assert after_ED.data_ptr() != vectors_ED.data_ptr()


def test_beta_zero_gives_the_mean() -> None:
    sums_ED, mass_E = normal(7, 33, dtype=torch.float32), torch.arange(1.0, 8.0)
    after_ED = functional.ema(normal(7, 33, dtype=torch.float32, seed=4), sums_ED, mass_E, 0.0)
    assert torch.equal(after_ED, sums_ED / mass_E.unsqueeze(-1))


BAD_EXPERTS = {
    "no tokens": (0.0, [1.0, 2.0]),
    "no tokens, no sum": (0.0, [0.0, 0.0]),
    "NaN in the sum": (1.0, [float("nan"), 1.0]),
    "infinity in the sum": (1.0, [1.0, float("inf")]),
    "minus infinity in the sum": (1.0, [-float("inf"), 1.0]),
    "NaN mass": (float("nan"), [1.0, 1.0]),
    "infinite mass": (float("inf"), [1.0, 1.0]),
    "negative mass": (-1.0, [1.0, 1.0]),
    "quotient overflows": (1e-30, [1e20, 1.0]),
}


@pytest.mark.parametrize("situation", BAD_EXPERTS)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_an_expert_without_a_finite_mean_keeps_its_vector_to_the_bit(
    situation: str, beta: float
) -> None:
    mass, sums = BAD_EXPERTS[situation]
    # A signed zero and a subnormal would not survive arithmetic.
    vectors_ED = torch.tensor([[0.3, -0.7], [-0.0, 1e-42], [5.0, 6.0]])
    sums_ED = torch.tensor([[1.0, -2.0], sums, [3.0, 4.0]])
    mass_E = torch.tensor([2.0, mass, 0.5])
    after_ED = functional.ema(vectors_ED, sums_ED, mass_E, beta)
    assert same_bits(after_ED[1], vectors_ED[1])
    assert functional.accepted_experts(sums_ED, mass_E).tolist() == [True, False, True]
    good = [0, 2]
    alone_ED = functional.ema(vectors_ED[good], sums_ED[good], mass_E[good], beta)
    assert same_bits(after_ED[good], alone_ED)
    assert not torch.equal(alone_ED, vectors_ED[good])
    if situation != "quotient overflows":  # in float32; the loop divides in float64
        close(after_ED, naive.ema(vectors_ED, sums_ED, mass_E, beta), torch.float32)


def test_accepted_experts_equal_those_the_loop_updates() -> None:
    """A small mass with a small sum is a mean like any other."""
    sums_ED = torch.tensor([[1e-30, 0.0], [1.0, 1.0], [0.0, 0.0]])
    mass_E = torch.tensor([1e-30, 1.0, 2.0])
    assert functional.accepted_experts(sums_ED, mass_E).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("num_updates", [1, 2, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_bias_corrected_of_a_constant_mean_is_that_mean(
    dtype: torch.dtype, num_updates: int, beta: float
) -> None:
    """To the 1e-5 of design.md in float32, for every beta a user may choose."""
    mean_ED, mass_E = normal(3, 33, dtype=dtype), torch.tensor([1.0, 2.0, 0.5], dtype=dtype)
    vectors_ED = torch.zeros_like(mean_ED)
    for _ in range(num_updates):
        vectors_ED = functional.ema(vectors_ED, mean_ED * mass_E.unsqueeze(-1), mass_E, beta)
    updates_E = torch.full((3,), num_updates)
    corrected_ED = functional.bias_corrected(vectors_ED, updates_E, beta)
    error = float((corrected_ED - mean_ED).norm() / mean_ED.norm())
    assert corrected_ED.dtype == dtype
    assert error <= (1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.99])
def test_bias_corrected_leaves_an_expert_without_updates_as_it_is(beta: float) -> None:
    vectors_ED = torch.tensor([[-0.0, 3.0], [1.0, 2.0]])
    corrected_ED = functional.bias_corrected(vectors_ED, torch.tensor([0, 1]), beta)
    assert same_bits(corrected_ED[0], vectors_ED[0])
    close(corrected_ED[1], vectors_ED[1] / (1 - beta), torch.float32)


# Properties, for any input


PROPERTY = hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, database=None, print_blob=False
)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """A routed batch in float64, with experts without tokens and probabilities of zero."""
    num_tokens = draw(st.integers(1, 63))
    num_experts = draw(st.integers(1, 7))
    width = draw(st.integers(1, 33))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    # Top-1, with some experts out of reach.
    reachable = draw(st.integers(1, num_experts))
    expert_T = torch.randint(reachable, (num_tokens,), generator=generator)
    prob_T = torch.rand(num_tokens, generator=generator, dtype=torch.float64) + 0.01
    prob_T[torch.rand(num_tokens, generator=generator) < draw(st.sampled_from([0, 0.2, 1]))] = 0
    own_TD = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    return {
        "experts": num_experts,
        "expert": expert_T,
        "prob": prob_T,
        "rows": prob_T.unsqueeze(-1) * own_TD,
        "weighting": draw(st.sampled_from(WEIGHTINGS)),
        "generator": generator,
    }


def statistics(batch: dict[str, Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and mass of these tokens: sorted by expert as a dispatcher does, in the given order."""
    expert_T, prob_T = batch["expert"][tokens], batch["prob"][tokens]
    order = expert_T.argsort(stable=True)
    counts_E = torch.bincount(expert_T, minlength=batch["experts"])
    sums_ED = functional.expert_sums(
        batch["rows"][tokens][order], counts_E, prob_T[order], batch["weighting"]
    )
    chosen_TE = torch.nn.functional.one_hot(expert_T, batch["experts"]).bool()
    probs_TE = prob_T.unsqueeze(-1).expand(-1, batch["experts"])
    active_TE = chosen_TE & (probs_TE != 0)
    return sums_ED, functional.router_mass(probs_TE, active_TE, batch["weighting"])


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@PROPERTY
@hypothesis.given(batches())
def test_the_order_of_tokens_does_not_matter(batch: dict[str, Any]) -> None:
    num_tokens = len(batch["prob"])
    in_order = statistics(batch, torch.arange(num_tokens))
    shuffled = statistics(batch, torch.randperm(num_tokens, generator=batch["generator"]))
    near(shuffled[0], in_order[0])
    near(shuffled[1], in_order[1])


@PROPERTY
@hypothesis.given(batches(), st.integers(1, 5))
def test_pieces_of_a_batch_add_up(batch: dict[str, Any], num_pieces: int) -> None:
    tokens = torch.arange(len(batch["prob"]))
    whole = statistics(batch, tokens)
    pieces = [statistics(batch, piece) for piece in tokens.chunk(num_pieces)]
    near(sum(sums for sums, _ in pieces), whole[0])
    near(sum(mass for _, mass in pieces), whole[1])


@PROPERTY
@hypothesis.given(batches())
def test_sums_and_mass_equal_the_loop(batch: dict[str, Any]) -> None:
    sums_ED, mass_E = statistics(batch, torch.arange(len(batch["prob"])))
    for i in range(batch["experts"]):
        mine = (batch["expert"] == i) & (batch["prob"] != 0)
        rows, probs = batch["rows"][mine], batch["prob"][mine]
        if batch["weighting"] == "uniform":
            near(sums_ED[i], (rows / probs.unsqueeze(-1)).sum(0))
            assert mass_E[i] == mine.sum()
        else:
            near(sums_ED[i], rows.sum(0))
            near(mass_E[i], probs.sum())


@PROPERTY
@hypothesis.given(batches(), st.floats(0, 0.9999))
def test_experts_without_tokens_keep_their_vector(batch: dict[str, Any], beta: float) -> None:
    """Without tokens, or with tokens of probability zero only."""
    sums_ED, mass_E = statistics(batch, torch.arange(len(batch["prob"])))
    vectors_ED = torch.randn(sums_ED.shape, generator=batch["generator"], dtype=torch.float64)
    after_ED = functional.ema(vectors_ED, sums_ED, mass_E, beta)
    used = torch.zeros(batch["experts"], dtype=torch.bool)
    used[batch["expert"][batch["prob"] != 0]] = True
    assert same_bits(after_ED[~used], vectors_ED[~used])
    assert (after_ED[used] != vectors_ED[used]).any(-1).all()


@PROPERTY
@hypothesis.given(batches(), st.floats(0, 0.9999), st.sampled_from(["nan", "inf", "-inf"]))
def test_a_poisoned_expert_stays_and_touches_no_other(
    batch: dict[str, Any], beta: float, poison: str
) -> None:
    tokens = torch.arange(len(batch["prob"]))
    sums_ED, mass_E = statistics(batch, tokens)
    vectors_ED = torch.randn(sums_ED.shape, generator=batch["generator"], dtype=torch.float64)
    clean_ED = functional.ema(vectors_ED, sums_ED, mass_E, beta)
    # One token's output, with a probability that counts, is not finite.
    victim = int(batch["expert"][0])
    batch["prob"][0] = 0.5
    batch["rows"][0, -1] = float(poison)
    sums_ED, mass_E = statistics(batch, tokens)
    after_ED = functional.ema(vectors_ED, sums_ED, mass_E, beta)
    others = torch.arange(batch["experts"]) != victim
    assert same_bits(after_ED[victim], vectors_ED[victim])
    assert same_bits(after_ED[others], clean_ED[others])


finite = st.floats(-1e6, 1e6, width=32)


@PROPERTY
@hypothesis.given(finite, finite, st.floats(2.0**-10, 2.0**10, width=32), st.floats(0, 0.9999))
def test_ema_is_a_convex_combination(old: float, total: float, mass: float, beta: float) -> None:
    after = functional.ema(
        torch.tensor([[old]]), torch.tensor([[total]]), torch.tensor([mass]), beta
    ).item()
    mean = (torch.tensor(total) / torch.tensor(mass)).item()
    slack = 4 * torch.finfo(torch.float32).eps * max(abs(old), abs(mean))
    assert min(old, mean) - slack <= after <= max(old, mean) + slack
    assert after == pytest.approx(beta * old + (1 - beta) * mean, abs=slack)
