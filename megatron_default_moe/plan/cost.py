"""Communication, floating-point operations and a rough step time.

The time is a sum of stated assumptions, not a measurement: matrix products at half the card's peak,
collectives at 70 % of the link, no overlap except where a flag asks for it, evenly loaded experts.
Not counted: the optimizer's update, data loading, the host.
"""

import copy
import dataclasses
from typing import Any

from megatron_default_moe.plan import activations
from megatron_default_moe.plan.arguments import CheckedRun
from megatron_default_moe.plan.cards import GPUS_PER_HOST, Card
from megatron_default_moe.plan.memory import bytes_per_parameter
from megatron_default_moe.plan.stages import Stage

COMPUTE_EFFICIENCY = 0.5
"""Assumed share of the card's peak in matrix products."""
LINK_EFFICIENCY = 0.7
"""Assumed share of a link's rate in collectives."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of communication of one GPU in one step."""

    name: str
    bytes: float
    """Sent by one GPU."""
    seconds: float
    hidden: float = 0.0
    """Of these, seconds that overlap with computation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One optimizer step."""

    flops: float
    """Of the model on the whole batch, Megatron's count: recomputation is not in it."""
    tokens: int
    traffic: tuple[Traffic, ...]
    compute_seconds: float
    """Computation of the busiest GPU, recomputation included."""
    bubble_seconds: float

    @property
    def exposed_seconds(self) -> float:
        """Communication that nothing hides."""
        return sum(one.seconds - one.hidden for one in self.traffic)

    @property
    def step_seconds(self) -> float:
        """The estimated time of a step."""
        return self.compute_seconds + self.bubble_seconds + self.exposed_seconds


def step_cost(run: CheckedRun, stages: list[Stage], card: Card) -> Cost:
    """Estimate one optimizer step.

    Args:
        run: the checked run.
        stages: its pipeline stages.
        card: the GPU.
    """
    args = run.args
    flops = model_flops(run)
    peak = peak_flops(run, card)
    worked = flops * recompute_factor(run)
    compute = worked / args.world_size / (peak * COMPUTE_EFFICIENCY)
    chunks = args.virtual_pipeline_model_parallel_size or 1
    bubble = compute * (run.layout.pp - 1) / (chunks * run.micro_batches)
    # The stage with most to send; the others wait for it.
    each = [traffic(run, stage, card, compute) for stage in stages]
    busiest = max(each, key=lambda kinds: sum(one.seconds - one.hidden for one in kinds))
    return Cost(
        flops=flops,
        tokens=args.global_batch_size * args.seq_length,
        traffic=tuple(busiest),
        compute_seconds=compute,
        bubble_seconds=bubble,
    )


def peak_flops(run: CheckedRun, card: Card) -> float:
    """The card's rate for the run's matrix products; float32 ones run in TF32, at half of bf16's.

    (On these cards; with FP8, attention and the output layer stay in bf16, which is not counted.)
    """
    if run.args.fp8:
        return card.fp8_flops
    return card.bf16_flops / (1 if run.args.bf16 or run.args.fp16 else 2)


def model_flops(run: CheckedRun, **changes: Any) -> float:
    """Megatron's own count for one step (``training.num_floating_point_operations``).

    Args:
        run: the checked run.
        changes: arguments to count with instead of the run's.
    """
    from megatron.training.training import num_floating_point_operations

    # It writes to its arguments.
    args = copy.copy(run.args)
    args.padded_vocab_size = run.vocab
    for name, value in changes.items():
        setattr(args, name, value)
    return float(num_floating_point_operations(args, args.global_batch_size))


def recompute_factor(run: CheckedRun) -> float:
    """Operations with recomputation over those without: a forward pass is a third."""
    args, whole = run.args, model_flops(run)
    if args.recompute_granularity == "full":
        # All but the output layer.
        return 1 + model_flops(run, padded_vocab_size=0) / whole / 3
    again = 0.0
    modules = activations._recompute_modules(args)
    if "moe" in modules:
        without = model_flops(run, moe_ffn_hidden_size=0, moe_shared_expert_intermediate_size=0)
        again += whole - without
    elif "shared_experts" in modules:
        again += whole - model_flops(run, moe_shared_expert_intermediate_size=0)
    if "mlp" in modules:
        again += whole - model_flops(run, ffn_hidden_size=0)
    return 1 + again / whole / 3


def traffic(run: CheckedRun, stage: Stage, card: Card, compute: float) -> list[Traffic]:
    """What one GPU of a stage sends in one step, by kind; kinds that do not occur are left out."""
    kinds = [
        _all_to_all(run, stage, card),
        _expert_tensor(run, stage, card),
        _tensor(run, stage, card),
        _pipeline(run, card),
        *_data(run, stage, card, compute),
        *_default_vectors(run, stage, card),
    ]
    return [kind for kind in kinds if kind.bytes]


def _seconds(bytes_: float, extent: int, card: Card) -> float:
    """Time to send to a group spread over `extent` consecutive GPUs."""
    link = card.nvlink if extent <= GPUS_PER_HOST else card.network
    return bytes_ / (link * LINK_EFFICIENCY)


