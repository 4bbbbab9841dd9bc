"""A local MoE layer with biases trains on one expert rank, with the gradient of the formula."""

import one_rank
import torch

one_rank.start()

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

config = TransformerConfig(
    num_layers=1,
    hidden_size=12,
    num_attention_heads=2,
    num_moe_experts=3,
    moe_router_topk=1,
    moe_router_pre_softmax=True,
    moe_ffn_hidden_size=20,
    add_bias_linear=True,
    bias_activation_fusion=False,
    gradient_accumulation_fusion=False,
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="allgather",
    use_cpu_initialization=True,
)
model_parallel_cuda_manual_seed(1, force_reset_rng=True)
layer = get_gpt_layer_local_spec(3, False).submodules.mlp(config=config)
layer.set_layer_number(1)
x = torch.randn(7, 3, 12, generator=torch.Generator().manual_seed(2))
probs, _ = layer.router(x)
y, _ = layer(x)
y.sum().backward()
for expert, mass in zip(layer.experts.local_experts, probs.sum(0), strict=True):
    torch.testing.assert_close(expert.linear_fc2.bias.grad, mass.detach().expand(12))
