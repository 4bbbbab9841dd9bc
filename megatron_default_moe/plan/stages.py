"""The pipeline stages of a run, really built: on the meta device, in a fake process group.

A fake process group is one process posing as one rank of the full size, and Megatron reads the
pipeline rank from it, so every stage is built in a process of its own (a fork: Megatron is imported
once). Stages that hold the same kinds of layers in the same order are built once.
"""

import contextlib
import copy
import dataclasses
import logging
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatron_default_moe.cpu import runtime
from megatron_default_moe.errors import UserError
from megatron_default_moe.loop.command_line import reason_of
from megatron_default_moe.plan.arguments import CheckedRun, LayoutError, quiet

_BUILT_TOGETHER = 2
"""Processes at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """One model chunk of a pipeline stage (a stage has several only if interleaved)."""

    layers: tuple[bool, ...]
    """Its decoder layers: whether each is an MoE layer."""
    embedding: bool
    output: bool
    """Whether it has the output layer, and the multi-token prediction layers, if any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters and buffers of one pipeline stage, as built."""

    dense: int
    """Parameters on one rank, routed experts apart."""
    experts: int
    """Parameters of routed experts on one rank."""
    whole_dense: int
    """Parameters of the stage in all, routed experts apart; a tied copy of the embedding is not
    counted again."""
    whole_experts: int
    """Parameters of routed experts of the stage in all."""
    moe_layers: int
    vector_bytes: int
    """Default vectors and their update counts on one rank: 4 E D + 8 E per MoE layer."""
    sum_bytes: int
    """The local sums of the running step on one rank."""
    step_buffer_bytes: int
    """What one all-reduce per step adds up."""
    other_buffer_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """The pipeline stages that are alike."""

    ranks: tuple[int, ...]
    """Their pipeline ranks; the first was built."""
    chunks: tuple[Chunk, ...]
    counts: Counts


def build(run: CheckedRun, config: Any) -> list[Stage]:
    """Build one stage of each kind.

    Args:
        run: the checked run.
        config: its model config, from :func:`arguments.model_config`.

    Returns:
        The kinds of stages, in order of their first ranks.

    Raises:
        LayoutError: Megatron cannot build the model in this layout; with its reason.
        UserError: the process that builds a stage ended early.
    """
    alike: dict[tuple[Chunk, ...], list[int]] = {}
    try:
        for rank in range(run.layout.pp):
            alike.setdefault(_chunks(run, config.transformer, rank), []).append(rank)
    except (AssertionError, ValueError) as error:
        raise LayoutError(f"Megatron cannot divide the layers into stages: {error}") from error
    kinds = list(alike.items())
    cut = sum(len(chunk.layers) * len(ranks) for chunks, ranks in kinds for chunk in chunks)
    if cut != run.args.num_layers:
        raise LayoutError(
            f"Megatron divides {cut} layers over the pipeline stages, not --num-layers"
            f" {run.args.num_layers}"
        )
    counts: list[Counts] = []
    for start in range(0, len(kinds), _BUILT_TOGETHER):
        some = kinds[start : start + _BUILT_TOGETHER]
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(_process(run, config, ranks[0])) for _, ranks in some]
            counts += [
                _result(pipe, ranks[0]) for pipe, (_, ranks) in zip(running, some, strict=True)
            ]
    return [
        Stage(ranks=tuple(ranks), chunks=chunks, counts=found)
        for (chunks, ranks), found in zip(kinds, counts, strict=True)
    ]


def moe_pattern(args: Any) -> list[bool]:
    """Whether each decoder layer is an MoE layer (``get_gpt_decoder_layer_specs``)."""
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(args.num_layers)]
    return [bool(is_moe) for is_moe in frequency]


def _chunks(run: CheckedRun, config: Any, rank: int) -> tuple[Chunk, ...]:
    """What Megatron puts on a pipeline rank."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    pattern = moe_pattern(run.args)
    size = config.virtual_pipeline_model_parallel_size
    chunks = []
    for index in range(size or 1):
        vp_stage = None if size is None else index
        first = get_transformer_layer_offset(config, vp_stage, rank)
        count = get_num_layers_to_build(config, vp_stage, rank)
        chunks.append(
            Chunk(
                layers=tuple(pattern[first : first + count]),
                embedding=rank == 0 and index == 0,
                output=rank == run.layout.pp - 1 and index == (size or 1) - 1,
            )
        )
    return tuple(chunks)


