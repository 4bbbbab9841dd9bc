"""Megatron's flags on a machine without a GPU: which are chosen, which are refused.

`apply` walks two tables. `CHOICES` holds the flags that have one value that works on the CPU; it is
put in when the user said nothing. `REFUSALS` holds the flags that cannot work there. Both are
decided from the command line alone, before Megatron validates it and before any process group
exists. `cpu` is the runtime these flags run on.
"""

from __future__ import annotations

import argparse
import dataclasses

from megatron_default_moe.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A flag with one value that works on the CPU."""

    flag: str
    value: str | None = None
    """None for a switch."""
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A flag that cannot work on the CPU."""

    flag: str
    reason: str
    """Completes "... does not work without a GPU: ..."."""
    way_out: str | None = None
    """What to do instead; None: leave the flag out."""
    allowed: tuple[str, ...] = ()
    """The values that do work."""
    values: tuple[str, ...] = ()
    """The only values that do not work; empty: all but `allowed`."""


_NO_TE = "Transformer Engine needs a GPU"

CHOICES: tuple[Choice, ...] = (
    Choice(flag="--distributed-backend", value="gloo", reason="NCCL needs GPUs"),
    Choice(flag="--transformer-impl", value="local", reason=_NO_TE),
    Choice(
        flag="--attention-backend", value="unfused", reason="the other kernels are written for GPUs"
    ),
    Choice(flag="--no-persist-layer-norm", reason="the persistent kernel is Apex's"),
    Choice(flag="--no-masked-softmax-fusion", reason="the fused kernel is Apex's"),
    Choice(flag="--no-rope-fusion", reason="the fused kernel is Transformer Engine's"),
    Choice(flag="--no-gradient-accumulation-fusion", reason="the fused kernel is Apex's"),
)

_CONTEXT = "context parallelism is part of Transformer Engine's attention"
_GRAPHS = "there are no CUDA graphs"
_STREAMS = "it overlaps work on CUDA streams"
_NCCL = "it configures NCCL, and the CPU talks over gloo"
_OFFLOAD = "it moves data between GPU and host memory"
_FSDP = "it allocates its shards on CUDA devices"
_NVRX = "nvidia-resiliency-ext works on CUDA devices"
_QUANTISED = "the quantised formats are Transformer Engine's"
_GROUPED = "grouped matrix products are Transformer Engine's"
_ALONG = "leave it out; training differs in speed only"


def _refuse(
    reason: str,
    *flags: str,
    way_out: str | None = None,
    allowed: tuple[str, ...] = (),
    values: tuple[str, ...] = (),
) -> tuple[Refusal, ...]:
    return tuple(
        Refusal(flag=flag, reason=reason, way_out=way_out, allowed=allowed, values=values)
        for flag in flags
    )


