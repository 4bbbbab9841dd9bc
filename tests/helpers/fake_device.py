"""One optimizer step of every kind of router on a CUDA device that does not exist.

Fake tensors have a device and no values: reading one on the host raises, and so does mixing
devices. Runs in a process of its own, without the CPU runtime, which would move everything to the
CPU. Only Megatron's two questions to the device are answered here. The backward pass is not run:
autograd wants a real device.
"""

import pytest
import torch
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
)

from megatron_default_moe.cpu import stand_ins

DEVICE = "cuda:0"
CASES = (
    {},
    {"order": "before-use", "beta": 0.5},
    {"weighting": "uniform", "bias_correction": True},
    {"in_forward": False, "init": "gaussian"},
    {"normalized_gate": True, "moe_router_score_function": "sigmoid"},
    {"moe_expert_capacity_factor": 1.0},
    {"gradient": "topk"},
)


def layer_on_device(settings: dict) -> torch.nn.Module:
    import building

    building.model_parallel_cuda_manual_seed = lambda *args, **kwargs: None
    layer = building.build_layer(perform_initialization=False, **settings)
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                module._parameters[name] = torch.nn.Parameter(moved)
    return layer


@pytest.mark.parametrize("details", [False, True], ids=["plain", "logged"])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_a_step_reads_nothing_on_the_host(
    monkeypatch: pytest.MonkeyPatch, settings: dict, details: bool
) -> None:
    from megatron_default_moe.layers import optimizer_step

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", stand_ins.Stream)
    # The one call that needs values: gloo has no fake ranks.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        with FakeTensorMode():
            layer = layer_on_device(settings)
            router = layer.router
            router.collects_details = details
            for _ in range(2):
                router(torch.randn(7, 3, 12, device=DEVICE, requires_grad=True))
                counts = torch.empty(5, dtype=torch.int64, device=DEVICE)
                probs, rows = torch.rand(42, device=DEVICE), torch.randn(42, 12, device=DEVICE)
                router.observe_experts(rows, counts, probs)
                y = router.finish_output(torch.randn(7, 3, 12, device=DEVICE))
                optimizer_step.reduce_step_sums(layer)
                optimizer_step.commit(layer, taken=True)
            on_device = [y, *router.buffers()]
            assert (router.step_metrics is not None) == details
            assert {str(tensor.device) for tensor in on_device} == {DEVICE}
            # That this test could fail at all.
            with pytest.raises(DataDependentOutputException):
                y.sum().item()
            with pytest.raises(RuntimeError, match="two devices"):
                _ = y + torch.zeros(12)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
