"""What a forward pass keeps for the backward pass, by formula.

Counted are the tensors that Transformer Engine, FlashAttention and Megatron's fused kernels save
without dropout, in bytes per token, as in Korthikanti et al. (arXiv 2205.05198), extended by the
MoE layer, latent attention and the default vectors. With sequence parallelism every tensor of a
layer is divided by TP, along the sequence or along the width. Experts are taken to be evenly
loaded. FP8 inputs of matrix products are counted as bf16: an upper bound.
"""

import dataclasses
from typing import Any

from megatron_default_moe.plan.arguments import CheckedRun
from megatron_default_moe.plan.stages import Chunk, Stage, moe_pattern


@dataclasses.dataclass(frozen=True)
class Saved:
    """A group of tensors a layer saves."""

    bytes: float
    """Per token."""
    recomputed_by: tuple[str, ...] = ()
    """The --recompute-modules that drop it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """What one layer saves per token, and what is recomputed in its backward pass."""

    kept: float
    recomputed: float

    @property
    def all(self) -> float:
        """Everything, as without recomputation."""
        return self.kept + self.recomputed


def element_bytes(args: Any) -> int:
    """Bytes of an activation or weight."""
    return 2 if args.bf16 or args.fp16 else 4


def tokens_per_rank(args: Any) -> float:
    """Tokens of one micro-batch on one rank, the sequence divided by CP and TP."""
    ranks = args.context_parallel_size * args.tensor_model_parallel_size
    return float(args.micro_batch_size * args.seq_length / ranks)


def layer_bytes(run: CheckedRun, is_moe: bool) -> LayerBytes:
    """Bytes per token of one transformer layer, under selective recomputation if asked for."""
    saved = _attention(run.args) + (_moe(run) if is_moe else _dense(run.args))
    modules = set(_recompute_modules(run.args))
    recomputed = sum(part.bytes for part in saved if modules & set(part.recomputed_by))
    return LayerBytes(kept=sum(part.bytes for part in saved) - recomputed, recomputed=recomputed)


def _recompute_modules(args: Any) -> list[str]:
    return list(args.recompute_modules or []) if args.recompute_granularity == "selective" else []


def _norm(args: Any) -> list[Saved]:
    """A norm's input (which is the residual) and its output, the input of what follows."""
    one = element_bytes(args) * args.hidden_size
    return [Saved(one), Saved(one, ("layernorm",))]


def _attention(args: Any) -> list[Saved]:
    size, heads = element_bytes(args), args.num_attention_heads
    statistics = Saved(4 * heads)
    if args.multi_latent_attention:
        keys = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim)
        values = heads * args.v_head_dim
        latent = (args.q_lora_rank or 0) + args.kv_lora_rank
        return [
            *_norm(args),
            Saved(size * (2 * latent + args.qk_pos_emb_head_dim)),
            Saved(size * (2 * keys + values), ("mla_up_proj",)),
            Saved(size * values),
            statistics,
        ]
    groups = args.num_query_groups if args.group_query_attention else heads
    queries = heads * args.kv_channels
    return [
        *_norm(args),
        Saved(size * (queries + 2 * groups * args.kv_channels)),
        Saved(size * queries),
        statistics,
    ]


def _dense(args: Any) -> list[Saved]:
    return [*_norm(args), *_ffn(args, args.ffn_hidden_size, ("mlp",), ("mlp",))]


def _ffn(
    args: Any, width: float, first: tuple[str, ...], activated: tuple[str, ...]
) -> list[Saved]:
    """The first product's output, and the activation's, which is the second's input."""
    size = element_bytes(args) * width
    return [Saved(size * (2 if args.swiglu else 1), first), Saved(size, activated)]


def _moe(run: CheckedRun) -> list[Saved]:
    args, k = run.args, run.args.moe_router_topk
    width = args.moe_latent_size or args.hidden_size
    # Scores and probabilities in float32 and the map; and those of the experts not used.
    per_expert = 9 + (4 if run.options.uses_default_vectors else 0)
    rows = k * element_bytes(args) * width * args.expert_tensor_parallel_size
    shared = args.moe_shared_expert_intermediate_size or 0
    return [
        *_norm(args),
        Saved(per_expert * args.num_experts, ("moe",)),
        Saved(rows + 4 * k, ("moe",)),
        *_ffn(args, k * args.moe_ffn_hidden_size, ("moe",), ("moe", "moe_act")),
        *_ffn(args, shared, ("moe", "shared_experts"), ("moe", "shared_experts")),
    ]


def stage_bytes(run: CheckedRun, stage: Stage) -> float:
    """Activation bytes of the stage's first pipeline rank at the peak of its schedule."""
    args = run.args
    tokens = tokens_per_rank(args)
    per_chunk = [tokens * _chunk_bytes(run, chunk) for chunk in stage.chunks]
    in_flight = chunks_in_flight(run, stage.ranks[0])
    kept = in_flight * sum(per_chunk) / len(per_chunk)
    working = tokens * _working_bytes(run, stage)
    output = any(chunk.output for chunk in stage.chunks)
    return kept + working + (tokens * _output_bytes(run) if output else 0)


def chunks_in_flight(run: CheckedRun, rank: int) -> int:
    """Model chunks whose activations a pipeline rank holds at once (1F1B, interleaved or not).

    ``get_pp_rank_microbatches`` in Megatron's schedules.py: the warm-up passes, and the one whose
    backward pass follows.
    """
    stages, chunks = run.layout.pp, run.args.virtual_pipeline_model_parallel_size or 1
    if chunks == 1:
        return min(stages - rank, run.micro_batches)
    group = run.args.microbatch_group_size_per_vp_stage or stages
    warm_up = 2 * (stages - rank - 1) + (chunks - 1) * group
    return min(warm_up + 1, run.micro_batches * chunks)


def _chunk_bytes(run: CheckedRun, chunk: Chunk) -> float:
    """Kept per token for one pass through a chunk."""
    args = run.args
    boundary = element_bytes(args) * args.hidden_size
    layers = [layer_bytes(run, is_moe) for is_moe in chunk.layers]
    if args.recompute_granularity == "full":
        each = args.recompute_num_layers or 1
        if args.recompute_method == "uniform":
            total = boundary * -(-len(layers) // each)
        else:
            total = boundary * min(each, len(layers)) + sum(x.all for x in layers[each:])
    else:
        total = sum(layer.kept for layer in layers)
    if chunk.output and args.mtp_num_layers:
        # Two norms and the projection of their joined outputs before each such layer.
        one = layer_bytes(run, moe_pattern(args)[-1])
        kept = boundary if args.recompute_granularity == "full" else one.kept
        total += args.mtp_num_layers * (kept + 6 * boundary)
    return total


def _working_bytes(run: CheckedRun, stage: Stage) -> float:
    """What is recomputed at one time, per token."""
    kinds = {is_moe for chunk in stage.chunks for is_moe in chunk.layers}
    layers = [layer_bytes(run, is_moe) for is_moe in kinds]
    if run.args.recompute_granularity == "full":
        uniform = run.args.recompute_method == "uniform"
        return max((x.all for x in layers), default=0) * (
            run.args.recompute_num_layers or 1 if uniform else 1
        )
    return max((x.recomputed for x in layers), default=0)


def _output_bytes(run: CheckedRun) -> float:
    """The last norm, logits and loss, per token: float32 softmax of each head, logits of one."""
    heads = 1 + (run.args.mtp_num_layers or 0)
    norm = 2 * element_bytes(run.args) * run.args.hidden_size
    return norm + run.vocab * (4 * heads + element_bytes(run.args))
