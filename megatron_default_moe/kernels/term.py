"""The token side of a layer, fused: softmax, inactive experts, default term, addition (Triton).

Legend: T tokens, E experts, D width of an expert's output. The same maths is in
``maths/functional.py``.

Forward, one launch: reads the routed output once and writes the sum once (``2 b T D`` bytes at b
bytes an element), with the probabilities made from the [T, E] logits on the way, so that they
never travel through memory. Backward, one launch: reads the incoming gradient once (``b T D``),
takes its products with the default vectors and goes back through the softmax in registers; the
gradient of the output is the incoming one, without a copy. The default vectors (``4 E D`` bytes)
stay in the L2 cache.

Numerics: everything is accumulated in float32 and rounded once, at the store. Products are taken
on tensor cores from operands split in parts: ``bf16x3`` (relative error about 2^-16) where the
output has 16 bits, ``tf32x3`` (about 2^-21) where it is float32. Block sizes follow from the
shapes alone, so the same step gives the same bits on every run and device of one kind; there is no
autotuning, which would not.
"""

# Triton's own values have no Python type, so its functions carry no annotations but constexpr.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_default_moe.maths import functional

MAX_EXPERTS = 512
"""Experts that fit into the shared memory of one program where the output has 16 bits."""
MAX_EXPERTS_FLOAT32 = 128
"""... and where it is float32, whose split operands are twice as large."""


