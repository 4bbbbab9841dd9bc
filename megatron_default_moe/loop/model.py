"""How the layers get into a Megatron model: attach the options, transform the spec, build."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec

from megatron_default_moe.errors import UserError
from megatron_default_moe.estimators.registry import router_class
from megatron_default_moe.layers import optimizer_step
from megatron_default_moe.layers.moe_layer import DefaultMoELayer, ObservedMoELayer
from megatron_default_moe.loop import patches
from megatron_default_moe.options import support
from megatron_default_moe.options.config import RouterGradientConfig


def attach(
    transformer_config: TransformerConfig,
    options: RouterGradientConfig,
    *,
    commit: Literal["after-step", "at-finalize"] | None = None,
    warn: bool = True,
) -> TransformerConfig:
    """Validate the options against a TransformerConfig and hook them into it.

    Sets ``transformer_config.router_gradient`` and the config's gradient-finalisation function,
    where the step's sums are reduced.

    Args:
        transformer_config: the model's config; changed in place.
        options: what the router learns from.
        commit: who ends a step. ``after-step``: the training loop, after ``optimizer.step()``
            (Megatron's own loop through ``patches.install``, others by calling
            :func:`megatron_default_moe.commit`). ``at-finalize``: the finalisation itself, for
            loops that cannot; not exact under reruns and skipped steps. None: ``after-step`` if
            ``patches.install`` has been called, ``at-finalize`` if not.
        warn: False if the arguments were checked before, which said what there is to warn of.

    Returns:
        The same config.

    Raises:
        UserError: a combination that does not work, as one sentence naming the flag.
    """
    support.check(transformer_config, options, warn=warn)
    if commit is None:
        commit = "after-step" if patches.installed() else "at-finalize"
    finalize = {
        "after-step": optimizer_step.finalize_model_grads,
        "at-finalize": optimizer_step.finalize_model_grads_and_commit,
    }[commit]
    present = transformer_config.finalize_model_grads_func
    assert present is None or present.__module__ == optimizer_step.__name__, (
        f"finalize_model_grads_func is already {present}: call reduce_step_sums from it instead"
    )
    transformer_config.finalize_model_grads_func = finalize
    transformer_config.router_gradient = options
    return transformer_config


def with_default_moe(spec: Any, options: RouterGradientConfig) -> Any:
    """Return a copy of a Megatron spec in which every MoE layer is this package's.

    Walks any nesting of ModuleSpec, submodule dataclasses, lists and partials, so it knows nothing
    of GPT: blocks, layers, multi-token prediction and hybrid stacks alike. Dense layers stay.

    Args:
        spec: a ModuleSpec, a ``...Submodules`` dataclass, or a list of them; not changed.
        options: ``topk`` keeps Megatron's layer and only lets its router count.

    Returns:
        The transformed copy; transforming twice changes nothing more.
    """
    if isinstance(spec, functools.partial) and _is_moe_layer(spec.func):
        keywords = dict(spec.keywords)
        keywords["submodules"] = _with_router(keywords["submodules"], options)
        return functools.partial(_layer_class(options), *spec.args, **keywords)
    if isinstance(spec, ModuleSpec):
        if _is_moe_layer(spec.module):
            return dataclasses.replace(
                spec,
                module=_layer_class(options),
                submodules=_with_router(spec.submodules, options),
            )
        return dataclasses.replace(spec, submodules=with_default_moe(spec.submodules, options))
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        names = [field.name for field in dataclasses.fields(spec)]
        transformed = {name: with_default_moe(getattr(spec, name), options) for name in names}
        return dataclasses.replace(spec, **transformed)
    if isinstance(spec, list):
        return [with_default_moe(item, options) for item in spec]
    return spec


def _is_moe_layer(module: Any) -> bool:
    return isinstance(module, type) and issubclass(module, MoELayer)


def _layer_class(options: RouterGradientConfig) -> Any:
    return ObservedMoELayer if options.gradient == "topk" else DefaultMoELayer


def _with_router(submodules: Any, options: RouterGradientConfig) -> Any:
    return dataclasses.replace(submodules, router=router_class(options))


def with_default_moe_in_mtp(mtp_block_spec: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``mtp_block_spec``: multi-token prediction layers with default vectors too.

    Args:
        mtp_block_spec: upstream's function of a GPTModelConfig; its result is None without such
            layers on this pipeline stage.

    Returns:
        A function with the same signature, its result transformed if the config has options.
    """

    @functools.wraps(mtp_block_spec)
    def transformed(config: GPTModelConfig, *args: Any, **kwargs: Any) -> Any:
        spec = mtp_block_spec(config, *args, **kwargs)
        options = getattr(config.transformer, "router_gradient", None)
        return spec if options is None else with_default_moe(spec, options)

    return transformed


def default_moe_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """Build Megatron's own layer spec for this config, with this package's MoE layers.

    For ``GPTModelConfig.transformer_layer_spec``, or on Megatron's command line as
    ``--spec megatron_default_moe default_moe_spec``. A config that nothing was attached to gets
    the default options here, and commits at gradient finalisation unless Megatron's training loop
    was covered by ``patches.install``.

    Args:
        config: the model config.
        vp_stage: stage of an interleaved pipeline.

    Returns:
        The block or layer spec.

    Raises:
        UserError: multi-token prediction with Megatron's own builder, which would build those
            layers without default vectors.
    """
    transformer = config.transformer
    if transformer.mtp_num_layers and not isinstance(config, DefaultMoEGPTModelConfig):
        raise UserError(
            "--mtp-num-layers needs this package's model config: Megatron's builder does not take"
            " the spec of its layers from --spec; train with megatron_default_moe.pretrain, or"
            " build from a DefaultMoEGPTModelConfig"
        )
    if getattr(transformer, "router_gradient", None) is None:
        attach(transformer, RouterGradientConfig())
    return with_default_moe(default_layer_spec(config, vp_stage), transformer.router_gradient)


def refuse_stock_layers(model: torch.nn.Module) -> None:
    """Make sure that every MoE layer that was built is this package's.

    Raises:
        UserError: one is not; it would train as plain TopK, unnoticed.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, MoELayer) and not isinstance(layer, ObservedMoELayer):
            raise UserError(
                f"--spec: the layer {name} was built as Megatron's own {type(layer).__name__} and"
                " would train without a router of this package: transform the spec with"
                " megatron_default_moe.with_default_moe, or drop --spec"
            )


class DefaultMoEGPTModelBuilder(GPTModelBuilder):
    """Megatron's GPT builder, with this package's layers unless the config names its own spec."""

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """Build one pipeline stage; arguments as upstream's."""
        if self._model_config.transformer_layer_spec is None:
            self._model_config.transformer_layer_spec = default_moe_spec
        with patches.while_building():
            model = super().build_model(*args, **kwargs)
        refuse_stock_layers(model)
        return model


@dataclasses.dataclass(kw_only=True)
class DefaultMoEGPTModelConfig(GPTModelConfig):
    """A GPTModelConfig that is built with :class:`DefaultMoEGPTModelBuilder`."""

    builder: ClassVar[str] = "megatron_default_moe.loop.model.DefaultMoEGPTModelBuilder"
