"""What a checkpoint knows of its run, held against the command line that loads it.

Megatron saves all arguments of a run and compares a handful. The rest either raises late, or drops
weights, or goes on with the saved value and ignores the flag, without a word. Four tables of its
arguments, by what happens to one that differs: ``SHAPE`` (weights are dropped or misread: refused
in every load), ``FUNCTION`` (the same weights compute something else), ``OPTIMIZER`` (Megatron goes
on with the saved value) and ``RUN`` (the new value counts from here on: said). ``OWN`` are this
package's options. What a model does not use is not compared, and neither is the layout of a run.
"""

import argparse
import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_default_moe.errors import UserError
from megatron_default_moe.options.config import (
    RouterGradientConfig,
    chosen_by_flags,
    options_from_args,
)

logger = logging.getLogger(__name__)


def _always(args: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Row:
    """One of Megatron's arguments."""

    name: str
    """Megatron's name of it, in its parsed arguments."""
    used: Callable[[Any], Any] = _always
    """Whether the model or optimizer of these arguments uses it."""
    flag: str = ""
    """Its flag, where that is not its name with dashes."""
    inverse: bool = False
    """Whether the flag is a switch that makes the argument False."""
    meaning: Callable[[Any], Any] | None = None
    """What the argument means, where two ways of writing it can mean the same."""

    @property
    def option(self) -> str:
        """The flag."""
        return self.flag or f"--{self.name.replace('_', '-')}"


def _rows(names: str, used: Callable[[Any], Any] = _always) -> tuple[Row, ...]:
    return tuple(Row(name, used) for name in names.split())


def _has_dense_layers(args: Any) -> bool:
    if not args.num_experts:
        return True
    every = args.moe_layer_freq
    return 0 in every if isinstance(every, list) else every > 1


def _rotates(args: Any) -> bool:
    return args.multi_latent_attention or args.position_embedding_type in ("rope", "yarn", "mrope")


def _moe_pattern(args: Any) -> list[int] | None:
    """Which layers are MoE layers; None if the number of layers is unknown."""
    every, layers = args.moe_layer_freq, getattr(args, "num_layers", None)
    if layers is None or every is None:
        return None
    return every if isinstance(every, list) else [int(i % every == 0) for i in range(layers)]


def _is_mla(args: Any) -> bool:
    return args.multi_latent_attention


def _is_optimizer(*kinds: str) -> Callable[[Any], bool]:
    return lambda args: any(kind in args.optimizer for kind in kinds)


SHAPE: tuple[Row, ...] = (
    *_rows("num_layers hidden_size"),
    Row("ffn_hidden_size", _has_dense_layers),
    *_rows("num_attention_heads kv_channels group_query_attention"),
    Row("num_query_groups", lambda args: args.group_query_attention),
    Row("num_experts"),
    Row("moe_layer_freq", lambda args: args.num_experts, meaning=_moe_pattern),
    *_rows("moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_latent_size"),
    Row("moe_shared_expert_gate", lambda args: args.moe_shared_expert_intermediate_size),
    Row("moe_router_enable_expert_bias"),
    Row("mtp_num_layers"),
    Row("mtp_use_repeated_layer", lambda args: args.mtp_num_layers),
    Row("untie_embeddings_and_output_weights"),
    Row("position_embedding_type"),
    Row("add_position_embedding", flag="--no-position-embedding", inverse=True),
    Row("max_position_embeddings", lambda args: args.position_embedding_type == "learned_absolute"),
    *_rows("normalization swiglu quick_geglu"),
    Row("add_bias_linear", flag="--disable-bias-linear", inverse=True),
    *_rows("add_qkv_bias qk_layernorm attention_output_gate softmax_type"),
    *_rows("experimental_attention_variant multi_latent_attention"),
    *_rows("q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim", _is_mla),
)
"""Another value changes which weights there are: Megatron leaves out of a checkpoint what the model
does not ask for, and cannot load what it does not have."""

FUNCTION: tuple[Row, ...] = (
    *_rows("moe_router_topk moe_router_pre_softmax moe_router_score_function"),
    *_rows("moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk"),
    *_rows("moe_expert_capacity_factor moe_apply_probs_on_input"),
    Row("moe_token_drop_policy", lambda args: args.moe_expert_capacity_factor is not None),
    *_rows("squared_relu openai_gelu activation_func_clamp_value glu_linear_offset"),
    *_rows("rotary_base rotary_percent rotary_interleaved no_rope_freq", _rotates),
    *_rows("rotary_seq_len_interpolation_factor use_rope_scaling", _rotates),
    Row("rope_scaling_factor", lambda args: args.use_rope_scaling),
    *_rows("rope_type rotary_scaling_factor mscale mscale_all_dim", _is_mla),
    Row("layernorm_epsilon", flag="--norm-epsilon"),
    Row("layernorm_zero_centered_gamma", flag="--apply-layernorm-1p"),
    *_rows("apply_residual_connection_post_layernorm qk_l2_norm"),
    *_rows("window_size window_attn_skip_freq use_mup"),
    *_rows(
        "mup_width_mult mup_embedding_mult mup_output_mult mup_attn_scale_power"
        " mup_base_hidden_size mup_base_head_dim",
        lambda args: args.use_mup,
    ),
)
"""Another value lets the same weights compute another function."""

OPTIMIZER: tuple[Row, ...] = (
    Row("optimizer"),
    *_rows("adam_beta1 adam_beta2 adam_eps", _is_optimizer("adam", "muon")),
    Row("sgd_momentum", _is_optimizer("sgd")),
    *_rows("muon_momentum muon_nesterov", _is_optimizer("muon")),
    *_rows("lion_beta1 lion_beta2", _is_optimizer("lion")),
    *_rows("decoupled_lr decoupled_min_lr no_weight_decay_cond_type apply_wd_to_qk_layernorm"),
)
"""What Megatron restores with the parameter groups, or finds them by."""

RUN: tuple[Row, ...] = (
    *_rows("seed data_path train_data_path valid_data_path test_data_path data_args_path"),
    *_rows("per_split_data_args_path split mock_data tokenizer_type tokenizer_model"),
    *_rows("vocab_file merge_file vocab_size seq_length"),
    Row("global_batch_size", lambda args: args.step_batch_size_schedule is None),
    Row("step_batch_size_schedule"),
    *_rows("bf16 fp16"),
    Row("fp8", flag="--fp8-format"),
    Row("fp8_recipe", lambda args: args.fp8),
    Row("fp4", flag="--fp4-format"),
    *_rows("fp32_residual_connection moe_router_dtype attention_dropout hidden_dropout"),
    *_rows("moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff"),
    Row("moe_router_bias_update_rate", lambda args: args.moe_router_enable_expert_bias),
    Row("moe_input_jitter_eps"),
    Row("mtp_loss_scaling_factor", lambda args: args.mtp_num_layers),
    *_rows("clip_grad calculate_per_token_loss lr_warmup_init"),
    *_rows(
        "lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples",
        lambda args: args.lr_decay_style == "WSD",
    ),
    *_rows("eod_mask_loss reset_position_ids reset_attention_mask"),
)
"""What a run may change on its way: it makes another run of it, which is said in one line."""

RESTORED = (
    "add_bias_linear add_position_embedding add_qkv_bias attention_dropout group_query_attention"
    " hidden_dropout moe_ffn_hidden_size moe_latent_size moe_layer_freq"
    " moe_router_enable_expert_bias moe_router_pre_softmax moe_router_score_function"
    " moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_intermediate_size"
    " mtp_num_layers mtp_use_repeated_layer normalization num_experts num_query_groups"
    " position_embedding_type rotary_base rotary_interleaved rotary_percent squared_relu swiglu"
    " tokenizer_model tokenizer_type untie_embeddings_and_output_weights"
).split()
"""What ``--use-checkpoint-args`` takes from the checkpoint whatever the command line says."""


def _has_vectors(options: RouterGradientConfig) -> bool:
    return options.uses_default_vectors


def _learns_by(*gradients: str) -> Callable[[RouterGradientConfig], bool]:
    return lambda options: options.gradient in gradients


OWN: dict[str, Callable[[RouterGradientConfig], Any]] = {
    "gradient": _always,
    "beta": _has_vectors,
    "weighting": _has_vectors,
    "order": _has_vectors,
    "in_forward": _has_vectors,
    "bias_correction": _has_vectors,
    "normalized_gate": _always,
    "global_aux_loss_exact": _always,
    "loss_free_bias": _always,
    "linear_rank": _learns_by("default-linear"),
    "linear_ridge": _learns_by("default-linear"),
    "linear_anchor": _learns_by("default-linear"),
    "mask_width": _learns_by("sparsemixer", "sparsemixer-v2"),
    "expert_group_size": _learns_by("expert-group"),
    "expert_group_in_forward": _learns_by("expert-group"),
    "remoe_lambda": _learns_by("remoe"),
    "remoe_factor": _learns_by("remoe"),
}
"""This package's options that make another training of a run, and when they are used. (A fade-in is
the checkpoint's own; evaluation, the start of the vectors and the kernels change nothing that was
trained.)"""


@dataclasses.dataclass(frozen=True)
class Difference:
    """An argument on which checkpoint and command line do not agree."""

    row: Row
    now: Any
    saved: Any

    def sentence(self, folder: pathlib.Path) -> str:
        """Say both values and how to take the saved one."""
        flag = self.row.option
        if isinstance(self.now, bool) and isinstance(self.saved, bool):
            given = self.now is not self.row.inverse
            here, was, do = ("given", "without", "drop") if given else ("missing", "with", "add")
            return f"{flag} is {here}, but the checkpoint {folder} was saved {was} it: {do} it"
        do = "leave it out" if self.saved is None else "give that value"
        return (
            f"{flag} is {self.now}, but the checkpoint {folder} was saved with {self.saved}: {do}"
        )

    def short(self) -> str:
        """Both values, for a list of several."""
        if isinstance(self.now, bool) and isinstance(self.saved, bool):
            given = self.now is not self.row.inverse
            return f"{self.row.option} ({'new' if given else 'no longer'})"
        return f"{self.row.option} {_shown(self.now)} (was {_shown(self.saved)})"

    @property
    def restored(self) -> bool:
        """Whether ``--use-checkpoint-args`` makes the two agree."""
        return self.row.name in RESTORED and self.saved is not None


def differences(rows: Iterable[Row], args: Any, saved: Any) -> Iterator[Difference]:
    """Yield where two namespaces of arguments differ in what the model uses.

    Args:
        rows: of one of the tables.
        args: Megatron's arguments now.
        saved: those of the checkpoint; what it lacks (an older Megatron's) is not compared.
    """
    for row in rows:
        if not hasattr(saved, row.name):
            continue
        now, before = getattr(args, row.name, None), getattr(saved, row.name)
        if now == before or not row.used(args):
            continue
        if row.meaning is None or row.meaning(args) != row.meaning(saved):
            yield Difference(row, now, before)


def refuse(args: Any, saved: Any, folder: pathlib.Path, weights_only: bool) -> None:
    """Refuse what the command line contradicts of a checkpoint and cannot have.

    Args:
        args: Megatron's validated arguments, with this package's flags.
        saved: the arguments of the checkpoint.
        folder: of the checkpoint.
        weights_only: whether the run is a new one that begins with these weights, or resumes
            without their optimizer; then only ``SHAPE`` is refused.

    Raises:
        UserError: the first contradiction that is refused, as one sentence.
    """
    _refuse_shapes(args, saved, folder, weights_only)
    _refuse_vocabulary(args, saved, folder)
    if not weights_only:
        for found in differences(OPTIMIZER, args, saved):
            raise UserError(
                f"{found.sentence(folder)} (Megatron goes on with the checkpoint's), or start with"
                " a new optimizer (--no-load-optim)"
            )
    if args.finetune or (weights_only and not args.skip_train):
        return
    # An evaluation computes with the same function too, or reports the loss of another model.
    for found in differences(FUNCTION, args, saved):
        raise UserError(
            f"{found.sentence(folder)}{_or_restored(found)}, or start a new run from these weights,"
            " which then compute another function, with --finetune"
        )
    for found in own_differences(args, saved):
        if not getattr(args, "default_vector_override", None):
            raise UserError(
                f"{found.sentence(folder)}, or add --default-vector-override to go on with the new"
                " value"
            )


def say(args: Any, saved: Any, folder: pathlib.Path) -> None:
    """Say in one line what of the run is another one from here on, if anything is.

    Args:
        args: Megatron's validated arguments, with this package's flags.
        saved: the arguments of the checkpoint.
        folder: of the checkpoint.
    """
    changed = [*differences((*FUNCTION, *RUN), args, saved), *own_differences(args, saved)]
    if changed:
        listed = ", ".join(found.short() for found in changed)
        logger.warning("%s was saved by a run with other flags; this one has %s", folder, listed)


def _refuse_shapes(args: Any, saved: Any, folder: pathlib.Path, weights_only: bool) -> None:
    for found in differences(SHAPE, args, saved):
        if weights_only and found.row.name == "mtp_num_layers" and not found.now:
            continue  # Fine-tuning without the layers that only help training.
        if weights_only and found.row.name == "add_position_embedding":
            continue  # Megatron compares it at resume, and uses it nowhere.
        raise UserError(
            f"{found.sentence(folder)}{_or_restored(found)}, or start a new run with another --load"
            " and --save"
        )


def _or_restored(found: Difference) -> str:
    return " (or --use-checkpoint-args)" if found.restored else ""


def _refuse_vocabulary(args: Any, saved: Any, folder: pathlib.Path) -> None:
    """Refuse a vocabulary of another size: Megatron cuts or fills up the embedding without a word.

    The padding follows the layout, and so may differ. What is known of a vocabulary is an interval
    that ends with its padded size.
    """
    now, before = _vocabulary(args), _vocabulary(saved)
    if now is None or before is None or (now[0] <= before[1] and before[0] <= now[1]):
        return
    raise UserError(
        f"the vocabulary has {now[1]} tokens, but that of the checkpoint {folder} has {before[1]}"
        " (both padded): give the tokenizer of that run (--tokenizer-type, --tokenizer-model,"
        " --vocab-size), or start a new run with another --load and --save"
    )


def _vocabulary(args: Any) -> tuple[int, int] | None:
    """The least and the greatest size of the vocabulary, by its padded size; None if unknown."""
    padded = getattr(args, "padded_vocab_size", None)
    if padded is None:
        return None
    ranks = getattr(args, "tensor_model_parallel_size", 1)
    multiple = getattr(args, "make_vocab_size_divisible_by", 128) * ranks
    return (math.ceil(padded / multiple) - 1) * multiple + 1, padded


def own_differences(args: Any, saved: Any) -> list[Difference]:
    """Return where this package's options differ from those that the checkpoint was trained with.

    Args:
        args: arguments with this package's flags.
        saved: the arguments of the checkpoint.
    """
    if not hasattr(saved, "moe_router_gradient"):
        return []  # Saved by plain Megatron.
    now, before = options_from_args(args), _options_of(saved)
    if before is None:
        return []
    # What starts anew is another check's (states.py).
    starts = {*now.checkpointed} - {*before.checkpointed} - {"default_vector_steps"}
    if starts - {"choice_bias"}:
        return []
    return [
        Difference(
            Row(field.name, flag=field.metadata["argparse_meta"]["arg_names"][0]),
            _on_off(getattr(now, field.name)),
            _on_off(getattr(before, field.name)),
        )
        for field in chosen_by_flags()
        if getattr(now, field.name) != getattr(before, field.name)
        and field.name in OWN
        and OWN[field.name](now)
        and not (field.name == "loss_free_bias" and "choice_bias" in starts)
        and (field.name != "global_aux_loss_exact" or _has_global_loss(args))
    ]


def _options_of(saved: Any) -> RouterGradientConfig | None:
    try:
        return options_from_args(argparse.Namespace(**vars(saved)))
    except UserError:
        return None  # Values that only another version took.


def _has_global_loss(args: Any) -> bool:
    return "global_aux_loss" in (args.moe_router_load_balancing_type or ())


def _on_off(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
