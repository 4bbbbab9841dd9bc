"""Which router class a layer gets: the one place that knows the estimators by name."""

import importlib
import importlib.util

import torch

from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.options.config import RouterGradientConfig

CAPABILITIES = (9, 10)
"""Major compute capabilities that the kernels are compiled for in the tests (H100, H200, B200)."""

_ROUTERS = {
    "topk": "layers.observed_router:ObservedTopKRouter",
    "default": "estimators.default:DefaultMoERouter",
    "default-linear": "estimators.default_linear:DefaultLinearRouter",
    "dense": "estimators.dense:DenseRouter",
    "sparsemixer": "estimators.sparsemixer:SparseMixerRouter",
    "sparsemixer-v2": "estimators.sparsemixer:SparseMixerV2Router",
    "expert-group": "estimators.expert_group:ExpertGroupRouter",
    "remoe": "estimators.remoe:ReMoERouter",
}
# Named, and imported when asked for, because it imports Triton.
_FUSED_DEFAULT = "estimators.fused_default:FusedDefaultMoERouter"


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


def router_class(options: RouterGradientConfig) -> type[ObservedTopKRouter]:
    """Return the router class for a layer spec."""
    place = _ROUTERS[options.gradient]
    if options.gradient == "default" and uses_kernels(options):
        place = _FUSED_DEFAULT
    module, name = place.split(":")
    # Relative, so that no string of the table names the package twice.
    found: type[ObservedTopKRouter] = getattr(
        importlib.import_module(f"..{module}", __package__), name
    )
    return found