REFUSALS: tuple[Refusal, ...] = (
    *_refuse(_CONTEXT, "--context-parallel-size", allowed=("1",)),
    *_refuse(_CONTEXT, "--hierarchical-context-parallel-sizes", "--hybrid-context-parallel"),
    *_refuse(
        "generalised tensor parallelism is Transformer Engine's",
        "--tensor-parallel-num-weight-shards",
        "--expert-tensor-parallel-num-weight-shards",
    ),
    *_refuse(
        _QUANTISED,
        "--fp8-format",
        "--fp4-format",
        "--fp8-param-gather",
        "--fp4-param-gather",
        "--te-precision-config-file",
        way_out="train in --bf16, or on a GPU",
    ),
    *_refuse(_NO_TE, "--te-rng-tracker", "--use-te-activation-func", "--tp-comm-overlap"),
    *_refuse(_NO_TE, "--use-transformer-engine-op-fuser", "--use-kitchen-attention"),
    *_refuse(_NO_TE, "--mla-down-proj-fusion", "--fused-residual-rmsnorm", way_out=_ALONG),
    *_refuse(_NO_TE, "--cross-entropy-fusion-impl", way_out="use native", allowed=("native",)),
    *_refuse(
        "the precision-aware optimizer is Transformer Engine's", "--use-precision-aware-optimizer"
    ),
    *_refuse("Megatron's own attention does not take its shapes", "--multi-latent-attention"),
    *_refuse("the latent projections are Transformer Engine's", "--moe-latent-size"),
    *_refuse(
        _GROUPED,
        "--moe-grouped-gemm",
        "--use-grouped-gemm-for-shared-expert",
        "--use-grouped-gemm-for-dense-mlp",
        way_out="leave it out; the experts then run one after the other",
    ),
    *_refuse(
        "the fused kernel is Transformer Engine's",
        "--moe-permute-fusion",
        "--moe-router-fusion",
        way_out=_ALONG,
    ),
    *_refuse(
        "the flex dispatcher is built on DeepEP and HybridEP, which need GPUs",
        "--moe-token-dispatcher-type",
        way_out="use alltoall or allgather",
        values=("flex",),
    ),
    *_refuse(
        "DeepEP and HybridEP need GPUs",
        "--moe-enable-deepep",
        "--moe-flex-dispatcher-backend",
        way_out="use --moe-token-dispatcher-type alltoall",
    ),
    *_refuse(
        "it is part of the GPU dispatchers",
        "--moe-paged-stash",
        "--moe-expert-rank-capacity-factor",
        way_out="use --moe-expert-capacity-factor for a capacity limit",
    ),
    *_refuse(
        "FlashAttention needs a GPU",
        "--use-flash-attn",
        "--flash-attention-version",
        way_out=_ALONG,
    ),
    *_refuse("torch's LayerNorm has no zero-centred weight", "--apply-layernorm-1p"),
    *_refuse(_GRAPHS, "--cuda-graph-impl", allowed=("none",)),
    *_refuse(_GRAPHS, "--enable-cuda-graph", "--external-cuda-graph", "--optimizer-cuda-graph"),
    *_refuse(_GRAPHS, "--cuda-graph-scope", "--cuda-graph-modules"),
    *_refuse(
        _STREAMS,
        "--overlap-dispatch-backward-with-experts-wgrad",
        "--delay-wgrad-compute",
        "--moe-shared-expert-overlap",
        "--overlap-param-gather-with-optimizer-step",
        way_out=_ALONG,
    ),
    *_refuse(
        "it is built on the fused gradient accumulation of Apex", "--defer-embedding-wgrad-compute"
    ),
    *_refuse(
        _NCCL,
        "--use-nccl-ub",
        "--nccl-communicator-config-path",
        "--use-sharp",
        "--sharp-enabled-group",
        "--high-priority-stream-groups",
        "--pipeline-model-parallel-comm-backend",
        "--use-ring-exchange-p2p",
    ),
    *_refuse(_OFFLOAD, "--cpu-offloading-num-layers", allowed=("0",)),
    *_refuse(_OFFLOAD, "--fine-grained-activation-offloading", "--optimizer-cpu-offload"),
    *_refuse(
        _FSDP,
        "--use-megatron-fsdp",
        "--use-torch-fsdp2",
        way_out="use --use-distributed-optimizer, which shards the optimizer's state",
    ),
    *_refuse(
        "the format belongs to FSDP",
        "--ckpt-format",
        way_out="use torch_dist",
        values=("torch_dcp", "fsdp_dtensor"),
    ),
    *_refuse(_NVRX, "--inprocess-restart", "--enable-ft-package"),
    *_refuse(
        _NVRX,
        "--non-persistent-ckpt-type",
        way_out="use --non-persistent-ckpt-type global",
        values=("local", "in_memory"),
    ),
    *_refuse(
        "the kernels are written for GPUs",
        "--batch-invariant-mode",
        "--flash-decode",
        "--use-fused-weighted-squared-relu",
        "--experimental-attention-variant",
    ),
    *_refuse(
        "it measures a GPU",
        "--gpu-sniff-test-interval",
        "--log-energy",
        "--log-device-memory-used",
        "--record-memory-history",
        "--nvtx-ranges",
    ),
    *_refuse("its rollouts run on GPU inference engines", "--perform-rl-step"),
)

