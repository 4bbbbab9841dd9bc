"""Train Megatron's own GPT model, nothing of this package but the CPU runtime in between.

Launched with torchrun by `test_cpu_runtime`. Takes Megatron's flags, and with ``LOSS_LOG`` in the
environment the last rank appends one line per step to that file: iteration, loss and gradient norm
as hexadecimal floats, and whether the step was skipped.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from megatron_default_moe import cpu, cpu_flags

cpu.install()
cpu.use_wheel_dataset_helpers()

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import get_args, get_tokenizer, pretrain, training  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import (  # noqa: E402
    add_megatron_arguments,
    parse_and_validate_args,
)


def datasets(samples: list[int], vp_stage: int | None = None) -> Any:
    """Megatron's mock data set on the ranks that read data."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        split="9,1,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=get_tokenizer(),
    )
    reads = mpu.get_tensor_model_parallel_rank() == 0
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: reads, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def batch(data: Iterator[dict[str, torch.Tensor]] | None) -> list[torch.Tensor]:
    """Tokens, labels, loss mask and positions, read on tensor-parallel rank 0 and sent on."""
    args = get_args()
    shape = (4, args.micro_batch_size, args.seq_length)
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data is not None
        item = next(data)
        names = ("tokens", "labels", "loss_mask", "position_ids")
        packed = torch.stack([item[name].cuda(non_blocking=True).double() for name in names])
    else:
        packed = torch.empty(shape, dtype=torch.float64, device="cuda")
    group = mpu.get_tensor_model_parallel_group()
    torch.distributed.broadcast(packed, mpu.get_tensor_model_parallel_src_rank(), group=group)
    tokens, labels, mask, positions = packed
    return [tokens.long(), labels.long(), mask.float(), positions.long()]


def loss_function(mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, Any, Any]:
    """The sum of the token losses, their number, and both for the log."""
    loss = (output.float().view(-1) * mask.view(-1)).sum()
    tokens = mask.sum().to(torch.int)
    logged = torch.cat([loss.detach().view(1), tokens.view(1)])
    return loss, tokens, {"lm loss": logged}


def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One micro-batch through the model."""
    tokens, labels, mask, positions = batch(data)
    output = model(tokens, positions, None, labels=labels)
    return output, functools.partial(loss_function, mask)


def log_steps(path: str) -> None:
    """Make the last rank write every training step to `path`, to the last bit."""
    original = training.train_step

    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        losses, skipped, norm = result[0], result[1], result[5]
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            loss = float(losses["lm loss"]).hex() if losses else "none"
            iteration = kwargs.get("iteration", get_args().curr_iteration)
            with open(path, "a", encoding="ascii") as file:
                file.write(f"{iteration} {loss} {float(norm or 0).hex()} {int(skipped)}\n")
        return result

    training.train_step = train_step


def main() -> None:
    """Choose the CPU's flags if there is no GPU, then train."""
    if cpu.needed():
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        sys.argv[1:], _ = cpu_flags.apply(parser, sys.argv[1:])
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    if path := os.environ.get("LOSS_LOG"):
        log_steps(path)
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
