"""A plan: everything computed of one run, and whether it fits."""

import argparse
import dataclasses

from megatron_default_moe.errors import UserError
from megatron_default_moe.plan import arguments, cost, layouts, memory, stages
from megatron_default_moe.plan.arguments import CheckedRun, Layout, LayoutError
from megatron_default_moe.plan.cards import Card
from megatron_default_moe.plan.cost import Cost
from megatron_default_moe.plan.memory import Memory
from megatron_default_moe.plan.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need."""

    run: CheckedRun
    card: Card
    stages: list[Stage]
    memory: list[Memory]
    """One per entry of ``stages``."""
    cost: Cost

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(
            len(stage.ranks) * (stage.counts.whole_dense + stage.counts.whole_experts)
            for stage in self.stages
        )

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: of the routed experts, K of E."""
        args = self.run.args
        experts = sum(len(stage.ranks) * stage.counts.whole_experts for stage in self.stages)
        assert experts % args.num_experts == 0
        return self.total_parameters - experts + experts // args.num_experts * args.moe_router_topk

    @property
    def fullest(self) -> int:
        """Index of the kind of stage that needs most memory."""
        return max(range(len(self.memory)), key=lambda index: self.memory[index].total)


def compute(parsed: argparse.Namespace, card: Card, layout: Layout | None = None) -> Plan:
    """Check, build and count a run, whether or not it fits.

    Args:
        parsed: from :func:`arguments.parse`.
        card: the GPU.
        layout: sizes to use instead of the parsed ones.

    Raises:
        UserError: the run cannot work, with the reason.
    """
    run = arguments.check(parsed, card, layout)
    built = stages.build(run, arguments.model_config(run, card))
    return Plan(
        run=run,
        card=card,
        stages=built,
        memory=[memory.stage_memory(run, stage) for stage in built],
        cost=cost.step_cost(run, built, card),
    )


def make(argv: list[str], gpus: int, card: Card) -> Plan:
    """Plan a run, or say what stands in its way and which layout is nearest to one that works.

    Args:
        argv: the flags of the training entry.
        gpus: how many GPUs.
        card: which.

    Raises:
        UserError: a mistake in the flags, or a layout that cannot work; in one sentence.
    """
    parsed = arguments.parse(argv, gpus)
    try:
        return _fitting(parsed, card, None)
    except LayoutError as error:
        reason, cause = str(error).rstrip("."), error
    for layout in layouts.nearest_first(parsed, gpus):
        if not layouts.worth_building(parsed, card, layout):
            continue
        try:
            _fitting(parsed, card, layout)
        except LayoutError:
            continue
        raise UserError(f"{reason}; the nearest layout that works is {layout}") from cause
    raise UserError(f"{reason}; no other TP, PP and EP sizes work either") from cause


def _fitting(parsed: argparse.Namespace, card: Card, layout: Layout | None) -> Plan:
    plan = compute(parsed, card, layout)
    index = plan.fullest
    needed = plan.memory[index].total
    if needed > card.memory:
        raise LayoutError(
            f"pipeline stage {plan.stages[index].ranks[0]} needs {needed / 2**30:.1f} GiB per GPU"
            f" and a {card.name} has {card.memory / 2**30:.1f} GiB"
        )
    return plan
