"""Step time of Default MoE against stock TopK: ``make bench``.

Starts itself on two gloo ranks (expert parallelism 2), builds both models in the same processes,
and alternates blocks of steps, so that whatever else the machine does meets both. A block's number
is the median of its steps; a pair of blocks gives one ratio; the table shows the median ratio and
its quartiles. Also counted: collectives of one step of each arm, and bytes of state.

Floor: the median ratio is at most 1.02, or 1 lies between the quartiles.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections import Counter
from typing import Any

import arms
import pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = "cpu_overhead.md"
FLOOR = 1.02

SIZES = {
    "quickstart (hidden 128)": "",
    "hidden 512": "--hidden-size 512 --num-attention-heads 8 --moe-ffn-hidden-size 1408"
    " --ffn-hidden-size 1408",
}
COMMON = [
    *("--config", str(ROOT / "examples" / "quickstart.yaml"), "--vocab-size", "2047"),
    *arms.OUTSIDE_OF_THE_LOOP,
]
"""The quickstart's flags, on random tokens; a size overrides some of them."""


def launch(blocks: int, steps: int, out: pathlib.Path) -> None:
    """Run every size on two ranks and write the table."""
    rows = []
    for name in SIZES:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", __file__, "--worker", name),
            *("--blocks", str(blocks), "--steps", str(steps)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
        row = next(line for line in done.stdout.splitlines() if line.startswith("| " + name))
        print(row, flush=True)
        rows.append(row)
    write(rows, blocks, steps, out)


def write(rows: list[str], blocks: int, steps: int, out: pathlib.Path) -> None:
    """Write the results with what is needed to read and repeat them."""
    import torch

    header = [
        "| size | TopK step (ms) | Default step (ms) | ratio, median | quartiles |"
        " ratio of processor time, median | quartiles |"
        " collectives a step | extra state per MoE layer and rank, bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    text = [
        "# Step time of Default MoE against TopK on a CPU",
        "",
        f"Command: `make bench` ({blocks} pairs of blocks of {steps} steps, two gloo ranks with one"
        f" thread each on {os.cpu_count()} cores, expert parallelism 2, fp32). torch"
        f" {torch.__version__}, megatron-core {importlib.metadata.version('megatron-core')}, Python"
        f" {platform.python_version()}. The ratio is that of two neighbouring blocks, so it is not"
        " the quotient of the two columns before it.",
        "",
        *header,
        *rows,
        "",
        f"Floor: median ratio at most {FLOOR}, or 1 between the quartiles.",
    ]
    pairs.write(out / PAGE, text)
    print("\n".join([*header, *rows]), f"\nwritten to {PAGE}")


def collectives(arm: arms.Arm, tokens: Any) -> Counter[str]:
    """Names and numbers of the collectives of one step."""
    import torch

    counted: Counter[str] = Counter()
    names = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    originals = {name: getattr(torch.distributed, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(torch.distributed, name, counting(name))
    arm.step(tokens)
    for name, original in originals.items():
        setattr(torch.distributed, name, original)
    return counted


def state_bytes(arm: arms.Arm) -> int:
    """Bytes of buffers in one MoE layer's router."""
    from megatron_default_moe.layers import optimizer_step

    router = next(iter(optimizer_step.routers(arm.model)))
    return sum(buffer.numel() * buffer.element_size() for buffer in router.buffers())


def work(size: str, blocks: int, steps: int) -> None:
    """Measure one size on this rank; rank 0 prints the row."""
    import torch

    args = arms.start([*COMMON, *SIZES[size].split()])
    built = {"topk": arms.topk(args), "default": arms.default(args)}
    tokens = [arms.random_tokens(args, torch.distributed.get_rank())]
    counts = {name: collectives(arm, tokens) for name, arm in built.items()}
    extra = counts["default"] - counts["topk"]
    assert extra == Counter(all_reduce=1), f"extra collectives: {extra}"
    for arm in built.values():
        arm.block(tokens, 2)
    blocks_of = pairs.alternate(
        list(built), lambda name: built[name].block(tokens, steps), rounds=blocks
    )
    seconds = {name: [one.wall for one in found] for name, found in blocks_of.items()}
    processor = {name: [one.processor for one in found] for name, found in blocks_of.items()}
    if torch.distributed.get_rank() == 0:
        found = pairs.ratio(seconds["default"], seconds["topk"])
        work = pairs.ratio(processor["default"], processor["topk"])
        topk, default = (1e3 * statistics.median(seconds[name]) for name in ("topk", "default"))
        above = found.median > FLOOR and not found.low <= 1 <= found.high
        vectors = 4 * args.num_experts * args.hidden_size
        print(
            f"| {size} | {topk:.1f} | {default:.1f} | {found}{' (above the floor)' * above} |"
            f" {work} |"
            f" {counts['topk'].total()} + {extra.total()} |"
            f" {state_bytes(built['default'])} (vectors 4ED = {vectors}) |",
            flush=True,
        )


def main() -> None:
    """Launch, or be one rank of a launch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks (20)")
    parser.add_argument("--steps", type=int, default=5, help="steps a block (5)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pairs.RESULTS, help="folder of the page"
    )
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.blocks, given.steps)
    else:
        launch(given.blocks, given.steps, given.out)


if __name__ == "__main__":
    main()
