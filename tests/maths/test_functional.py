"""The default term and its gradients, held against loops in float64.

Contract: at odd sizes and in every dtype a model may use, the term equals its loop in ``naive`` and
its gradient equals autograd's; memory that does not count may hold anything; the logits' gradient
is the formula's, for TopK and for Default MoE.
"""

from typing import Any

import pytest
import torch
from maths import close, dtypes, normal, routing, same_bits, sizes, vector_dtype
from torch import Tensor

from megatron_default_moe.maths import functional, naive


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
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9])
def test_a_fade_in_scales_the_forward_and_not_the_gradient(steps: int, dtype: torch.dtype) -> None:
    probs_TE, active_TE = routing(6, 7, 2, dtype)
    vectors_ED = normal(7, 5, dtype=vector_dtype(dtype))
    output_TD, upstream_TD = normal(6, 5, dtype=dtype), normal(6, 5, dtype=dtype, seed=8)
    fraction = functional.fade_in_fraction(torch.tensor([steps]), 4)
    found = []
    for fade in (lambda inactive: functional.faded(inactive, fraction), lambda inactive: inactive):
        probs = probs_TE.clone().requires_grad_()
        inactive_TE = fade(functional.inactive_probs(probs, active_TE))
        result_TD = functional.add_default_term(output_TD, inactive_TE, vectors_ED)
        result_TD.backward(upstream_TD)
        found.append((result_TD.detach(), probs.grad))
    (faded_TD, faded_TE), (whole_TD, whole_TE) = found
    expected_TD = naive.fading_output(output_TD, probs_TE, active_TE, vectors_ED, steps, 4)
    close(faded_TD, expected_TD, dtype)
    assert same_bits(faded_TE, whole_TE)
    assert same_bits(faded_TD, whole_TD) == (steps >= 4)
    if not steps:
        assert torch.equal(faded_TD, output_TD)


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