@triton.jit
def _scores_tile(scores, offs_t, offs_e, T, E: tl.constexpr):
    """[BLOCK_T, BLOCK_E] float32 of the scores, zero outside."""
    inside = (offs_t < T)[:, None] & (offs_e < E)[None, :]
    offsets = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    return tl.load(scores + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _inactive_tile(probs, offs_t, offs_e, T, E: tl.constexpr):
    """[BLOCK_T, BLOCK_E] bool: the experts that the routing gave no probability."""
    inside = (offs_t < T)[:, None] & (offs_e < E)[None, :]
    offsets = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    return tl.load(probs + offsets, mask=inside, other=1.0) == 0


@triton.jit
def _softmax(x_TE, in_e):
    """Softmax of each row over the experts that exist."""
    x_TE = tl.where(in_e[None, :], x_TE, float("-inf"))
    p_TE = tl.exp(x_TE - tl.max(x_TE, axis=1)[:, None])
    return p_TE / tl.sum(p_TE, axis=1)[:, None]


@triton.jit
def forward_kernel(
    output, result, scores, probs, vectors, T, scale,
    D: tl.constexpr, E: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """``result = output + inactive probabilities @ default vectors``, in SPAN blocks of columns."""
    spans = tl.cdiv(D, SPAN * BLOCK_D)
    offs_t = (tl.program_id(0) // spans) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    in_t, in_e = (offs_t < T)[:, None], offs_e < E
    p_TE = _scores_tile(scores, offs_t, offs_e, T, E)
    if SOFTMAX:
        p_TE = _softmax(p_TE, in_e) * scale
        # As Megatron: back to the dtype of the logits.
        p_TE = p_TE.to(scores.dtype.element_ty).to(tl.float32)
    p_TE = tl.where(_inactive_tile(probs, offs_t, offs_e, T, E), p_TE, 0.0)
    first = (tl.program_id(0) % spans) * SPAN
    for block in range(SPAN):
        offs_d = (first + block) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = (offs_d < D)[None, :]
        offsets = offs_t.to(tl.int64)[:, None] * D + offs_d[None, :]
        y_TD = tl.load(output + offsets, mask=in_t & in_d, other=0.0).to(tl.float32)
        pointers = vectors + offs_e[:, None] * D + offs_d[None, :]
        v_ED = tl.load(pointers, mask=in_e[:, None] & in_d, other=0.0)
        y_TD += tl.dot(p_TE, v_ED, input_precision=PRECISION)
        tl.store(result + offsets, y_TD.to(result.dtype.element_ty), mask=in_t & in_d)


@triton.jit
def backward_kernel(
    grad, grad_scores, scores, probs, vectors, T, scale,
    D: tl.constexpr, E: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores, for one block of tokens and all experts."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    in_t, in_e = (offs_t < T)[:, None], offs_e < E
    g_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        in_d = (offs_d < D)[None, :]
        offsets = offs_t.to(tl.int64)[:, None] * D + offs_d[None, :]
        dy_TD = tl.load(grad + offsets, mask=in_t & in_d, other=0.0).to(tl.float32)
        pointers = vectors + offs_e[:, None] * D + offs_d[None, :]
        v_ED = tl.load(pointers, mask=in_e[:, None] & in_d, other=0.0)
        g_TE = tl.dot(dy_TD, tl.trans(v_ED), g_TE, input_precision=PRECISION)
    g_TE = tl.where(_inactive_tile(probs, offs_t, offs_e, T, E), g_TE, 0.0)
    if SOFTMAX:
        # Through the softmax: pi_j (g_j - sum_i pi_i g_i).
        p_TE = _softmax(_scores_tile(scores, offs_t, offs_e, T, E), in_e)
        g_TE = g_TE * scale
        g_TE = p_TE * (g_TE - tl.sum(p_TE * g_TE, axis=1)[:, None])
    offsets = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    stored_TE = g_TE.to(grad_scores.dtype.element_ty)
    tl.store(grad_scores + offsets, stored_TE, mask=in_t & in_e[None, :])


def _block(size: int, smallest: int, largest: int) -> int:
    """The power of two that holds ``size``, within bounds (a dot needs 16)."""
    return int(min(largest, max(smallest, triton.next_power_of_2(size))))


def forward_blocks(num_tokens: int, width: int, num_experts: int) -> dict[str, int]:
    """Block sizes of the forward launch, by shapes alone.

    A program makes its tokens' probabilities once. Up to 64 experts that is cheap, and one small
    tile of output each (56 KB in flight on a multiprocessor of an H100) hides the memory's latency
    best. Beyond, it keeps them in shared memory and walks along the columns, so that the [T, E]
    inputs are not read again for each block of columns.
    """
    block_e = _block(num_experts, 16, MAX_EXPERTS)
    # Wider tiles spill where the probabilities fill the registers.
    block_d = _block(width, 16, 64 if block_e <= 128 else 32)
    span = 1
    if block_e > 64:
        blocks_d = triton.cdiv(width, block_d)
        span = triton.cdiv(blocks_d, triton.cdiv(128, triton.cdiv(num_tokens, 64)))
    return {
        **{"BLOCK_T": 64, "BLOCK_D": block_d, "BLOCK_E": block_e, "SPAN": span},
        **{"num_warps": 4 if block_e <= 64 else 8, "num_stages": 2 if block_e <= 256 else 1},
    }


def backward_blocks(width: int, num_experts: int) -> dict[str, int]:
    """Block sizes of the backward launch, by shapes alone: all experts of a token together."""
    block_e = _block(num_experts, 16, MAX_EXPERTS)
    block_t, block_d, num_warps, num_stages = {
        **dict.fromkeys((16, 32), (64, 128, 4, 4)),
        64: (64, 64, 4, 4),
        128: (32, 64, 8, 3),
        256: (32, 32, 8, 3),
        512: (32, 32, 16, 2),
    }[block_e]
    return {
        **{"BLOCK_T": block_t, "BLOCK_D": _block(width, 16, block_d), "BLOCK_E": block_e},
        **{"num_warps": num_warps, "num_stages": num_stages},
    }


def _precision(dtype: torch.dtype) -> str:
    # The interpreter knows no split products; there the operands are multiplied as they are.
    if triton.knobs.runtime.interpret:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "bf16x3"


class _DefaultTerm(torch.autograd.Function):
    """``output + term`` (or the output itself) with the gradient of the term into the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        output_TD: Tensor,
        scores_TE: Tensor,
        probs_TE: Tensor,
        vectors_ED: Tensor,
        softmax_scale: float | None,
        in_forward: bool,
        fraction: Tensor | None,
    ) -> Tensor:
        """Return the sum; arguments as in :func:`add_default_term`, contiguous."""
        ctx.save_for_backward(scores_TE, probs_TE, vectors_ED)
        ctx.softmax_scale = softmax_scale
        if not in_forward:
            return output_TD.view_as(output_TD)
        (num_tokens, width), num_experts = output_TD.shape, scores_TE.shape[1]
        if fraction is not None:
            vectors_ED = vectors_ED * fraction  # The backward pass takes them whole.
        output_TD = output_TD.contiguous()
        result_TD = torch.empty_like(output_TD)
        if num_tokens:
            blocks = forward_blocks(num_tokens, width, num_experts)
            spans = triton.cdiv(width, blocks["SPAN"] * blocks["BLOCK_D"])
            forward_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]) * spans,)](
                output_TD, result_TD, scores_TE, probs_TE, vectors_ED,
                num_tokens, 1.0 if softmax_scale is None else softmax_scale, D=width, E=num_experts,
                SOFTMAX=softmax_scale is not None, PRECISION=_precision(output_TD.dtype), **blocks,
            )  # fmt: skip
        return result_TD

    @staticmethod
    def backward(ctx: Any, *grads_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient on to the output, and through the term into the scores."""
        (grad_TD,) = grads_TD
        grad_TE = None
        if ctx.needs_input_grad[1]:
            scores_TE, probs_TE, vectors_ED = ctx.saved_tensors
            grad_TE = scores_gradient(grad_TD, scores_TE, probs_TE, vectors_ED, ctx.softmax_scale)
        return grad_TD, grad_TE, None, None, None, None, None


def scores_gradient(
    grad_TD: Tensor,
    scores_TE: Tensor,
    probs_TE: Tensor,
    vectors_ED: Tensor,
    softmax_scale: float | None,
) -> Tensor:
    """Gradient of the scores [T, E]; arguments as in :func:`add_default_term`, contiguous."""
    (num_tokens, width), num_experts = grad_TD.shape, scores_TE.shape[1]
    grad_TE = torch.empty_like(scores_TE)
    if num_tokens:
        blocks = backward_blocks(width, num_experts)
        backward_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]),)](
            grad_TD.contiguous(), grad_TE, scores_TE, probs_TE, vectors_ED,
            num_tokens, 1.0 if softmax_scale is None else softmax_scale, D=width, E=num_experts,
            SOFTMAX=softmax_scale is not None, PRECISION=_precision(grad_TD.dtype), **blocks,
        )  # fmt: skip
    return grad_TE


