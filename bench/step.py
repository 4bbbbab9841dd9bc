"""A whole training step of Default MoE against stock TopK on one GPU.

    PYTHONPATH=. python bench/step.py           measure; needs a CUDA device
    PYTHONPATH=. python bench/step.py --tiny    the same at a tiny size, on any machine

Layers of the models in ``examples/``, at their widths: Megatron's builder, its schedule and its
optimizer, bf16, with Transformer Engine's grouped experts where that is installed. Layers and
vocabulary are cut alike until all ways of training fit one GPU of 80 GB beside each other, so that
layers, embedding and output keep their shares of a step. Each model has a process of its own, in
which TopK, Default, and Default with the fused kernels take alternating blocks of steps. The
learning rate is zero: all keep the weights they started from, which are the same. The routing is
the same in the first layer, and nearly so in the next ones, whose input the default vectors change.
The results go to docs/results/gpu_step.md, model by model.
"""

import argparse
import importlib.util
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import arms
import pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = "gpu_step.md"
NEEDS_DEVICE = "bench/step.py needs a CUDA device, and there is none (--tiny needs none)"


class Shape(NamedTuple):
    """A model of ``examples/``, cut to one GPU."""

    name: str
    config: str
    layers: int
    of: int
    """Layers of the whole model."""
    vocabulary: int
    """Of the whole model."""
    micro_batch: int
    flags: str = ""
    needs_te: bool = False
    goal: float | None = None
    """Of the ratio."""


SHAPES = (
    Shape("1.96B 8c1", "1.96b-8c1", 8, 24, 128256, 8),
    Shape("1.96B 32c4", "1.96b-32c4", 8, 24, 128256, 4),
    Shape("7.33B 8c1", "7.33b-8c1", 3, 24, 128256, 4, goal=1.002),
    # The whole width holds 203 GB of state a layer; these are DeepSeek-V2-Lite's sizes.
    Shape(
        "DeepSeek-like",
        *("deepseek-v3-like", 2, 27, 102400, 2),
        "--hidden-size 2048 --num-attention-heads 16 --moe-ffn-hidden-size 1408 --num-experts 64"
        " --moe-shared-expert-intermediate-size 2816",
        needs_te=True,
    ),
)
MICRO_BATCHES = 2
TINY = (
    "--hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 96 --moe-ffn-hidden-size 96"
    " --num-layers 2 --seq-length 32 --max-position-embeddings 32 --vocab-size 255"
    " --micro-batch-size 2 --global-batch-size 4"
)

ONE_GPU = frozenset(
    "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --mtp-num-layers"
    " --mtp-loss-scaling-factor --recompute-granularity --recompute-modules"
    " --overlap-grad-reduce --overlap-param-gather --use-distributed-optimizer"
    " --dist-ckpt-optim-fully-reshardable".split()
)
"""Flags of the examples that have no place here: of other layouts, or to save memory."""
TE_ONLY = frozenset("--transformer-impl --moe-grouped-gemm --moe-permute-fusion".split())


def without(argv: Iterable[str], flags: frozenset[str]) -> list[str]:
    """Leave out flags, with their values."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept


def command_line(shape: Shape, te: bool, tiny: bool = False) -> list[str]:
    """Megatron's flags of a model on one GPU; Megatron must be ready to be imported."""
    from megatron_default_moe.options.flags import expand_config
    from megatron_default_moe.pretrain import build_parser

    config = ROOT / "examples" / f"{shape.config}.yaml"
    argv = without(expand_config(build_parser(), ["--config", str(config)]), ONE_GPU)
    argv += [
        *(f"--num-layers {shape.layers} --moe-layer-freq 1 --train-iters 9".split()),
        *(f"--vocab-size {shape.vocabulary * shape.layers // shape.of}".split()),
        *(f"--micro-batch-size {shape.micro_batch}".split()),
        *(f"--global-batch-size {MICRO_BATCHES * shape.micro_batch}".split()),
        *("--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1".split()),
        *("--expert-model-parallel-size 1 --lr 0 --min-lr 0 --lr-warmup-iters 0".split()),
        *(*arms.OUTSIDE_OF_THE_LOOP, *shape.flags.split(), *(TINY.split() if tiny else ())),
    ]
    return argv if te else without(argv, TE_ONLY)


