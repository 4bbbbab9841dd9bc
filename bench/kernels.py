"""The fused kernels against the memory's bandwidth, and a whole MoE layer against TopK, on a GPU.

    PYTHONPATH=. python bench/kernels.py            measure; needs a CUDA device
    PYTHONPATH=. python bench/kernels.py --bytes    bytes moved at every shape; needs none

A kernel's floor is the bytes it has to move over the bandwidth of a copy measured in the same run
(L2 cache flushed before every launch); its fraction is floor over median time. A layer (bf16,
forward and backward, one rank) is timed for TopK and Default in alternating blocks in the same
process: the median ratio of neighbouring blocks, with quartiles. The results go to
docs/results/gpu_kernels.md (``--out`` names another folder), shape by shape.
"""

import argparse
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pairs
import torch

PAGE = "gpu_kernels.md"
NEEDS_DEVICE = "bench/kernels.py needs a CUDA device, and there is none (--bytes needs none)"
FAILED = "failed"


class Shape(NamedTuple):
    """One MoE layer on one rank that holds all its experts."""

    name: str
    experts: int
    topk: int
    width: int
    ffn: int
    tokens: int = 8192


SHAPES = (
    Shape("1.96B 8c1", 8, 1, 1024, 2816),
    Shape("1.96B 32c4", 32, 4, 1024, 704),
    Shape("7.33B 8c1", 8, 1, 2048, 5632),
    Shape("DeepSeek-like", 256, 8, 7168, 2048),
)


def bytes_moved(shape: Shape) -> dict[str, int]:
    """Bytes each kernel has to read and write in bf16, with float32 logits and probabilities.

    [T, E] inputs are logits and probabilities (4 bytes each).
    """
    rows = shape.tokens * shape.topk
    output, routing = shape.tokens * shape.width, shape.tokens * shape.experts
    vectors = 4 * shape.experts * shape.width
    return {
        "statistics": 2 * rows * shape.width + 4 * rows + 4 * routing + 2 * vectors,
        "term forward": 4 * output + 8 * routing + vectors,
        "term backward": 2 * output + 12 * routing + vectors,
    }


def partial_bytes(shape: Shape) -> int:
    """Bytes of partial sums the statistics kernel at most writes and reads again."""
    from megatron_default_moe.kernels import sums

    _, chunks = sums.row_chunks(shape.tokens * shape.topk, shape.width)
    return 8 * (chunks + shape.experts) * shape.width


def kernel_calls(shape: Shape) -> dict[str, Callable[[], Any]]:
    """The three launches on random inputs of a shape, uneven loads included."""
    from megatron_default_moe.kernels import sums, term

    torch.manual_seed(0)
    tokens, experts, width = shape.tokens, shape.experts, shape.width
    scores_TE = torch.randn(tokens, experts, device="cuda") + torch.randn(experts, device="cuda")
    dense_TE = scores_TE.softmax(-1)
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool, device="cuda")
    map_TE.scatter_(1, dense_TE.topk(shape.topk).indices, True)
    probs_TE = torch.where(map_TE, dense_TE, 0)
    rows_RD = torch.randn(tokens * shape.topk, width, device="cuda").bfloat16()
    probs_R = torch.rand(len(rows_RD), device="cuda") + 0.1
    sizes = [(experts, width), (experts,), (experts,), (1,)]
    out = sums.StatisticsOut(*(torch.zeros(size, device="cuda") for size in sizes))
    tickets = torch.zeros(sums.num_tickets(experts, width), dtype=torch.int32, device="cuda")
    counts_e = map_TE.sum(0)
    output_TD = torch.randn(tokens, width, device="cuda").bfloat16()
    vectors_ED = torch.randn(experts, width, device="cuda")
    routed = (scores_TE, probs_TE, vectors_ED)
    return {
        "statistics": lambda: sums.add_statistics(
            rows_RD, counts_e, probs_R, probs_TE, "router", tickets, out
        ),
        "term forward": lambda: term.add_default_term(output_TD, *routed, softmax_scale=1.0),
        "term backward": lambda: term.scores_gradient(output_TD, *routed, 1.0),
    }


def copy_bandwidth() -> float:
    """Bytes a second of a device copy of 1 GiB, read and write counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * source.numel() / (1e-3 * median_ms(lambda: target.copy_(source)))


def median_ms(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call on the device, its cache flushed before."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=100, rep=500, return_mode="median"))


def kernel_rows(shape: Shape, bandwidth: float) -> Iterator[str]:
    """Rows of the table of kernels."""
    moved = bytes_moved(shape)
    for name, call in kernel_calls(shape).items():
        floor, taken = 1e6 * moved[name] / bandwidth, 1e3 * median_ms(call)
        yield (
            f"| {shape.name} | {name} | {moved[name] / 1e6:.1f} | {floor:.1f} | {taken:.1f} |"
            f" {floor / taken:.2f} |"
        )


def build_layer(shape: Shape, gradient: str) -> Any:
    """One MoE layer in bf16, ``topk`` stock Megatron's; grouped GEMM with Transformer Engine."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_default_moe import RouterGradientConfig
    from megatron_default_moe.loop.model import attach, with_default_moe

    grouped = gpt_layer_specs.HAVE_TE
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.width,
        num_attention_heads=16,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_ffn_hidden_size=shape.ffn,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=grouped,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    if grouped:
        whole = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(shape.experts, True)
    else:
        whole = gpt_layer_specs.get_gpt_layer_local_spec(shape.experts, False)
    spec = whole.submodules.mlp
    if gradient == "default":
        options = RouterGradientConfig(kernels=True)
        attach(config, options)
        spec = with_default_moe(spec, options)
    layer = spec(config=config)
    layer.set_layer_number(1)
    return layer.to(torch.cuda.current_device()).bfloat16().train()


