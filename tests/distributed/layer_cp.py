"""One MoE layer with context parallelism 2: each rank holds half of every sequence.

``layer_cp.py OUT``: writes the default vectors and the router gradient summed over the ranks.
(Megatron's attention has no context parallelism on a CPU, so only the layer can be tested there.)
"""

import sys

from megatron_default_moe.cpu import runtime

runtime.install()

import torch  # noqa: E402
from building import build_layer, train_step  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(
        context_parallel_size=size, expert_model_parallel_size=size
    )
    results = {}
    for order in ("after-use", "before-use"):
        layer = build_layer(
            order=order,
            num_moe_experts=6,
            context_parallel_size=size,
            expert_model_parallel_size=size,
        )
        for number, expert in enumerate(layer.experts.local_experts, rank * 6 // size):
            generator = torch.Generator().manual_seed(number)
            for weight in expert.parameters():
                weight.data.copy_(torch.randn(weight.shape, generator=generator) / 4)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            whole = torch.randn(16, 3, 12, generator=generator)
            layer.zero_grad()
            train_step(layer, whole.chunk(size)[rank])
            torch.distributed.all_reduce(layer.router.weight.grad)
        results[order] = (layer.router.default_vectors, layer.router.weight.grad)
    if rank == 0:
        torch.save(results, sys.argv[1])
    torch.distributed.destroy_process_group()
