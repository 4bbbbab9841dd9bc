"""Train Megatron's own GPT model, nothing of this package but the CPU runtime in between.

``stock_pretrain.py CASES.json OUT`` under torchrun. The file maps names to command lines; the cases
run one after the other in one launch, because a launch costs ten seconds of imports. Every rank
appends a line per step to ``OUT/<name>.<rank>``: loss, gradient norm and the sum of the norm
weights as hexadecimal floats, and 1 if the step was skipped, else 0. A rank without the loss writes
0 for it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from megatron_default_moe.cpu import flag_choices, runtime

runtime.install()
runtime.use_wheel_dataset_helpers()

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


def logged(original: Callable[..., Any], path: pathlib.Path) -> Callable[..., Any]:
    """Megatron's train_step, writing every step to `path` to the last bit."""

    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        loss, norm = (float(value or 0) for value in (result[0].get("lm loss"), result[5]))
        norms = [
            weight.detach().double().sum()
            for chunk in args[2]
            for name, weight in chunk.named_parameters()
            if "norm" in name
        ]
        words = (loss.hex(), norm.hex(), float(sum(norms)).hex(), str(int(result[1])))
        with path.open("a", encoding="ascii") as file:
            file.write(" ".join(words) + "\n")
        return result

    return train_step


def run(argv: list[str], path: pathlib.Path) -> None:
    """Choose the CPU's flags if there is no GPU, train, and forget the run."""
    if runtime.needed():
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        argv, _ = flag_choices.apply(parser, argv)
    sys.argv[1:] = argv
    args = parse_and_validate_args()
    original = training.train_step
    training.train_step = logged(original, path)
    try:
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as end:  # --exit-interval ends this way
        if end.code:
            raise
    finally:
        training.train_step = original
    torch.distributed.barrier()
    training.destroy_global_state()


def main() -> None:
    """Run every case in this launch."""
    cases, out = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
    # Megatron uses a process group that is already there; a second rendezvous would hang.
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    for name, argv in cases.items():
        run(argv, out / f"{name}.{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