def chosen_for_device(te: bool) -> list[str]:
    """Flags without which Megatron asks for libraries that this GPU machine does not have."""
    from megatron_default_moe.cpu import flag_choices, runtime

    if runtime.needed():
        return []  # the entry chooses them itself
    fusion = "--no-gradient-accumulation-fusion"
    if te:
        return [] if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") else [fusion]
    words = [(choice.flag, choice.value) for choice in flag_choices.CHOICES]
    return [word for pair in words if pair[0] != "--distributed-backend" for word in pair if word]


def launches_if_counted(arm: arms.Arm, tokens: Any) -> list[int]:
    """:func:`launches`; zeros where the profiler fails, which must not cost the times."""
    try:
        return launches(arm, tokens)
    except Exception as error:
        print(f"no launches were counted: {error}", flush=True)
        return [0, 0]


def launches(arm: arms.Arm, tokens: Any) -> list[int]:
    """What one micro-batch starts on the device, forward and backward; see :func:`counted`."""

    def forward() -> Any:
        output, loss = arms.forward(iter([tokens]), arm.model[0])
        return loss(output)[0]

    loss, forward_count = counted(forward)
    _, backward_count = counted(loss.backward)
    return [forward_count, backward_count]


def counted(call: Callable[[], Any]) -> tuple[Any, int]:
    """Result of a call, and how many kernels and copies it starts on the device.

    Without a device: how many operators it calls, those that copy nothing included.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        result = call()
        torch.cuda.synchronize()
    if on_gpu:
        return result, sum(event.device_type == DeviceType.CUDA for event in found.events())
    operators = [event for event in found.events() if event.name.startswith("aten::")]
    return result, sum(not event.cpu_children for event in operators)


def work(shape: Shape, tiny: bool, rounds: int, steps: int, until: float) -> None:
    """Measure one model in this process; print its rows."""
    import torch

    from megatron_default_moe import RouterGradientConfig
    from megatron_default_moe.cpu import runtime
    from megatron_default_moe.estimators import registry

    runtime.install()
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    if shape.needs_te and not HAVE_TE:
        print(f"| {shape.name} | not measured: it needs Transformer Engine |")
        return
    args = arms.start([*command_line(shape, HAVE_TE, tiny), *chosen_for_device(HAVE_TE)])
    built = {"TopK": arms.topk(args), "Default": arms.default(args)}
    if registry.uses_kernels(RouterGradientConfig(kernels=True)):
        built["Default, kernels"] = arms.default(args, kernels=True)
    tokens = [arms.random_tokens(args, seed) for seed in range(MICRO_BATCHES)]
    for arm in built.values():
        arm.block(tokens, 2)
    seconds = pairs.alternate(
        list(built), lambda name: built[name].block(tokens, steps).wall, rounds, until
    )
    counts = {name: launches_if_counted(arm, tokens[0]) for name, arm in built.items()}
    rows = table(shape, args, seconds, counts)
    if torch.cuda.is_available():
        rows.append(f"peak memory of all: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if len(built) == 2:
        rows.append("Default, kernels | not measured: there are none for this device")
    for row in rows:
        print(f"| {shape.name} | {row} |", flush=True)


def table(
    shape: Shape, args: Any, seconds: dict[str, list[float]], counts: dict[str, list[int]]
) -> list[str]:
    """Rows of one model without its name: TopK's first, the others with their ratios to it."""
    rows = []
    tokens = args.global_batch_size * args.seq_length
    for name, taken in seconds.items():
        step = statistics.median(taken)
        row = f"{name} | {args.num_layers} of {shape.of} | {1e3 * step:.2f} | {tokens / step:,.0f}"
        if name != "TopK":
            row += f" | {pairs.ratio(taken, seconds['TopK'])} | {shape.goal or ''} | {len(taken)}"
            row += f" | {extra(counts[name], counts['TopK'], args.num_layers)}"
        rows.append(row)
    return rows


