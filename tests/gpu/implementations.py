"""What the tests of this folder run on: Megatron's local experts on the CPU, and the GPU's ways.

The same test body runs on all of them. The CPU rows always run, so that the test's own logic is
known to work; the others are skipped with a reason where there is no CUDA device, no Transformer
Engine, or no support for the format in the chip.
"""

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from building import build_layer

from megatron_default_moe import RouterGradientConfig, commit, reduce_step_sums
from megatron_default_moe.estimators import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """A device, its experts, and how near they must come to float64."""

    name: str
    te: bool = False
    dtype: torch.dtype = torch.bfloat16
    fp8_recipe: str | None = None
    kernels: bool = False
    """This package's Triton kernels."""
    tolerance: float
    """Relative error (in the Euclidean norm) of outputs and committed vectors."""
    gradient_tolerance: float
    """The same of the router's gradient."""

    @property
    def device(self) -> str:
        """Where the layer lives."""
        return "cuda" if self.te else "cpu"


# bfloat16 rounds to 2^-9 of a value; activations pass five roundings, so 2 % is generous.
# FP8 E4M3 rounds to 2^-4 at worst and about 2.6 % in the mean square, once for each operand of two
# products; E5M2, of which hybrid's backward is made, to twice that. Blocks of their own scales
# (blockwise, mxfp8) lose less to the range. Chosen from the formats, not measured.
FP8_TOLERANCE = {"delayed": 0.15, "tensorwise": 0.12, "blockwise": 0.1, "mxfp8": 0.1}


def _bf16(**kind: Any) -> Implementation:
    return Implementation(**kind, tolerance=2e-2, gradient_tolerance=2e-2)


def _fp8(name: str, recipe: str, kernels: bool = False) -> Implementation:
    tolerance = FP8_TOLERANCE[recipe]
    return Implementation(
        name=name,
        te=True,
        fp8_recipe=recipe,
        kernels=kernels,
        tolerance=tolerance,
        gradient_tolerance=2 * tolerance,
    )


IMPLEMENTATIONS = (
    Implementation(
        name="cpu-local-fp32", dtype=torch.float32, tolerance=1e-5, gradient_tolerance=1e-5
    ),
    _bf16(name="cpu-local-bf16"),
    _bf16(name="cuda-te-bf16", te=True),
    # The kernels round once where PyTorch's operators round twice: the same tolerances.
    _bf16(name="cuda-te-bf16-kernels", te=True, kernels=True),
    *(_fp8(f"cuda-te-fp8-{recipe}", recipe) for recipe in FP8_TOLERANCE),
    _fp8("cuda-te-fp8-delayed-kernels", "delayed", kernels=True),
)

PARAMS = [
    pytest.param(one, id=one.name, marks=[pytest.mark.gpu] if one.te else [])
    for one in IMPLEMENTATIONS
]
"""For ``pytest.mark.parametrize``."""


def skip_unless_available(one: Implementation) -> None:
    """Skip, with the reason, what this machine cannot run (the GPU itself is the marker's part)."""
    if not one.te:
        return
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    if one.kernels:
        skip_without_kernels()
    if one.fp8_recipe is None:
        return
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as Formats

    available, reason = {
        "mxfp8": Formats.is_mxfp8_available,
        "blockwise": Formats.is_fp8_block_scaling_available,
    }.get(one.fp8_recipe, Formats.is_fp8_available)()
    if not available:
        pytest.skip(f"this device has no FP8 of recipe {one.fp8_recipe}: {reason}")


def skip_without_kernels() -> None:
    """Skip where ``--default-vector-kernels`` would change nothing."""
    if not registry.uses_kernels(RouterGradientConfig(kernels=True)):
        pytest.skip("the kernels need compute capability 9 or 10, and Triton")


def build(one: Implementation, **settings: Any) -> Any:
    """A layer of this implementation, of sizes that every FP8 recipe takes."""
    quantised = {"fp8": "hybrid", "fp8_recipe": one.fp8_recipe} if one.fp8_recipe else {}
    layer = build_layer(
        te=one.te,
        **{
            "hidden_size": 128,
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 256,
            "moe_grouped_gemm": one.te,
            "moe_router_dtype": "fp32",
            "use_cpu_initialization": not one.te,
            "params_dtype": one.dtype,
            "bf16": one.dtype == torch.bfloat16,
            # Large enough that a wrong vector shows in the output.
            "init_method_std": 0.1,
            "kernels": one.kernels,
            **quantised,
            **settings,
        },
    )
    assert type(layer.router).__name__.startswith("Fused") == one.kernels
    return layer.to(device=one.device, dtype=one.dtype)


def tokens(one: Implementation, seed: int, sequence: int = 96) -> torch.Tensor:
    """[sequence, 3, hidden] inputs, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequence, 3, 128, generator=generator)
    return x.to(device=one.device, dtype=one.dtype)


def quantisation(layer: Any) -> contextlib.AbstractContextManager[Any]:
    """What Megatron's transformer block runs its layers in."""
    from megatron.core.fp8_utils import get_fp8_context

    return get_fp8_context(layer.config)


def step(layer: Any, *inputs: torch.Tensor, grad: torch.Tensor | None = None) -> list[torch.Tensor]:
    """One optimizer step's worth of micro-batches, without the optimizer; returns the outputs."""
    outputs = []
    for x in inputs:
        with quantisation(layer):
            y, _ = layer(x)
        (y * (torch.ones_like(y) if grad is None else grad.to(y))).sum().backward()
        outputs.append(y.detach())
    reduce_step_sums(layer)
    commit(layer, taken=True)
    return outputs