def layer_step(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
    """Forward and backward of one layer."""
    layer(x)[0].backward(grad)
    for parameter in layer.parameters():
        parameter.grad = None


def layer_rows(shape: Shape, blocks: int, steps: int, until: float) -> Iterator[str]:
    """Row of the table of layers."""
    layers = {name: build_layer(shape, name) for name in ("topk", "default")}
    x = torch.randn(shape.tokens, 1, shape.width, device="cuda").bfloat16().requires_grad_()
    grad = torch.randn_like(x)

    def block(name: str) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            layer_step(layers[name], x, grad)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / steps

    for _ in range(2):
        for name in layers:
            block(name)
    times = pairs.alternate(list(layers), block, rounds=blocks, until=until)
    topk, default = (statistics.median(times[name]) for name in ("topk", "default"))
    router = type(layers["default"].router).__name__
    yield (
        f"| {shape.name} | {topk:.3f} | {default:.3f} |"
        f" {pairs.ratio(times['default'], times['topk'])} | {len(times['topk'])} | {router} |"
    )


def start_one_rank() -> None:
    """Megatron's process groups on one rank."""
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def bytes_table() -> list[str]:
    """What moves at every shape, in MB."""
    rows = [
        "| shape | tokens | statistics (partial sums besides) | term forward | term backward |"
        " sum |",
        "|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        sums, forward, backward = (n / 1e6 for n in bytes_moved(shape).values())
        rows.append(
            f"| {shape.name} | {shape.tokens} | {sums:.1f} ({partial_bytes(shape) / 1e6:.1f}) |"
            f" {forward:.1f} | {backward:.1f} | {sums + forward + backward:.1f} |"
        )
    return rows


def or_failure(shape: Shape, rows: Iterator[str]) -> Iterator[str]:
    """The rows up to a failure, which becomes a row: it costs no other number."""
    try:
        yield from rows
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")
        yield f"| {shape.name} | {FAILED}: {reason} |"


def measure(blocks: int, steps: int, seconds: float, out: pathlib.Path) -> bool:
    """Measure everything, print it, write it down; whether all went well."""
    begun = time.monotonic()
    start_one_rank()
    bandwidth = copy_bandwidth()
    kernels = [
        "| shape | kernel | MB moved | floor, us | median, us | fraction of the floor |",
        "|---|---|---|---|---|---|",
    ]
    layers = [
        "| shape | TopK layer, ms | Default layer, ms | ratio, median | quartiles | pairs |"
        " router |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, shape in enumerate(SHAPES, start=1):
        until = begun + seconds * number / len(SHAPES)
        kernels += or_failure(shape, kernel_rows(shape, bandwidth))
        layers += or_failure(shape, layer_rows(shape, blocks, steps, until))
        torch.cuda.empty_cache()
        print(f"{kernels[-1]}\n{layers[-1]}", flush=True)
        text = [
            "# The fused kernels and a whole MoE layer on a GPU",
            "",
            f"Command: `PYTHONPATH=. python bench/kernels.py` (at most {blocks} pairs of blocks of"
            f" {steps} forward and backward passes). {pairs.versions()} bf16, one rank,"
            f" {SHAPES[0].tokens} tokens. A copy moves {bandwidth / 1e12:.2f} TB/s in this run.",
            "",
            *kernels,
            "",
            *layers,
        ]
        pairs.write(out / PAGE, text)
    print(f"written to {PAGE}")
    return not any(FAILED in row for row in (*kernels, *layers))


def main() -> None:
    """Measure, or print what moves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", action="store_true", help="only print the bytes moved")
    parser.add_argument("--blocks", type=int, default=30, help="pairs of blocks (30)")
    parser.add_argument("--steps", type=int, default=20, help="passes a block (20)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no pair of blocks after these"
    )
    pairs.add_out(parser)
    given = parser.parse_args()
    if given.bytes:
        print("\n".join(bytes_table()))
    elif not torch.cuda.is_available():
        print(NEEDS_DEVICE, file=sys.stderr)
        sys.exit(2)
    elif not measure(given.blocks, given.steps, given.seconds, given.out):
        sys.exit(1)


if __name__ == "__main__":
    main()
