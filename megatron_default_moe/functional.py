"""The maths, under its public name; see :mod:`megatron_default_moe.maths.functional`."""

from megatron_default_moe.maths.functional import (
    add_default_term,
    attach_default_gradient,
    bias_corrected,
    default_term,
    ema,
    expert_sums,
    router_mass,
)

__all__ = [
    "add_default_term",
    "attach_default_gradient",
    "bias_corrected",
    "default_term",
    "ema",
    "expert_sums",
    "router_mass",
]
