"""A distributed optimizer on torch's Adam, saved, loaded into a new one: the same next step."""

import copy
from typing import Any

import one_rank
import torch

from megatron_default_moe.cpu import replacements

# Without the CPU runtime's own cure.
one_rank.start(without=lambda row: row.reason == replacements._ADAM)

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


class Model(torch.nn.Module):
    """Three parameters in two groups (a bias has no weight decay)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 4)
        self.second = torch.nn.Linear(4, 3, bias=False)


def build() -> tuple[Any, Any]:
    torch.manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(config, ddp, Model())
    settings = OptimizerConfig(
        optimizer="adam", lr=0.1, weight_decay=0.1, use_distributed_optimizer=True, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(settings, [model])
    return model, optimizer.chained_optimizers[0]


def step(model: Any, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.module.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    model.finish_grad_sync()
    assert optimizer.step()[0]


def copied(tree: Any) -> Any:
    """Copy a state in which the optimizer's own parameters are no leaves of the graph."""

    def one(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    return torch.utils._pytree.tree_map(one, tree)


model, optimizer = build()
for seed in range(3):
    step(model, optimizer, seed)
saved = copied(optimizer.state_dict())
saved_tensors = copied(optimizer.get_parameter_state_dp_zero(use_gloo_comm=False))
saved_model = copied(model.module.state_dict())

resumed, fresh = build()
resumed.module.load_state_dict(saved_model)
# As Megatron loads: its own empty state is the template, then the checkpoint's.
fresh.load_state_dict(fresh.state_dict())
fresh.load_state_dict(saved)
with torch.no_grad():  # see distributed_optimizer_fp32_load.py
    fresh.load_parameter_state_from_dp_zero(saved_tensors)
for seed in range(3, 6):
    step(model, optimizer, seed)
    step(resumed, fresh, seed)
steps = {float(state["step"]) for state in fresh.optimizer.state.values()}
assert steps == {6.0}, f"Adam counts {steps} after six steps"
for a, b in zip(model.module.parameters(), resumed.module.parameters(), strict=True):
    assert torch.equal(a, b), "the resumed run went another way"
