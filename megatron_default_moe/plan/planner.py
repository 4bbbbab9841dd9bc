"""A plan: everything computed of one run, and whether it fits."""

import argparse
import contextlib
import copy
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
    if (size := _smaller_micro_batch(parsed, card)) is not None:
        reason += f"; with --micro-batch-size {size} it works"
    if (layout := _nearest(parsed, card)) is not None:
        raise UserError(f"{reason}; the nearest layout that works is {layout}") from cause
    reason += "; no other TP, PP and EP sizes work either"
    for other in layouts.other_numbers(gpus) if size is None else ():
        at_other = _with(parsed, world_size=other)
        if (layout := _nearest(at_other, card, itself=True)) is not None:
            raise UserError(f"{reason}, and on {other} GPUs {layout} does") from cause
    raise UserError(reason) from cause


def _with(parsed: argparse.Namespace, **changes: int) -> argparse.Namespace:
    changed = copy.deepcopy(parsed)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _smaller_micro_batch(parsed: argparse.Namespace, card: Card) -> int | None:
    """The largest micro-batch size, halved from the given one, with which the layout works."""
    size = parsed.micro_batch_size or 1
    while size > 1:
        size //= 2
        with contextlib.suppress(UserError):
            _fitting(_with(parsed, micro_batch_size=size), card, None)
            return int(size)
    return None


def _nearest(parsed: argparse.Namespace, card: Card, itself: bool = False) -> Layout | None:
    """The nearest layout that works; `itself`: with the given one first."""
    given = [layouts.given(parsed)] if itself else []
    for layout in [*given, *layouts.nearest_first(parsed, parsed.world_size)]:
        if layouts.worth_building(parsed, card, layout):
            with contextlib.suppress(LayoutError):
                _fitting(parsed, card, layout)
                return layout
    return None


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
