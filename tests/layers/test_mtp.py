"""Default vectors in multi-token prediction layers, whose spec Megatron's builder makes itself.

Contract: a model with such layers, built from this package's config, has default vectors in them
too; a layer that Megatron calls several times sums up all its calls, and its mean stays a mean;
the replaced function is back in its place after every build; a builder that would leave those
layers without default vectors is refused. The real loop is in ``distributed/test_variants.py``.
"""

from typing import Any

import pytest
import torch
from layer_reference import close
from torch import Tensor

from megatron_default_moe import (
    DefaultMoEGPTModelConfig,
    RouterGradientConfig,
    UserError,
    attach,
    commit,
    default_moe_spec,
    reduce_step_sums,
)
from megatron_default_moe.maths import naive

LAYERS, SEQUENCE, WORDS, EXPERTS = 2, 8, 16, 4


def model_config(options: RouterGradientConfig | None, kind: Any = None, **settings: Any) -> Any:
    """A GPT config with two decoder layers and, in ``settings``, more."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    transformer = TransformerConfig(
        **{
            "num_layers": LAYERS,
            "hidden_size": 12,
            "num_attention_heads": 2,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 1,
            "moe_ffn_hidden_size": 20,
            "moe_router_pre_softmax": True,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "add_bias_linear": False,
            "persist_layer_norm": False,
            "transformer_impl": "local",
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "use_cpu_initialization": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **settings,
        }
    )
    if options is not None:
        attach(transformer, options)
    kind = kind or DefaultMoEGPTModelConfig
    return kind(transformer=transformer, vocab_size=WORDS, seq_length=SEQUENCE)


def build(config: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = config.get_builder_cls()(config)
    return builder.build_model(groups, pre_process=True, post_process=True)


def routers(model: Any) -> list[Any]:
    from megatron_default_moe.layers import optimizer_step

    return list(optimizer_step.routers(model))


@pytest.mark.parametrize("repeated", [False, True], ids=["separate", "repeated"])
@pytest.mark.parametrize("gradient", ["default", "topk"])
def test_prediction_layers_have_this_packages_routers(
    one_rank: None, gradient: str, repeated: bool
) -> None:
    options = RouterGradientConfig(gradient=gradient, init="gaussian")
    config = model_config(options, mtp_num_layers=2, mtp_use_repeated_layer=repeated)
    model = build(config)
    found = routers(model)
    moe_layers = [m for m in model.modules() if hasattr(m, "router")]
    assert len(found) == len(moe_layers) == LAYERS + (1 if repeated else 2)
    assert [router.model_layer_number for router in found] == [1, 2, 3, 4][: len(found)]
    assert [router.is_mtp_layer for router in found] == [False, False, True, True][: len(found)]
    if gradient == "default":
        starts = {tuple(router.default_vectors.flatten().tolist()) for router in found}
        assert len(starts) == len(found), "two layers started from the same vectors"


@pytest.mark.parametrize("repeated", [False, True], ids=["separate", "repeated"])
def test_vectors_are_the_means_over_all_calls_of_a_layer(one_rank: None, repeated: bool) -> None:
    options = RouterGradientConfig(beta=0.0)
    model = build(model_config(options, mtp_num_layers=2, mtp_use_repeated_layer=repeated)).train()
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def sum_up(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        _, counts, probs = args
        sums = naive.expert_sums(output[0].detach(), counts, probs.detach(), "router")
        weights = probs.detach().reshape(-1, 1)
        mass = naive.expert_sums(weights, counts, probs.detach(), "router")
        seen.setdefault(id(layer), []).append((sums, mass[:, 0]))

    layers = [module for module in model.modules() if hasattr(module, "router")]
    for layer in layers:
        layer.experts.register_forward_hook(sum_up)
    words = torch.randint(0, WORDS, (2, SEQUENCE), generator=torch.Generator().manual_seed(2))
    mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)
    positions = torch.arange(SEQUENCE).expand(2, -1)
    model(words, positions, mask, labels=words).mean().backward()
    reduce_step_sums(model)
    commit(model, taken=True)
    calls = [len(seen[id(layer.experts)]) for layer in layers]
    assert calls == ([1, 1, 2] if repeated else [1, 1, 1, 1])
    for layer in layers:
        sums_ED, mass_E = (sum(parts) for parts in zip(*seen[id(layer.experts)], strict=True))
        zeros_ED = torch.zeros_like(layer.router.default_vectors)
        close(layer.router.default_vectors, naive.ema(zeros_ED, sums_ED, mass_E, 0.0))
        assert layer.router.weight.grad.any()


def test_the_function_of_megatron_is_back_after_a_build(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.models import gpt

    original = gpt.mtp_block_spec
    build(model_config(RouterGradientConfig(), mtp_num_layers=1))
    assert gpt.mtp_block_spec is original
    monkeypatch.setattr(gpt, "GPTModel", None)
    with pytest.raises(TypeError, match="not callable"):
        build(model_config(RouterGradientConfig(), mtp_num_layers=1))
    assert gpt.mtp_block_spec is original


def test_megatrons_own_builder_is_refused(one_rank: None) -> None:
    from megatron.training.models.gpt import GPTModelConfig

    config = model_config(None, GPTModelConfig, mtp_num_layers=1)
    config.transformer_layer_spec = default_moe_spec
    with pytest.raises(UserError, match="DefaultMoEGPTModelConfig"):
        build(config)
    config = model_config(None, GPTModelConfig)
    config.transformer_layer_spec = default_moe_spec
    assert len(routers(build(config))) == LAYERS


def test_a_spec_of_multi_latent_attention_gets_the_layers(one_rank: None) -> None:
    """Megatron's local attention cannot take MLA's shapes, so that the model needs a GPU."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from megatron_default_moe import DefaultMoELayer
    from megatron_default_moe.loop.model import with_default_moe

    stock = get_gpt_layer_local_spec(EXPERTS, False, multi_latent_attention=True)
    ours = with_default_moe(stock, RouterGradientConfig())
    assert ours.submodules.mlp.func is DefaultMoELayer
    assert ours.submodules.self_attention == stock.submodules.self_attention
    assert ours.submodules.self_attention.module is MLASelfAttention
