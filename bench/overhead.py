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
import time
from collections import Counter
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "cpu_overhead.md"
FLOOR = 1.02

SIZES = {
    "quickstart (hidden 128)": "",
    "hidden 512": "--hidden-size 512 --num-attention-heads 8 --moe-ffn-hidden-size 1408"
    " --ffn-hidden-size 1408",
}
COMMON = [
    *("--config", str(ROOT / "examples" / "quickstart.yaml"), "--mock-data"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "2047"),
    # A step here is outside of Megatron's loop, in which it may run again.
    *("--no-check-for-nan-in-loss-and-grad", "--rerun-mode", "disabled"),
]
"""The quickstart's flags, on random tokens; a size overrides some of them."""


def launch(blocks: int, steps: int) -> None:
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
    write(rows, blocks, steps)


def write(rows: list[str], blocks: int, steps: int) -> None:
    """Write the results with what is needed to read and repeat them."""
    import torch

    header = [
        "| size | TopK step (ms) | Default step (ms) | ratio, median | quartiles |"
        " collectives a step | extra state per MoE layer and rank, bytes |",
        "|---|---|---|---|---|---|---|",
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
        "",
    ]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("\n".join(text))
    print("\n".join([*header, *rows]), f"\nwritten to {RESULTS.relative_to(ROOT)}")


class Arm:
    """One model with its optimizer, and one training step of it."""

    def __init__(self, args: Any, model_config: Any) -> None:
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        container = pretrain_cfg_container_from_args(args, model_config)
        builder = model_config.get_builder_cls()(model_config)
        self.model = builder.build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            ddp_config=container.ddp,
            data_parallel_random_init=False,
        )
        self.optimizer = get_megatron_optimizer(container.optimizer, self.model)
        config = model_config.transformer
        config.grad_scale_func = self.optimizer.scale_loss
        if config.finalize_model_grads_func is None:
            from megatron.core.distributed import finalize_model_grads

            config.finalize_model_grads_func = finalize_model_grads
        self.args = args

    def step(self, tokens: Any) -> None:
        """Forward, backward, optimizer, commit."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_default_moe import commit

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter([tokens]),
            model=self.model,
            num_microbatches=1,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=False,
        )
        taken, _, _ = self.optimizer.step()
        commit(self.model, taken)


def _forward(data_iterator: Any, model: Any) -> Any:
    import torch

    tokens = next(data_iterator)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)

    def loss(output: Any) -> Any:
        return output.float().sum(), torch.tensor(output.numel(), dtype=torch.int), {}

    return model(tokens, positions, None, labels=tokens.roll(-1, 1)), loss


def build(size: str) -> tuple[Any, dict[str, Arm]]:
    """Both arms, from the same flags and seeds."""
    from megatron_default_moe import cpu

    cpu.install()
    # Through this name, which the CPU runtime replaces.
    from megatron.training import training
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_default_moe import cpu_flags, pretrain
    from megatron_default_moe.config import options_from_args
    from megatron_default_moe.flags import expand_config

    parser = pretrain.build_parser()
    argv = expand_config(parser, [*COMMON, *SIZES[size].split()])
    argv, _ = cpu_flags.apply(parser, argv)
    args = pretrain.megatron_args(argv)
    training.initialize_megatron()
    options = options_from_args(args)
    return args, {
        "topk": Arm(args, gpt_config_from_args(args)),
        "default": Arm(args, pretrain.build_model_config(args, options)),
    }


def collectives(arm: Arm, tokens: Any) -> Counter[str]:
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


def state_bytes(arm: Arm) -> int:
    """Bytes of buffers in one MoE layer's router."""
    from megatron_default_moe import default_vectors

    router = next(iter(default_vectors.routers(arm.model)))
    return sum(buffer.numel() * buffer.element_size() for buffer in router.buffers())


def block(arm: Arm, tokens: Any, steps: int) -> float:
    """Median seconds of the steps of one block, both ranks starting together."""
    import torch

    times = []
    for _ in range(steps):
        torch.distributed.barrier()
        start = time.perf_counter()
        arm.step(tokens)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def work(size: str, blocks: int, steps: int) -> None:
    """Measure one size on this rank; rank 0 prints the row."""
    import torch

    args, arms = build(size)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    shape = (args.micro_batch_size, args.seq_length)
    tokens = torch.randint(0, args.padded_vocab_size, shape, generator=generator)
    counts = {name: collectives(arm, tokens) for name, arm in arms.items()}
    extra = counts["default"] - counts["topk"]
    assert extra == Counter(all_reduce=1), f"extra collectives: {extra}"
    for arm in arms.values():
        block(arm, tokens, 2)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(blocks):
        # The arm that goes first alternates, too.
        for name in list(arms)[:: 1 if number % 2 else -1]:
            seconds[name].append(block(arms[name], tokens, steps))
    if torch.distributed.get_rank() == 0:
        ratios = [d / t for d, t in zip(seconds["default"], seconds["topk"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        topk, default = (1e3 * statistics.median(seconds[name]) for name in ("topk", "default"))
        verdict = "" if middle <= FLOOR or low <= 1 <= high else " (above the floor)"
        vectors = 4 * args.num_experts * args.hidden_size
        print(
            f"| {size} | {topk:.1f} | {default:.1f} | {middle:.4f}{verdict} |"
            f" {low:.4f} to {high:.4f} | {counts['topk'].total()} + {extra.total()} |"
            f" {state_bytes(arms['default'])} (vectors 4ED = {vectors}) |",
            flush=True,
        )


def main() -> None:
    """Launch, or be one rank of a launch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks (20)")
    parser.add_argument("--steps", type=int, default=5, help="steps a block (5)")
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.blocks, given.steps)
    else:
        launch(given.blocks, given.steps)


if __name__ == "__main__":
    main()
