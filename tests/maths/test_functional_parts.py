"""Products of bfloat16 parts, which only devices make: their numbers, with a stand-in for one call.

Contract: the term of a bfloat16 output is rounded once; the gradient into the probabilities and the
uniformly weighted sums are those of float32, although no operand is copied in float32. The only
thing replaced is ``torch.mm(..., out_dtype=float32)``, which the CPU does not have.
"""

from typing import Any

import pytest
import torch
from maths import normal, routing, sorted_rows
from torch import Tensor

from megatron_default_moe.maths import functional, naive


@pytest.fixture
def device_paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take the paths of a device; the list says which products were made there."""
    seen: list[str] = []
    stock = torch.mm

    def mm(left: Tensor, right: Tensor, *, out_dtype: Any = None) -> Tensor:
        if out_dtype is None:
            return stock(left, right)
        seen.append(f"{left.dtype} {right.dtype}")
        return stock(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(functional, "_multiplies_parts", lambda x: x.dtype == torch.bfloat16)
    return seen


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_the_term_of_a_bf16_output_is_rounded_once() -> None:
    probs_TE, active_TE = routing(251, 9, 2, torch.float32)
    vectors_ED, output_TD = 4 * normal(9, 65, dtype=torch.float32), normal(251, 65, seed=5)
    output_TD = output_TD.bfloat16()
    inactive_TE = functional.inactive_probs(probs_TE, active_TE)
    result_TD = functional.add_default_term(output_TD, inactive_TE, vectors_ED)
    exact_TD = output_TD.double() + naive.default_term(probs_TE, active_TE, vectors_ED)
    twice_TD = output_TD + (inactive_TE @ vectors_ED).bfloat16()
    assert result_TD.dtype == torch.bfloat16
    rounding = relative(exact_TD.bfloat16(), exact_TD)
    assert relative(result_TD, exact_TD) < 1.02 * rounding
    assert relative(twice_TD, exact_TD) > 1.1 * rounding, "this test could not fail"


@pytest.mark.parametrize("in_forward", [True, False])
def test_gradient_into_the_probabilities(device_paths: list[str], in_forward: bool) -> None:
    probs_TE, active_TE = routing(63, 7, 2, torch.float32)
    vectors_ED, grad_TD = normal(7, 33, dtype=torch.float32), normal(63, 33, seed=6).bfloat16()
    probs_TE.requires_grad_()
    output_TD = torch.zeros(63, 33, dtype=torch.bfloat16, requires_grad=True)
    add = functional.add_default_term if in_forward else functional.attach_default_gradient
    add(output_TD, functional.inactive_probs(probs_TE, active_TE), vectors_ED).backward(grad_TD)
    expected_TE = (grad_TD.double() @ vectors_ED.double().T).masked_fill(active_TE, 0)
    assert device_paths == ["torch.bfloat16 torch.bfloat16"]
    assert relative(probs_TE.grad, expected_TE) < 4e-6
    assert torch.equal(output_TD.grad, grad_TD)


def test_uniformly_weighted_sums(device_paths: list[str]) -> None:
    rows_RD, counts_e, probs_R = sorted_rows([20, 0, 1, 7, 0, 34, 1], 33, torch.bfloat16)
    probs_R[3] = 0
    for padded in (True, False):
        sums_eD = functional.expert_sums(rows_RD, counts_e, probs_R, "uniform", padded=padded)
        expected_eD = naive.expert_sums(rows_RD, counts_e, probs_R, "uniform")
        assert relative(sums_eD, expected_eD) < 1e-6
    assert len(device_paths) == 14
