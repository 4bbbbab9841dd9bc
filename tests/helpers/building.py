"""Small real MoE layers, and one optimizer step's worth of passes over them.

Needs Megatron's process groups; knows nothing of pytest, so that launched scripts can use it too.
"""

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_default_moe import commit, reduce_step_sums
from megatron_default_moe.loop.model import attach, with_default_moe
from megatron_default_moe.options.config import RouterGradientConfig


def _spec_and_config(
    seed: int, stock: bool, te: bool, settings: dict[str, Any]
) -> tuple[Any, TransformerConfig]:
    """The spec of a transformer layer, with ours in it or not, and its config; seeds."""
    names = {field.name for field in dataclasses.fields(RouterGradientConfig)}
    options = RouterGradientConfig(**{k: v for k, v in settings.items() if k in names})
    config = TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": 12,
            "num_attention_heads": 2,
            "num_moe_experts": 5,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 20,
            "moe_router_pre_softmax": True,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "bias_activation_fusion": False,
            "gradient_accumulation_fusion": False,
            "use_cpu_initialization": True,
            **{k: v for k, v in settings.items() if k not in names},
        }
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    layer_spec = get_gpt_layer_with_transformer_engine_spec if te else get_gpt_layer_local_spec
    spec = layer_spec(config.num_moe_experts, moe_grouped_gemm=te)
    if not stock:
        attach(config, options)
        spec = with_default_moe(spec, options)
    return spec, config


def build_layer(seed: int = 1, stock: bool = False, te: bool = False, **settings: Any) -> Any:
    """Build one MoE layer in training mode: local experts, or Transformer Engine's grouped ones.

    Keywords that RouterGradientConfig has go there, all others into TransformerConfig. Weights
    depend on the seed alone, so layers that differ in options share them.
    """
    spec, config = _spec_and_config(seed, stock, te, settings)
    layer = spec.submodules.mlp(config=config)
    layer.set_layer_number(1)
    return layer.train()


def build_transformer_layer(seed: int = 1, **settings: Any) -> Any:
    """Build a whole layer, attention included; arguments as in :func:`build_layer`."""
    spec, config = _spec_and_config(seed, stock=False, te=False, settings=_whole(settings))
    return build_module(spec, config=config, layer_number=1).train()


def build_model(seed: int = 1, words: int = 16, length: int = 8, **settings: Any) -> Any:
    """Build a GPT model of such layers; arguments as in :func:`build_layer`."""
    spec, config = _spec_and_config(seed, stock=False, te=False, settings=_whole(settings))
    return GPTModel(config, spec, vocab_size=words, max_sequence_length=length).train()


def _whole(settings: dict[str, Any]) -> dict[str, Any]:
    """What attention and the rest of a layer need besides."""
    settings = {"hidden_dropout": 0.0, "attention_dropout": 0.0, **settings}
    settings = {"persist_layer_norm": False, "attention_backend": AttnBackend.unfused, **settings}
    return {"masked_softmax_fusion": False, "bias_dropout_fusion": False, **settings}


def train_step(
    layer: Any, *inputs: torch.Tensor, grad: Any = None, taken: bool = True
) -> list[torch.Tensor]:
    """One optimizer step's worth of micro-batches on one layer, without the optimizer.

    Returns the outputs; the gradients add up on the parameters.
    """
    outputs = []
    for x in inputs:
        y, _ = layer(x)
        (y * (torch.ones_like(y) if grad is None else grad)).sum().backward()
        outputs.append(y.detach())
    reduce_step_sums(layer)
    commit(layer, taken)
    return outputs
