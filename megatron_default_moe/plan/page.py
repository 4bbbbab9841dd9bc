"""A plan as text for a person."""

from megatron_default_moe.plan import memory
from megatron_default_moe.plan.arguments import ASSUMED_TE_VERSION
from megatron_default_moe.plan.cost import COMPUTE_EFFICIENCY, LINK_EFFICIENCY
from megatron_default_moe.plan.memory import RESERVED, Memory
from megatron_default_moe.plan.planner import Plan

PAPER: dict[tuple[int, int, int], tuple[str, str]] = {
    (512, 8, 1): ("557M", "not given"),
    (1024, 8, 1): ("1.96B", "565M"),
    (1024, 8, 2): ("1.96B", "764M"),
    (1024, 32, 1): ("1.96B", "416M"),
    (1024, 32, 2): ("1.96B", "466M"),
    (1024, 32, 4): ("1.96B", "565M"),
    (2048, 8, 1): ("7.33B", "not given"),
}
"""Hidden size, experts, experts per token: total and active parameters in arXiv 2504.12463. With 8
experts its active counts take the part outside the experts from the 32-expert model, whose first
layer is narrower: 6 million below the exact count."""
_PAPER_VOCABULARY, _PAPER_LAYERS = 128256, 24


def text(plan: Plan) -> str:
    """Write a plan down.

    Args:
        plan: from :func:`planner.make`.
    """
    blocks = [
        _heading(plan),
        _parameters(plan),
        _memory(plan),
        _communication(plan),
        _work(plan),
        _notes(plan),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def paper_figures(plan: Plan) -> tuple[str, str] | None:
    """Total and active parameters as the paper gives them, if this is one of its models."""
    args = plan.run.args
    if (args.vocab_size, args.num_layers) != (_PAPER_VOCABULARY, _PAPER_LAYERS):
        return None
    return PAPER.get((args.hidden_size, args.num_experts, args.moe_router_topk))


def _heading(plan: Plan) -> list[str]:
    run, args = plan.run, plan.run.args
    sizes = [
        f"TP {run.layout.tp}",
        f"PP {run.layout.pp}",
        f"EP {run.layout.ep}",
        f"ETP {args.expert_tensor_parallel_size}",
        f"CP {args.context_parallel_size}",
        f"DP {run.dp}",
        f"expert DP {run.expert_dp}",
    ]
    if args.virtual_pipeline_model_parallel_size:
        sizes.insert(2, f"VPP {args.virtual_pipeline_model_parallel_size}")
    recompute = args.recompute_granularity or "none"
    if recompute == "selective":
        recompute = " ".join(args.recompute_modules)
    return [
        f"{args.world_size} x {plan.card.name}: {', '.join(sizes)}",
        f"Batch {args.global_batch_size} x {args.seq_length} tokens, {run.micro_batches} "
        f"micro-batches of {args.micro_batch_size}; recomputation: {recompute}",
    ]


def _parameters(plan: Plan) -> list[str]:
    total, active = plan.total_parameters, plan.active_parameters
    lines = [f"Parameters   {total:>18,} total", f"             {active:>18,} active per token"]
    if figures := paper_figures(plan):
        lines = [
            f"{line}  (the paper: {figure})" for line, figure in zip(lines, figures, strict=True)
        ]
    return lines


_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "default vectors": "vectors",
    "their sums": "sums",
    "activations": "activations",
    "other buffers": "other",
}


def _memory(plan: Plan) -> list[str]:
    names = [_ranks(stage.ranks) for stage in plan.stages]
    width = max(12, *(len(name) + 2 for name in names))
    lines = ["Memory per GPU" + " " * 6 + "".join(f"{name:>{width}}" for name in names)]
    for label, field in _ROWS.items():
        values = (_size(getattr(one, field)) for one in plan.memory)
        lines.append(f"  {label:<18}" + "".join(f"{value:>{width}}" for value in values))
    lines.append(
        f"  {'reserved (assumed)':<18}" + "".join(f"{_size(RESERVED):>{width}}" for _ in names)
    )
    lines.append(
        f"  {'total':<18}" + "".join(f"{_size(one.total):>{width}}" for one in plan.memory)
    )
    fullest: Memory = plan.memory[plan.fullest]
    state, activations = memory.megatron_estimate(plan.run)
    ours = fullest.weights + fullest.gradients + fullest.optimizer
    return [
        *lines,
        f"  of the card's {_size(plan.card.memory)}: {fullest.total / plan.card.memory:.0%}",
        "  Megatron's theoretical_memory_usage, first stage: weights, gradients and optimizer",
        f"  {_size(state)} (here, fullest stage: {_size(ours)}); activations {_size(activations)}"
        " (as if dense, no recomputation)",
    ]


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"stage {ranks[0]}"
    if ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"stages {ranks[0]}-{ranks[-1]}"
    return f"{len(ranks)} stages like {ranks[0]}"


def _size(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size / 10:
            return f"{number / size:.2f} {unit}"
    return f"{number / 2**10:.2f} KiB"


def _communication(plan: Plan) -> list[str]:
    lines = ["Sent by one GPU per step"]
    for one in plan.cost.traffic:
        hidden = f", {1000 * one.hidden:,.1f} ms of it hidden" if one.hidden else ""
        seconds = f"{1000 * one.seconds:,.1f} ms"
        lines.append(f"  {one.name:<32}{_size(one.bytes):>12}{seconds:>14}{hidden}")
    if len(lines) == 1:
        lines.append("  nothing")
    return lines


def _work(plan: Plan) -> list[str]:
    cost, gpus = plan.cost, plan.run.args.world_size
    speed = cost.tokens / cost.step_seconds
    mfu = cost.flops / cost.step_seconds / gpus / plan.card.bf16_flops
    return [
        f"Operations   {cost.flops:.4g} FLOP per step, {cost.flops / cost.tokens:.4g} per token"
        " (active experts only)",
        f"Step time    {cost.step_seconds:.3g} s estimated, not measured:"
        f" computation {cost.compute_seconds:.3g} s,",
        f"             pipeline bubble {cost.bubble_seconds:.3g} s,"
        f" communication not hidden {cost.exposed_seconds:.3g} s",
        f"             {speed:,.0f} tokens/s, {speed / gpus:,.0f} per GPU,"
        f" {mfu:.0%} of the bf16 peak",
    ]


def _notes(plan: Plan) -> list[str]:
    built = [str(stage.ranks[0]) for stage in plan.stages]
    pp, args = plan.run.layout.pp, plan.run.args
    stages = (
        f"pipeline stages {', '.join(built)} of {pp}; the others are like one of them"
        if len(built) < pp
        else ("every pipeline stage" if pp > 1 else "the one stage")
    )
    lines = [
        f"Built on the meta device in a fake process group of {args.world_size}:\n{stages}.",
        f"Assumed: {COMPUTE_EFFICIENCY:.0%} of the card's peak in matrix products,"
        f" {LINK_EFFICIENCY:.0%} of a link's rate, evenly loaded experts.",
    ]
    if args.transformer_impl == "transformer_engine":
        lines.insert(
            1,
            "Transformer Engine is not used here: Megatron's own modules were built in its place,\n"
            f"and checks that ask for its version were answered with {ASSUMED_TE_VERSION}.",
        )
    return lines
