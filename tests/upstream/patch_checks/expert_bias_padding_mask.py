"""Tokens under a padding mask are left out of the counts that move the expert bias."""

import one_rank
import torch

one_rank.start()

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

config = TransformerConfig(
    num_layers=1,
    hidden_size=12,
    num_attention_heads=2,
    num_moe_experts=5,
    moe_router_topk=2,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="none",
    use_cpu_initialization=True,
)
model_parallel_cuda_manual_seed(1, force_reset_rng=True)
router = TopKRouter(config, get_default_pg_collection())
router.set_layer_number(1)
x = torch.randn(7, 3, 12, generator=torch.Generator().manual_seed(2))
padding = torch.zeros(7, 3, dtype=torch.bool)
padding[5:] = True
_, routing_map = router(x, padding_mask=padding)
expected = routing_map[~padding.reshape(-1)].sum(0)
assert torch.equal(router.local_tokens_per_expert, expected.float())
