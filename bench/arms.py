"""Models that are trained beside each other in one process, on Megatron's own builder and schedule.

Shared by the benches of whole steps. Every arm starts from the same weights.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

OUTSIDE_OF_THE_LOOP = (
    *("--mock-data", "--tokenizer-type", "NullTokenizer"),
    # A step here is outside of Megatron's loop, in which it may run again.
    *("--no-check-for-nan-in-loss-and-grad", "--rerun-mode", "disabled"),
)
"""Flags of every bench: random tokens, steps that are run once."""


def start(argv: Sequence[str]) -> Any:
    """Parse and validate as training does, and form the process groups; returns the arguments."""
    from megatron_default_moe import pretrain

    args, _ = pretrain.prepare(list(argv))
    # Imported here and through this name, which the CPU runtime replaces.
    from megatron.training import training

    training.initialize_megatron()
    return args


class Seconds(NamedTuple):
    """What one step of a block takes."""

    wall: float
    processor: float
    """Of this process, all its threads: on a shared machine it varies less than the clock."""


class Arm:
    """One model with its optimizer, and one training step of it."""

    def __init__(self, args: Any, model_config: Any) -> None:
        import torch
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        torch.manual_seed(args.seed)
        model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
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

    def step(self, micro_batches: Sequence[Any]) -> None:
        """Forward, backward, optimizer, commit."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_default_moe import commit

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=False,
        )
        taken, _, _ = self.optimizer.step()
        commit(self.model, taken)

    def block(self, micro_batches: Sequence[Any], steps: int) -> Seconds:
        """Median seconds of the steps of one block, all ranks starting together."""
        import torch

        times, processor = [], []
        for _ in range(steps):
            torch.distributed.barrier()
            torch.cuda.synchronize()
            start, used = time.perf_counter(), time.process_time()
            self.step(micro_batches)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
        return Seconds(statistics.median(times), statistics.median(processor))


def forward(data_iterator: Any, model: Any) -> Any:
    """Megatron's ``forward_step_func``: one micro-batch, and the function from output to loss."""
    import torch

    tokens = next(data_iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def loss(output: Any) -> Any:
        # Filled on the device: a copy from the host would wait for it.
        count = torch.full((), output.numel(), dtype=torch.int, device=output.device)
        return output.float().sum(), count, {}

    return model(tokens, positions, None, labels=tokens.roll(-1, 1)), loss


def topk(args: Any) -> Arm:
    """Stock Megatron."""
    from megatron.training.argument_utils import gpt_config_from_args

    return Arm(args, gpt_config_from_args(args))


def default(args: Any, **changes: Any) -> Arm:
    """Default MoE with the options of the arguments; `changes` are fields of theirs."""
    from megatron_default_moe import pretrain
    from megatron_default_moe.options.config import options_from_args

    options = dataclasses.replace(options_from_args(args), **changes)
    return Arm(args, pretrain.build_model_config(args, options))


def random_tokens(args: Any, seed: int) -> Any:
    """[micro-batch, sequence] tokens on the device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (args.micro_batch_size, args.seq_length)
    return torch.randint(0, args.padded_vocab_size, shape, generator=generator).cuda()