ASYNC_SAVE = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
"""The one combination that saves asynchronously on a CPU."""


def apply(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Put in the flags that the CPU runtime needs, and refuse those that cannot work on it.

    Args:
        parser: Megatron's full parser; says which flags this version has.
        argv: The user's command line, configuration files already expanded.

    Returns:
        The completed command line, and one readable line per flag that was chosen.

    Raises:
        UserError: A flag the user set cannot work on the CPU; names it and the way out.
    """
    given = _given(parser, argv)
    for refusal in REFUSALS:
        if (value := _value(parser, given, refusal.flag)) is not None:
            _check_refusal(refusal, value)
    _check_combinations(parser, given)
    completed = list(argv)
    report = []
    for choice in CHOICES:
        if choice.flag not in parser._option_string_actions:
            continue
        value = _value(parser, given, choice.flag)
        if value is None:
            words = [choice.flag] if choice.value is None else [choice.flag, choice.value]
            completed += words
            report.append(f"{' '.join(words)} ({choice.reason})")
        elif choice.value is not None and value != choice.value:
            raise UserError(
                f"{choice.flag} {value} does not work without a GPU: {choice.reason}; "
                f"use {choice.flag} {choice.value} or leave the flag out"
            )
    return completed, report


def _given(parser: argparse.ArgumentParser, argv: list[str]) -> dict[argparse.Action, str]:
    """What the user set, each with its value as written; a switch has the empty value."""
    given: dict[argparse.Action, str] = {}
    current: argparse.Action | None = None
    for word in argv:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            current = parser._option_string_actions.get(flag)
            if current is not None:
                # The last one wins, as in argparse.
                given[current] = value if equals else ""
        elif current is not None:
            given[current] = f"{given[current]} {word}".strip()
    return given


def _value(
    parser: argparse.ArgumentParser, given: dict[argparse.Action, str], flag: str
) -> str | None:
    """The value the user gave a flag; None if not given, or unknown to this Megatron."""
    action = parser._option_string_actions.get(flag)
    return None if action is None else given.get(action)


def _check_refusal(refusal: Refusal, value: str) -> None:
    if value in refusal.allowed or (refusal.values and value not in refusal.values):
        return
    way_out = refusal.way_out
    if way_out is None:
        alternatives = " or ".join(refusal.allowed)
        way_out = f"use {alternatives} or leave it out" if alternatives else "leave it out"
    written = f"{refusal.flag} {value}".strip()
    raise UserError(f"{written} does not work without a GPU: {refusal.reason}; {way_out}")


def _check_combinations(parser: argparse.ArgumentParser, given: dict[argparse.Action, str]) -> None:
    """What one flag cannot tell alone."""

    def value(flag: str) -> str | None:
        return _value(parser, given, flag)

    for module in (value("--recompute-modules") or "").split():
        if module in ("layernorm", "mla_up_proj", "moe_act"):
            raise UserError(
                f"--recompute-modules {module} does not work without a GPU: discarding an output "
                "is built on Transformer Engine; use core_attn, mlp, moe or shared_experts"
            )
    if value("--profile") is not None and value("--use-pytorch-profiler") is None:
        raise UserError(
            "--profile does not work without a GPU: it drives the CUDA profiler; "
            "add --use-pytorch-profiler"
        )
    if value("--async-save") is not None:
        worker = value("--use-persistent-ckpt-worker") is not None
        shared = value("--async-ckpt-use-cpu-shm") is not None
        if not worker or value("--async-strategy") != "mcore" or shared:
            raise UserError(
                "--async-save works without a GPU in one combination only; "
                f"use exactly {ASYNC_SAVE}, or leave --async-save out"
            )