def extra(counts: Sequence[int], stock: Sequence[int], layers: int) -> str:
    """Launches of a MoE layer beyond the stock one's, forward + backward."""
    if 0 in (*counts, *stock):
        return "not measured: the profiler saw none"
    return " + ".join(f"{(a - b) / layers:g}" for a, b in zip(counts, stock, strict=True))


def launch(given: argparse.Namespace) -> bool:
    """Measure the models one after the other, each in its process; whether all went well."""
    shapes = [shape for shape in SHAPES if given.shape in (None, shape.name)]
    rows, failed, end = [], False, time.monotonic() + given.seconds
    for number, shape in enumerate(shapes):
        share = (end - time.monotonic()) / (len(shapes) - number)
        # What comes after the last round, and a last round that began just in time, take a while.
        command = [
            *(sys.executable, __file__, "--worker", shape.name, "--seconds", str(0.8 * share)),
            *("--rounds", str(given.rounds), "--steps", str(given.steps)),
            *(["--tiny"] if given.tiny else []),
        ]
        code, output = bounded(command, share)
        found = [line for line in output.splitlines() if line.startswith(f"| {shape.name} |")]
        if code:
            failed = True
            found.append(f"| {shape.name} | {reason(code, output)} |")
        rows += found
        print("\n".join(found), flush=True)
        pairs.write(given.out / PAGE, page(rows, given))
    print(f"written to {PAGE}")
    return not failed


def bounded(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Exit code and output of a command; one that takes too long is ended, with code 124."""
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": str(ROOT)}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=None if math.isinf(seconds) else max(seconds, 1.0),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return 124, (error.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def reason(code: int, output: str) -> str:
    """One line on a command that failed: its last one."""
    if code == 124:
        return "not measured: out of time"
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    return f"failed (exit code {code}): {' '.join(last.split())[:200]}".replace("|", "/")


def page(rows: Sequence[str], given: argparse.Namespace) -> list[str]:
    """The results with what is needed to read and repeat them."""
    size = (
        "a tiny size, which says nothing about speed" if given.tiny else "the widths of the models"
    )
    return [
        "# Step time of Default MoE against TopK on one GPU",
        "",
        f"Command: `PYTHONPATH=. python bench/step.py{' --tiny' * given.tiny}` (at most"
        f" {given.rounds} rounds of blocks of {given.steps} steps, each of {MICRO_BATCHES}"
        f" micro-batches), at {size}. {pairs.versions()} bf16, forward, backward and optimizer;"
        " every layer is a MoE layer, the vocabulary is cut as the layers are. The ratio is that of"
        " neighbouring blocks. Launches are those of a MoE layer beyond the stock one's, copies"
        " included (operators where there is no device); the goal is at most 2 + 2.",
        "",
        "| model | router | layers | step, ms | tokens/s | ratio to TopK, median | quartiles |"
        " goal | blocks | launches, forward + backward |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    """Launch, or be the process of one model."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU trains")
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], help="only this one")
    parser.add_argument("--rounds", type=int, default=40, help="blocks of each router (40)")
    parser.add_argument("--steps", type=int, default=3, help="steps a block (3)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all models together")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    pairs.add_out(parser)
    given = parser.parse_args()
    if given.worker:
        (shape,) = (shape for shape in SHAPES if shape.name == given.worker)
        work(shape, given.tiny, given.rounds, given.steps, begun + given.seconds)
        return
    import torch

    if not (given.tiny or torch.cuda.is_available()):
        print(NEEDS_DEVICE, file=sys.stderr)
        sys.exit(2)
    sys.exit(not launch(given))


if __name__ == "__main__":
    main()