def add_default_term(
    output_TD: Tensor,
    scores_TE: Tensor,
    probs_TE: Tensor,
    vectors_ED: Tensor,
    *,
    softmax_scale: float | None,
    in_forward: bool = True,
    fraction: Tensor | None = None,
) -> Tensor:
    """Return ``output + sum over inactive i of pi_ti Ê_i``, with the gradient into the scores.

    Equals ``functional.add_default_term`` of ``functional.inactive_probs`` (which rounds the term
    to the output's dtype before adding; here the sum is rounded once), or with ``in_forward``
    off ``functional.attach_default_gradient``; more experts than fit into a program go there.

    Args:
        output_TD: [T, D] the routed experts' combined output: bf16, fp16 or fp32.
        scores_TE: [T, E] the router's logits or, without ``softmax_scale``, the probabilities of
            all experts, any float dtype; the result is differentiable in them.
        probs_TE: [T, E] the probabilities of the routing, a constant here: zero at the experts that
            a token does not use.
        vectors_ED: [E, D] float32 default vectors, a constant.
        softmax_scale: the scores are logits, ``pi = softmax(logits) * softmax_scale`` in the
            logits' dtype; None: the scores are pi.
        in_forward: off returns the output to the bit, with the same gradient.
        fraction: [1] float32, how much of the term is added (``functional.faded``); the gradient
            is that of all of it. None: all.

    Returns:
        [T, D] in the dtype of the output.
    """
    largest = MAX_EXPERTS_FLOAT32 if output_TD.dtype == torch.float32 else MAX_EXPERTS
    if scores_TE.shape[1] > largest:
        if softmax_scale is not None:
            soft_TE = torch.softmax(scores_TE, dim=-1, dtype=torch.float32) * softmax_scale
            scores_TE = soft_TE.type_as(scores_TE)
        inactive_TE = functional.inactive_probs(scores_TE, probs_TE.detach() != 0)
        if fraction is not None:
            inactive_TE = functional.faded(inactive_TE, fraction)
        if in_forward:
            return functional.add_default_term(output_TD, inactive_TE, vectors_ED)
        return functional.attach_default_gradient(output_TD, inactive_TE, vectors_ED)
    return _DefaultTerm.apply(
        output_TD,
        scores_TE.contiguous(),
        probs_TE.detach().contiguous(),
        vectors_ED.detach().contiguous(),
        softmax_scale,
        in_forward,
        fraction,
    )
