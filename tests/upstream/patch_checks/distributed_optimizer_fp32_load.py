"""A distributed optimizer takes the state of an fp32 model back from a checkpoint."""

import one_rank
import torch

# Without the CPU runtime's own cure.
one_rank.start(without=lambda row: row.target.endswith("_set_main_param_and_optimizer_states"))

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

torch.manual_seed(1)
config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
model = DistributedDataParallel(config, ddp, torch.nn.Linear(5, 4))
settings = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=0.0)
optimizer = get_megatron_optimizer(settings, [model]).chained_optimizers[0]
for parameter in model.module.parameters():
    parameter.main_grad.fill_(1.0)
model.finish_grad_sync()
assert optimizer.step()[0]
for parameter in model.module.parameters():
    loaded = {
        name: torch.full_like(tensor, 7.0)
        for name, tensor in optimizer._get_main_param_and_optimizer_states(parameter).items()
    }
    optimizer._set_main_param_and_optimizer_states(parameter, loaded)
    for tensor in optimizer._get_main_param_and_optimizer_states(parameter).values():
        assert (tensor == 7.0).all()
