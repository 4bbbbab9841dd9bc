"""With the same tokens on both data-parallel ranks, the global loss is each rank's own.

So the gradient of ``global_aux_loss``, averaged over the ranks as Megatron does, must be that of
``aux_loss``. Prints the ratio of their norms.
"""

import pathlib
import sys
import tempfile

import torch

from megatron_default_moe.cpu import runtime

RANKS = 2


def router_gradient(kind: str) -> torch.Tensor:
    """The gradient of the balance loss alone, averaged over the ranks."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=12,
        num_attention_heads=2,
        num_moe_experts=5,
        moe_router_topk=2,
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=0.1,
        use_cpu_initialization=True,
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    router = TopKRouter(config, get_default_pg_collection())
    router.set_layer_number(1)
    x = torch.randn(7, 3, 12, generator=torch.Generator().manual_seed(2))
    probs, _ = router(x)
    (probs * 0).sum().backward()
    torch.distributed.all_reduce(router.weight.grad)
    return router.weight.grad / RANKS


def compare(rank: int, store: str, result: str) -> None:
    """One rank: build both routers, and let rank 0 write the ratio."""
    runtime.install()
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    parallel_state.initialize_model_parallel()
    ratio = router_gradient("global_aux_loss").norm() / router_gradient("aux_loss").norm()
    if rank == 0:
        pathlib.Path(result).write_text(f"{ratio:.6f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = f"{folder}/ratio"
        torch.multiprocessing.spawn(compare, (f"{folder}/store", result), nprocs=RANKS)
        ratio = float(pathlib.Path(result).read_text())
    print("ratio", ratio)
    sys.exit(0 if abs(ratio - 1) < 1e-5 else "the gradient is not that of aux_loss")
