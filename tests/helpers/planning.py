"""Plans and real optimizers, in a process of their own: what a test asks of it by name.

Planning forks, and a fork should inherit neither pytest's threads nor the process groups of other
tests; so the tests run these functions in one process that was started afresh.
"""

import dataclasses
import pathlib
import sys
from typing import Any

from megatron_default_moe.cpu import runtime
from megatron_default_moe.plan import cost, layouts, page, planner
from megatron_default_moe.plan.arguments import Layout, parse
from megatron_default_moe.plan.cards import CARDS
from megatron_default_moe.plan.memory import Memory
from megatron_default_moe.plan.stages import Counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What a plan says, as plain numbers."""

    layout: Layout
    total: int
    active: int
    counts: list[Counts]
    ranks: list[tuple[int, ...]]
    memory: list[Memory]
    fullest: float
    flops: float
    traffic: dict[str, float]
    text: str


def start() -> None:
    """Prepare the process."""
    runtime.install()


def plan(argv: list[str], gpus: int, card: str) -> Planned:
    """Plan a run; see ``planner.make``."""
    made = planner.make(argv, gpus, CARDS[card])
    return Planned(
        layout=made.run.layout,
        total=made.total_parameters,
        active=made.active_parameters,
        counts=[stage.counts for stage in made.stages],
        ranks=[stage.ranks for stage in made.stages],
        memory=made.memory,
        fullest=made.memory[made.fullest].total,
        flops=cost.model_flops(made.run),
        traffic={one.name: one.bytes for one in made.cost.traffic},
        text=page.text(made),
    )


def step_bench(name: str) -> tuple[Memory, float]:
    """One way of training a model of bench/step.py, with TE: its memory, and that of the GPU."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
    import step

    (shape,) = (shape for shape in step.SHAPES if shape.name == name)
    made = planner.make(step.command_line(shape, te=True), 1, CARDS["h100"])
    return made.memory[0], made.card.memory


def nearer_layouts_that_work(argv: list[str], gpus: int, card: str, found: Layout) -> list[Layout]:
    """Every layout before `found` in the search's order that can be planned and fits."""
    parsed = parse(argv, gpus)
    order = layouts.nearest_first(parsed, gpus)
    works = []
    for layout in order[: order.index(found)]:
        try:
            made = planner.compute(parsed, CARDS[card], layout)
        except ValueError:
            continue
        if made.memory[made.fullest].total <= CARDS[card].memory:
            works.append(layout)
    return works


def layer_bytes(argv: list[str], gpus: int, is_moe: bool) -> tuple[float, float]:
    """Activation bytes per token that a layer keeps and recomputes."""
    from megatron_default_moe.plan import activations, arguments

    found = activations.layer_bytes(
        arguments.check(parse(argv, gpus), CARDS["h100"]), is_moe=is_moe
    )
    return found.kept, found.recomputed


def in_flight(argv: list[str], gpus: int) -> list[int]:
    """Model chunks in flight on each pipeline rank."""
    from megatron_default_moe.plan import activations, arguments

    run = arguments.check(parse(argv, gpus), CARDS["h100"])
    return [activations.chunks_in_flight(run, rank) for rank in range(run.layout.pp)]


def allocated(argv: list[str], gpus: int, rank: int) -> dict[str, float]:
    """Bytes that Megatron's DDP and optimizer really allocate on a rank of a fake group."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_allocate, args=(argv, gpus, rank, theirs))
    process.start()
    theirs.close()
    found: dict[str, float] = ours.recv()
    process.join()
    return found


def _allocate(argv: list[str], gpus: int, rank: int, pipe: Any) -> None:
    """Build model and optimizer with values, as training does, and add up their tensors."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    from megatron_default_moe.loop.model import DefaultMoEGPTModelBuilder
    from megatron_default_moe.plan import arguments, stages

    run = arguments.check(parse(argv, gpus), CARDS["h100"])
    stages._pose_as(run, rank)
    config = arguments.model_config(run, CARDS["h100"])
    models = DefaultMoEGPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=training.get_megatron_ddp_config(run.args),
    )
    optimizer_config, _ = training.get_megatron_optimizer_config(run.args)
    optimizer = get_megatron_optimizer(optimizer_config, models, use_gloo_process_groups=False)
    buffers = [one for model in models for one in (*model.buffers, *model.expert_parallel_buffers)]
    # Of float32 parameters, the optimizer works on the weights themselves.
    weights = {one.param_data.untyped_storage().data_ptr() for one in buffers}
    state = 0
    for one in optimizer.chained_optimizers:
        one._init_optimizer_states_with_dummy_values()
        for group in one.optimizer.param_groups:
            for main in group["params"]:
                moments = one.optimizer.state[main]
                kept = (main, moments["exp_avg"], moments["exp_avg_sq"])
                state += sum(
                    tensor.nbytes
                    for tensor in kept
                    if tensor.untyped_storage().data_ptr() not in weights
                )
    pipe.send(
        {
            "weights": sum(one.param_data.nbytes for one in buffers),
            "gradients": sum(one.grad_data.nbytes for one in buffers),
            "optimizer": state,
            "padding": sum(one.numel - one.numel_unpadded for one in buffers),
        }
    )
