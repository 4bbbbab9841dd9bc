"""The neighbourhood of a layout: other TP, PP and EP sizes, the smallest change first."""

import argparse
import math

from megatron_default_moe.errors import UserError
from megatron_default_moe.plan import arguments, memory
from megatron_default_moe.plan.arguments import Layout
from megatron_default_moe.plan.cards import GPUS_PER_HOST, Card

MOST_GPUS = 4096
"""Where the search for a number of GPUs that works ends."""


def given(parsed: argparse.Namespace) -> Layout:
    """The layout that was asked for."""
    return Layout(
        parsed.tensor_model_parallel_size,
        parsed.pipeline_model_parallel_size,
        parsed.expert_model_parallel_size,
    )


def other_numbers(gpus: int) -> list[int]:
    """Numbers of GPUs to try instead: a few hosts less, then powers of two above."""
    hosts = (gpus - 1) // GPUS_PER_HOST
    fewer = [hosts_ * GPUS_PER_HOST for hosts_ in range(hosts, max(hosts - 4, 0), -1)]
    more = [2**power for power in range(MOST_GPUS.bit_length()) if 2**power > gpus]
    return [number for number in fewer if 2 * number > gpus] + more


def nearest_first(parsed: argparse.Namespace, gpus: int) -> list[Layout]:
    """Layouts that could be tried instead, TP inside a host.

    The distance is in doublings and halvings, summed over TP, PP and EP; between equals, fewer
    sizes changed come first, then less TP, which costs most communication.

    Args:
        parsed: the arguments that were refused.
        gpus: how many GPUs there are.
    """
    start = given(parsed)
    found = [
        Layout(tp, pp, ep)
        for tp in _divisors(gpus)
        for pp in _divisors(gpus)
        for ep in _divisors(parsed.num_experts)
        if tp <= GPUS_PER_HOST and pp <= parsed.num_layers and ep <= gpus
    ]
    found = [layout for layout in found if layout != start]
    return sorted(found, key=lambda layout: (*_distance(start, layout), layout))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _distance(one: Layout, other: Layout) -> tuple[float, int]:
    pairs = ((one.tp, other.tp), (one.pp, other.pp), (one.ep, other.ep))
    steps = [abs(math.log2(after / before)) for before, after in pairs]
    return round(sum(steps), 6), sum(step > 0 for step in steps)


def worth_building(parsed: argparse.Namespace, card: Card, layout: Layout) -> bool:
    """Whether the arguments pass, and the state alone is not far above the card's memory.

    By Megatron's own formula, which is quick, and a few percent off where stages are uneven.
    """
    try:
        run = arguments.check(parsed, card, layout)
    except UserError:
        return False
    state, _ = memory.megatron_estimate(run)
    return state < 1.25 * card.memory
