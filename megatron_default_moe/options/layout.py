"""Which layouts can work: what has to divide what, in one sentence that names the flags.

Megatron refuses these in words that name no flag, notices them when it forms its process groups or
builds the model, or not at all. The training entry asks before Megatron starts, with torchrun's
number of ranks, and a plan asks with the number of GPUs it is made for: one rank is one GPU.
"""

import math

from megatron_default_moe.options.settings import Settings


def fault(settings: Settings, ranks: int) -> str | None:
    """What is wrong with a layout, or None.

    Args:
        settings: the arguments, parsed and not yet validated by Megatron; no size is below one.
        ranks: how many ranks there are.

    Returns:
        The first fault as a sentence without its full stop, for the caller to add a way out.
    """
    for rule in (_ranks, _batch, _expert_ranks, _experts, _heads, _sequence):
        sentence = rule(settings, ranks)
        if sentence is not None:
            return sentence
    return None


def _replica(settings: Settings) -> dict[str, int]:
    """The sizes whose product is the number of ranks of one model replica."""
    return {
        "tensor-model-parallel-size": settings.tensor_model_parallel_size,
        "pipeline-model-parallel-size": settings.pipeline_model_parallel_size,
        "context-parallel-size": settings.context_parallel_size,
    }


def _named(sizes: dict[str, int]) -> str:
    """The sizes as flags, as a product; those that are 1 are left out."""
    return " x ".join(f"--{name} {size}" for name, size in sizes.items() if size > 1)


def _ranks(settings: Settings, ranks: int) -> str | None:
    replica = _replica(settings)
    if ranks % math.prod(replica.values()) == 0:
        return None
    return f"{_named(replica)} does not divide the number of ranks, {ranks}"


def _batch(settings: Settings, ranks: int) -> str | None:
    whole, micro = settings.global_batch_size, settings.micro_batch_size
    dp = ranks // math.prod(_replica(settings).values())
    if whole is None or micro is None or settings.decrease_batch_size_if_needed:
        return None
    if whole % (micro * dp) == 0:
        return None
    return (
        f"--global-batch-size {whole} is not divisible by --micro-batch-size {micro} x data"
        f" parallelism {dp}"
    )


def _expert_ranks(settings: Settings, ranks: int) -> str | None:
    sizes = {
        "expert-model-parallel-size": settings.expert_model_parallel_size,
        "expert-tensor-parallel-size": (
            settings.expert_tensor_parallel_size or settings.tensor_model_parallel_size
        ),
        "pipeline-model-parallel-size": settings.pipeline_model_parallel_size,
    }
    if ranks % math.prod(sizes.values()) == 0:
        return None
    return f"{_named(sizes)} does not divide the number of ranks, {ranks}"


def _experts(settings: Settings, ranks: int) -> str | None:
    ep, experts = settings.expert_model_parallel_size, settings.experts
    if not experts or experts % ep == 0:
        return None
    return f"--expert-model-parallel-size {ep} does not divide --num-experts {experts}"


def _heads(settings: Settings, ranks: int) -> str | None:
    tp, heads = settings.tensor_model_parallel_size, settings.num_attention_heads
    if heads is None or heads % tp == 0:
        return None
    return f"--tensor-model-parallel-size {tp} does not divide --num-attention-heads {heads}"


def _sequence(settings: Settings, ranks: int) -> str | None:
    sizes = {
        "tensor-model-parallel-size": settings.tensor_model_parallel_size,
        "context-parallel-size": settings.context_parallel_size,
    }
    length = settings.seq_length
    if length is None or length % math.prod(sizes.values()) == 0:
        return None
    return f"{_named(sizes)} does not divide --seq-length {length}"
