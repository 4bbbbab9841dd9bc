"""PyTorch or Triton: the one place that decides which router a layer with default vectors gets."""

import importlib.util

import torch

from megatron_default_moe.layers.default_router import DefaultMoERouter
from megatron_default_moe.options.config import RouterGradientConfig

CAPABILITIES = (9, 10)
"""Major compute capabilities that the kernels are compiled for in the tests (H100, H200, B200)."""


def uses_kernels(options: RouterGradientConfig) -> bool:
    """Whether models built now take the fused kernels: wanted, and Triton and a device are there.

    ``--default-vector-kernels`` asks for them.
    """
    return (
        options.kernels
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] in CAPABILITIES
        and importlib.util.find_spec("triton") is not None
    )


def default_moe_router(options: RouterGradientConfig) -> type[DefaultMoERouter]:
    """Return the router class for a layer spec."""
    if not uses_kernels(options):
        return DefaultMoERouter
    # Imported here, because it imports Triton.
    from megatron_default_moe.layers.fused_default_router import FusedDefaultMoERouter

    return FusedDefaultMoERouter