@contextlib.contextmanager
def _process(run: CheckedRun, config: Any, rank: int) -> Iterator[Connection]:
    """A process that builds a stage and sends its counts, or why it cannot be built."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_build_and_send, args=(run, config, rank, theirs))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
        ours.close()


def _result(pipe: Connection, rank: int) -> Counts:
    try:
        result = pipe.recv()
    except EOFError:
        raise UserError(
            f"pipeline stage {rank} could not be built: its process ended, for the reason above or"
            " for lack of memory on this machine"
        ) from None
    if isinstance(result, str):
        raise LayoutError(f"Megatron cannot build pipeline stage {rank}: {result}")
    assert isinstance(result, Counts)
    return result


def _build_and_send(run: CheckedRun, config: Any, rank: int, pipe: Connection) -> None:
    # Among others, that GPTModel will be replaced one day.
    logging.disable(logging.WARNING)
    try:
        with quiet():
            pipe.send(count_stage(run, config, rank))
    except (AssertionError, ValueError, RuntimeError) as error:
        pipe.send(reason_of(error))


def count_stage(run: CheckedRun, config: Any, rank: int) -> Counts:
    """Build one stage in this process and count it; the process is then of no other use."""
    with runtime.planning_on_meta(), torch.device("meta"):
        _pose_as(run, rank)
        return _count(run, _build_chunks(_for_counting(config)))


def _pose_as(run: CheckedRun, rank: int) -> None:
    """Initialise Megatron as the first rank of a pipeline stage of a fake group of full size."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.global_vars import set_args
    from megatron.training.initialize import _initialize_distributed

    args = copy.copy(run.args)
    stride = (
        args.tensor_model_parallel_size * args.context_parallel_size
        if args.use_tp_pp_dp_mapping
        else args.world_size // run.layout.pp
    )
    args.rank, args.local_rank = rank * stride, 0
    args.fake_process_group, args.use_gloo_process_groups = True, False
    args.cuda_graph_impl = "none"
    set_args(args)
    if torch.distributed.is_initialized():
        # Inherited by the fork; its other ranks know nothing of us.
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    _initialize_distributed(None, None, None)
    assert parallel_state.get_pipeline_model_parallel_rank() == rank
    model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)


_LOCAL = {
    "transformer_impl": "local",
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "use_grouped_gemm_for_dense_mlp": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "tp_comm_overlap": False,
    "perform_initialization": False,
    "use_te_activation_func": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_fusion": False,
    "moe_shared_expert_overlap": False,
    "overlap_moe_expert_parallel_comm": False,
    "layernorm_zero_centered_gamma": False,
    "fused_residual_rmsnorm": False,
    "mla_down_proj_fusion": False,
    "use_transformer_engine_op_fuser": False,
    "delay_wgrad_compute": False,
    "defer_embedding_wgrad_compute": False,
    "cuda_graph_impl": "none",
    "fp8": None,
    "fp4": None,
    "fine_grained_activation_offloading": False,
}
"""What is set aside to build the same parameters from Megatron's own modules."""


def _for_counting(config: Any) -> Any:
    """The model config with Megatron's own modules in the place of Transformer Engine's."""
    transformer = copy.copy(config.transformer)
    for name, value in _LOCAL.items():
        if hasattr(transformer, name):
            setattr(transformer, name, value)
    return dataclasses.replace(config, transformer=transformer)


def _build_chunks(config: Any) -> list[torch.nn.Module]:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_default_moe.loop.model import DefaultMoEGPTModelBuilder

    # Attention proper has no parameters, and Megatron's own takes neither the shapes of latent
    # attention nor a divided context. This process builds nothing else.
    LocalSpecProvider.core_attention = lambda self: IdentityOp
    groups = ProcessGroupCollection.use_mpu_process_groups()
    size = config.transformer.virtual_pipeline_model_parallel_size
    stages = [None] if size is None else list(range(size))
    return [
        DefaultMoEGPTModelBuilder(config).build_model(groups, vp_stage=vp_stage)
        for vp_stage in stages
    ]


def _count(run: CheckedRun, chunks: list[torch.nn.Module]) -> Counts:
    from megatron_default_moe.layers.optimizer_step import routers
    from megatron_default_moe.layers.step_sums import StepSums

    args = run.args
    tp, etp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    dense = experts = whole_dense = whole_experts = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            size = parameter.numel()
            sharded = getattr(parameter, "tensor_model_parallel", False)
            if ".experts." in name:
                experts += size
                whole_experts += size * run.layout.ep * (etp if sharded else 1)
            elif "_down_proj." in name:
                # Latent attention: Transformer Engine keeps these whole on every rank.
                dense += size * (tp if sharded else 1)
                whole_dense += size * (tp if sharded else 1)
            else:
                dense += size
                copied = getattr(parameter, "shared_embedding", False) and not chunk.pre_process
                whole_dense += 0 if copied else size * (tp if sharded else 1)
    found = list(routers(chunks))
    vectors = sum(_bytes(router, "default_vectors", "default_vector_updates") for router in found)
    sums = sum(_bytes(router, "local_sums", "local_stats", "rejected_updates") for router in found)
    every = sum(b.numel() * b.element_size() for chunk in chunks for b in chunk.buffers())
    step = [4 * StepSums.numel(router.num_experts, router.vector_width) for router in found]
    return Counts(
        dense=dense,
        experts=experts,
        whole_dense=whole_dense,
        whole_experts=whole_experts,
        moe_layers=len(found),
        vector_bytes=vectors,
        sum_bytes=sums,
        step_buffer_bytes=sum(step),
        other_buffer_bytes=every - vectors - sums,
    )


def _bytes(module: torch.nn.Module, *names: str) -> int:
    buffers = dict(module.named_buffers(recurse=False))
    return sum(buffers[n].numel() * buffers[n].element_size() for n in names if n in buffers)
