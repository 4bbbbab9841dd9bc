"""Sums, mass and the moving average, held against loops in float64.

Contract: at odd sizes and in every dtype a model may use, each equals its loop in ``naive``; sums
are taken in float32 at least; rows that do not count may hold anything; a sum that is not finite
touches nothing but the expert it belongs to, whose vector stays.
"""

from typing import Any

import pytest
import torch
from maths import (
    WEIGHTINGS,
    close,
    dtypes,
    normal,
    routing,
    same_bits,
    sizes,
    sorted_rows,
    vector_dtype,
    weightings,
)

from megatron_default_moe.maths import functional, naive


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
    used_TE = torch.where(active_TE, probs_TE, 0).requires_grad_()
    mass_E = functional.router_mass(used_TE, weighting)
    assert mass_E.dtype == vector_dtype(dtype)
    assert not mass_E.requires_grad
    close(mass_E, naive.router_mass(probs_TE.detach(), active_TE, weighting), mass_E.dtype)


def test_bfloat16_probabilities_are_summed_in_float32() -> None:
    probs_TE = torch.full((4096, 1), 2.0**-8, dtype=torch.bfloat16)
    probs_TE[0] = 1.0
    mass_E = functional.router_mass(probs_TE, "router")
    assert mass_E.item() == 1.0 + 4095 * 2.0**-8
    assert functional.router_mass(probs_TE, "uniform").item() == 4096


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
    mass_E = functional.router_mass(probs_TE * active_TE, weighting)
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
    assert functional.mean_outputs(sums_ED, mass_E)[1].tolist() == [True, False, True]
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
    assert functional.mean_outputs(sums_ED, mass_E)[1].all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("num_updates", [1, 2, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_bias_corrected_of_a_constant_mean_is_that_mean(
    dtype: torch.dtype, num_updates: int, beta: float
) -> None:
    """To 1e-5 in float32, for every beta a user may choose."""
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
