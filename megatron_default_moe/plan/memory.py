"""Bytes on one GPU: weights, gradients, optimizer, default vectors, activations."""

import dataclasses
from typing import Any

from megatron_default_moe.plan import activations
from megatron_default_moe.plan.arguments import CheckedRun
from megatron_default_moe.plan.stages import Counts, Stage

RESERVED = 4 * 2**30
"""Assumed for the CUDA context, NCCL's buffers, workspaces of the kernels and fragmentation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU of a pipeline stage."""

    weights: int
    gradients: int
    optimizer: float
    vectors: int
    """Default vectors and their update counts."""
    sums: int
    """Local sums of the step, and the buffer in which they are all-reduced."""
    activations: float
    other: int
    """Other buffers of the model."""

    @property
    def total(self) -> float:
        """The sum, with what is reserved."""
        return RESERVED + sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytesPerParameter:
    """What Megatron allocates for one parameter."""

    weight: int
    gradient: int
    optimizer: float
    """Before it is divided by the distributed optimizer."""


def bytes_per_parameter(args: Any) -> BytesPerParameter:
    """Of Megatron's DDP buffers and Adam (docs/user-guide/features/dist_optimizer.md).

    In FP8, Transformer Engine keeps two quantised copies of a weight beside the bf16 one (one byte
    each, rows and columns); counted for every parameter.
    """
    if not (args.bf16 or args.fp16):
        return BytesPerParameter(weight=4, gradient=4, optimizer=8)
    weight = 2 + (2 if args.fp8 or args.fp4 else 0)
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else 2
    if not args.use_precision_aware_optimizer:
        return BytesPerParameter(weight=weight, gradient=gradient, optimizer=12)
    kept = (args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype)
    return BytesPerParameter(
        weight=weight, gradient=gradient, optimizer=sum(dtype.itemsize for dtype in kept)
    )


def optimizer_shards(run: CheckedRun) -> tuple[int, int]:
    """Ranks over which the distributed optimizer divides its state: dense, routed experts."""
    if not run.args.use_distributed_optimizer:
        return 1, 1
    return run.dp * run.args.context_parallel_size, run.expert_dp


def stage_memory(run: CheckedRun, stage: Stage) -> Memory:
    """Bytes on a GPU of the stage, at the pipeline rank that holds most micro-batches."""
    state = state_memory(run, stage.counts)
    return dataclasses.replace(state, activations=activations.stage_bytes(run, stage))


def state_memory(run: CheckedRun, counts: Counts) -> Memory:
    """All but the activations."""
    each = bytes_per_parameter(run.args)
    dense_shards, expert_shards = optimizer_shards(run)
    held = counts.dense / dense_shards + counts.experts / expert_shards
    return Memory(
        weights=each.weight * (counts.dense + counts.experts),
        gradients=each.gradient * (counts.dense + counts.experts),
        optimizer=each.optimizer * held,
        vectors=counts.vector_bytes,
        sums=counts.sum_bytes + counts.step_buffer_bytes,
        activations=0,
        other=counts.other_buffer_bytes,
    )


def megatron_estimate(run: CheckedRun) -> tuple[float, float]:
    """Megatron's own ``theoretical_memory_usage``: bytes of state, bytes of activations.

    It takes bf16 and a pipeline cut into equal parts, and its activations know nothing of experts
    and of recomputation.
    """
    import copy

    from megatron.training import theoretical_memory_usage as theory

    args = copy.copy(run.args)
    args.padded_vocab_size = run.vocab
    return (
        theory.compute_weight_and_optimizer_memory(args),
        theory.compute_activation_memory(args, run.micro_batches),
    )
