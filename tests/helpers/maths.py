"""What the tests of the maths share: sizes, dtypes, tolerances, routed batches.

Tolerances, as the norm of the error over the norm of the expected value: float64 1e-12, float32
1e-6 (a whole model is allowed 1e-5), bfloat16 results 2^-8, one rounding to 8 bits.
"""

import pytest
import torch
from torch import Tensor

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