def _ring_seconds(bytes_: float, ranks: int, stride: int, card: Card) -> float:
    """Time of a ring collective over ranks `stride` GPUs apart.

    NCCL lays one ring through each adapter of a host that a rank of the group sits at, and divides
    the bytes among them: what a rank sends mostly stays on NVLink.
    """
    if ranks * stride <= GPUS_PER_HOST:
        rate = card.nvlink
    else:
        rate = min(card.nvlink, card.network * max(1, GPUS_PER_HOST // stride))
    return bytes_ / (rate * LINK_EFFICIENCY)


def _passes(run: CheckedRun, *modules: str) -> int:
    """Forward and backward passes, and the second forward pass of recomputation."""
    selected = set(activations._recompute_modules(run.args)) & set(modules)
    return 3 if run.args.recompute_granularity == "full" or selected else 2


def _moe_layer_passes(run: CheckedRun, stage: Stage) -> int:
    return stage.counts.moe_layers * run.micro_batches * _passes(run, "moe")


def _row_bytes(run: CheckedRun) -> float:
    """Bytes of the rows that one rank's tokens of a micro-batch send to their experts."""
    args = run.args
    width = args.moe_latent_size or args.hidden_size
    row = activations.element_bytes(args) * width + 4
    return float(activations.tokens_per_rank(args) * args.moe_router_topk * row)


def _all_to_all(run: CheckedRun, stage: Stage, card: Card) -> Traffic:
    """Dispatch and combine, in each pass."""
    ep = run.layout.ep
    sent = 2 * _row_bytes(run) * (ep - 1) / ep * _moe_layer_passes(run, stage)
    extent = ep * run.args.expert_tensor_parallel_size
    if extent > GPUS_PER_HOST:
        # Rows to the own host go over NVLink at the same time.
        outside = sent * (extent - GPUS_PER_HOST) / (extent - 1)
        seconds = _seconds(outside, extent, card)
    else:
        seconds = _seconds(sent, extent, card)
    return Traffic(name="all-to-all (EP)", bytes=sent, seconds=seconds)


def _expert_tensor(run: CheckedRun, stage: Stage, card: Card) -> Traffic:
    """All-gather before the experts and reduce-scatter after them, of every rank's rows."""
    etp = run.args.expert_tensor_parallel_size
    sent = 2 * _row_bytes(run) * (etp - 1) * _moe_layer_passes(run, stage)
    return Traffic(
        name="gather + scatter (ETP)", bytes=sent, seconds=_ring_seconds(sent, etp, 1, card)
    )


def _tensor(run: CheckedRun, stage: Stage, card: Card) -> Traffic:
    """All-gather and reduce-scatter around attention and dense layers, in each pass.

    The backward pass gathers the input once more, for the weight's gradient.
    """
    args, tp = run.args, run.layout.tp
    layers = sum(len(chunk.layers) for chunk in stage.chunks)
    dense = sum(not is_moe for chunk in stage.chunks for is_moe in chunk.layers)
    regions = layers + dense + (layers - dense if args.moe_shared_expert_intermediate_size else 0)
    one = activations.tokens_per_rank(args) * args.hidden_size * activations.element_bytes(args)
    times = 2 * _passes(run) + 1
    sent = times * regions * run.micro_batches * one * (tp - 1)
    return Traffic(
        name="gather + scatter (TP)", bytes=sent, seconds=_ring_seconds(sent, tp, 1, card)
    )


def _pipeline(run: CheckedRun, card: Card) -> Traffic:
    """Activations to the next stage and their gradients back."""
    args = run.args
    one = activations.tokens_per_rank(args) * args.hidden_size * activations.element_bytes(args)
    chunks = args.virtual_pipeline_model_parallel_size or 1
    sent = 2 * one * run.micro_batches * chunks if run.layout.pp > 1 else 0.0
    extent = 2 * args.world_size // run.layout.pp
    return Traffic(name="send + receive (PP)", bytes=sent, seconds=_seconds(sent, extent, card))


def _data(run: CheckedRun, stage: Stage, card: Card, compute: float) -> list[Traffic]:
    """Gradients, and with the distributed optimizer the new weights.

    A ring sends each byte once per rank but the own, for a reduce-scatter or an all-gather; an
    all-reduce is both.
    """
    args, each = run.args, bytes_per_parameter(run.args)
    per_parameter = each.gradient + (
        activations.element_bytes(args) if args.use_distributed_optimizer else each.gradient
    )
    dense_ranks = run.dp * args.context_parallel_size
    kinds = []
    # Reduction overlaps with the last backward pass, the gathering with the next forward pass.
    free = compute / run.micro_batches if args.overlap_grad_reduce else 0.0
    for name, size, ranks, stride in (
        ("gradients + weights (DP)", stage.counts.dense, dense_ranks, run.layout.tp),
        (
            "gradients + weights (expert DP)",
            stage.counts.experts,
            run.expert_dp,
            run.layout.ep * args.expert_tensor_parallel_size,
        ),
    ):
        sent = size * per_parameter * (ranks - 1) / ranks
        seconds = _ring_seconds(sent, ranks, stride, card)
        hidden = min(seconds, free)
        free -= hidden
        kinds.append(Traffic(name=name, bytes=sent, seconds=seconds, hidden=hidden))
    return kinds


def _default_vectors(run: CheckedRun, stage: Stage, card: Card) -> list[Traffic]:
    """This package's: one all-reduce per step; in order before-use also one per layer and pass."""
    ranks = run.args.world_size // run.layout.pp
    share = 2 * (ranks - 1) / ranks
    sent = stage.counts.step_buffer_bytes * share
    seconds = _ring_seconds(sent, ranks, 1, card)
    kinds = [Traffic(name="default vectors, once", bytes=sent, seconds=seconds)]
    if run.options.uses_default_vectors and run.options.order == "before-use":
        again = stage.counts.vector_bytes * share * run.micro_batches * (_passes(run, "moe") - 1)
        kinds.append(
            Traffic(
                name="default vectors, before use",
                bytes=again,
                seconds=_ring_seconds(again, ranks, 1, card),
            )
        )
    return kinds
