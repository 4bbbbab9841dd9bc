"""The two moments of an optimizer step that concern the default vectors: reduce and commit.

``reduce_step_sums`` runs at gradient finalisation, after the last micro-batch: it adds up, over
all ranks of the pipeline stage and for all its MoE layers, in ONE all-reduce, what the layers have
summed locally, and leaves the result *pending*. ``commit`` runs after the optimizer step and
blends the pending sums into the vectors if the step was taken. Between the two, a rerun of the
step overwrites the pending sums, and a skipped step drops them: nothing is counted twice.

The all-reduce could run beside the optimizer, since only ``commit`` reads its result. It does not:
the order in which it and the optimizer's collectives start would then have to be the same on all
ranks for NCCL, and what there is to win (one reduction of ``4 E D`` bytes a layer and step) has not
been measured on a GPU.

Why no rank divides by anything: every row of every expert is on exactly one rank, or (expert
tensor parallelism) on several as partial sums that add up; every token is routed on exactly one.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads as megatron_finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_default_moe.layers import fidelity
from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.layers.step_sums import StepSums

_NOT_REDUCED = (
    "the step's default-vector sums were not reduced before commit: something has replaced the"
    " finalize_model_grads_func of the model's config after attach (a framework's setup), or this"
    " loop has none; call megatron_default_moe.reduce_step_sums(model) on every rank after the last"
    " micro-batch"
)


def routers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[ObservedTopKRouter]:
    """Yield this package's routers of a model or of some modules, in layer order."""
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ObservedTopKRouter):
                yield module


@torch.no_grad()
def begin(model: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
    """Begin an optimizer step without what a forward pass that raised has left in the sums.

    Costs nothing after a step that ended as it should: nothing is left then.

    Args:
        model: the model, or its chunks.
    """
    everyone = list(routers(model))
    for router in everyone:
        router.begin_step()
    left = [router for router in everyone if router.counted_passes]
    for router in left:
        router.counted_passes = 0
    sums = [part for router in left for part in router.local_step_sums()]
    if sums:
        torch._foreach_zero_(sums)


@torch.no_grad()
def reduce_step_sums(model: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
    """Add up the sums of the step over the pipeline stage; leave them pending on each router.

    Every rank of the stage must call it (they hold the same layers). Local sums start at zero
    again, whatever becomes of the pending ones.

    Args:
        model: the model, or its chunks with interleaved pipelines.
    """
    training = [router for router in routers(model) if router.training]
    if training:
        _reduce_stage(training)
        fidelity.compare(training)
    _reduce_model(model, training)


def _reduce_stage(training: list[ObservedTopKRouter]) -> None:
    """Add up the sums of some layers over their pipeline stage."""
    sizes = [
        part
        for router in training
        for part in (StepSums.numel(router.num_experts, router.vector_width), router.own_sums)
    ]
    buffer = training[0].local_stats.new_zeros(sum(sizes))
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    flats = buffer.split(sizes)
    for router, flat, own in zip(training, flats[::2], flats[1::2], strict=True):
        router.counted_passes = 0
        router.pending = StepSums.view(flat, router.num_experts, router.vector_width)
        router.pending_own = own
        parts += [*router.step_parts(flat), *router.own_parts(own)]
    places, sums = zip(*parts, strict=True)
    torch._foreach_copy_(places, sums)
    torch._foreach_zero_(sums)
    torch.distributed.all_reduce(buffer, group=training[0].tp_dp_cp_group)


def _reduce_model(
    model: torch.nn.Module | Iterable[torch.nn.Module], training: list[ObservedTopKRouter]
) -> None:
    """Add up the load over all layers of the model, for estimators that ask for it.

    Two numbers, in one all-reduce over the pipeline, in which stages without MoE layers take part.
    """
    chunk = unwrap_model(model if isinstance(model, torch.nn.Module) else next(iter(model)))
    # A stage without MoE layers knows from the model's config alone.
    config = training[0].config if training else getattr(chunk, "config", None)
    options = getattr(config, "router_gradient", None)
    if options is None or not options.model_wide:
        return
    sums = [router.pending.load() for router in training if router.pending is not None]
    load = torch.stack(sums).sum(0) if sums else torch.zeros(2, device=torch.cuda.current_device())
    collection = getattr(chunk, "pg_collection", None)
    if collection is None:
        collection = ProcessGroupCollection.use_mpu_process_groups(["pp"])
    group = collection.pp
    if group.size() > 1:
        torch.distributed.all_reduce(load, group=group)
    for router in training:
        router.model_load = load


def commit(model: torch.nn.Module | Iterable[torch.nn.Module], taken: bool) -> None:
    """End an optimizer step: blend the pending sums in if it was taken, drop them if not.

    For training loops other than Megatron's (whose loop ``patches.install`` covers): call it once
    after each ``optimizer.step()``.

    Args:
        model: the model, or its chunks.
        taken: False for a step the optimizer skipped (overflow, NaN) or that will be repeated,
            or in which something was raised: its sums are dropped, reduced or not.

    Raises:
        RuntimeError: the step was taken, and nobody reduced its sums; without this error the
            vectors would stay what they are, and the sums grow.
    """
    taking: dict[type[ObservedTopKRouter], list[ObservedTopKRouter]] = {}
    everyone = list(routers(model))
    for router in everyone:
        router.step_metrics = None
        if taken and router.pending is not None:
            taking.setdefault(type(router), []).append(router)
        elif taken and router.counted_passes:
            raise RuntimeError(_NOT_REDUCED)
    with torch.no_grad():
        for kind, of_kind in taking.items():
            kind.take_step(of_kind)
            kind.move_choice_bias(of_kind)
            for router in of_kind:
                router.absent = ()  # What has taken a step is saved, and asked for.
    for router in everyone:
        router.pending = None
    begin(everyone)


def finalize_model_grads(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Megatron's gradient finalisation, then the reduction of the step's sums.

    A plain function, so that a config that holds it can be copied. Arguments as upstream's
    (``megatron.core.distributed.finalize_model_grads``).
    """
    megatron_finalize_model_grads(model, *args, **kwargs)
    reduce_step_sums(model)


def finalize_model_grads_and_commit(
    model: list[torch.nn.Module], *args: Any, **kwargs: Any
) -> None:
    """The same, with the commit at once: for loops that cannot call :func:`commit`.

    Not exact where the loop repeats or skips a step after finalisation: such a step counts (and a
    repeated one counts twice).
    """
    finalize_model_grads(model, *args, **kwargs)
    commit(model, taken=True)
