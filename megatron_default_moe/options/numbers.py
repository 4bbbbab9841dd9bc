"""Numbers that Megatron divides by, counts up to or builds from: the least that each may be.

Megatron takes them as they come. With less it divides by zero after the first step or after the
last one, counts without an end, or trains another model than was asked for. The training entry and
a plan ask this table before Megatron sees the arguments.
"""

import argparse
import dataclasses
from typing import Any

from megatron_default_moe.errors import UserError


@dataclasses.dataclass(frozen=True)
class Least:
    """The least value of some flags."""

    names: tuple[str, ...]
    least: int
    otherwise: str
    """What Megatron does with less."""
    way_out: str = ""
    """What to do instead, if not just to take a larger value."""


_OF_THE_MODEL = "Megatron divides by it, or builds nothing from it"

LEAST = (
    Least(
        (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "context_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
        ),
        1,
        "Megatron divides the ranks and layers by it",
    ),
    Least(
        (
            "micro_batch_size",
            "global_batch_size",
            "eval_micro_batch_size",
            "eval_global_batch_size",
        ),
        1,
        "Megatron divides by it",
    ),
    Least(
        (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "seq_length",
            "max_position_embeddings",
            "vocab_size",
            "make_vocab_size_divisible_by",
            "padded_vocab_size",
        ),
        1,
        _OF_THE_MODEL,
    ),
    Least(("num_experts", "moe_ffn_hidden_size"), 1, _OF_THE_MODEL),
    Least(("moe_router_topk",), 1, "no token would reach an expert"),
    Least(
        ("train_iters", "train_samples"),
        1,
        "Megatron would end without a step",
        "for evaluation alone there is --skip-train",
    ),
    Least(("log_interval", "tensorboard_log_interval"), 1, "Megatron divides by it at every step"),
    Least(
        ("eval_interval",),
        1,
        "Megatron divides by it",
        "leave it out to evaluate at the end of training alone",
    ),
    Least(
        ("save_interval", "save_retain_interval"),
        1,
        "Megatron divides by it, after the last step too",
    ),
    Least(
        (
            "log_memory_interval",
            "check_weight_hash_across_dp_replicas_interval",
            "gpu_sniff_test_interval",
            "adlr_autoresume_interval",
            "save_params_interval",
            "save_activations_interval",
            "save_tokens_per_expert_interval",
            "save_wgrads_interval",
            "save_dgrads_interval",
        ),
        1,
        "Megatron divides by it",
        "leave it out if it is not wanted",
    ),
    Least(
        ("seed",),
        1,
        "Megatron raises after the processes have met, and NumPy takes no negative one",
    ),
    Least(("eval_iters",), 0, "Megatron would ask its data for less than nothing"),
    Least(
        (
            "num_workers",
            "start_eval_at_iter",
            "manual_gc_interval",
            "exit_interval",
            "train_sync_interval",
            "non_persistent_save_interval",
        ),
        0,
        "it is a count",
    ),
    Least(
        (
            "distributed_timeout_minutes",
            "num_dataset_builder_threads",
            "dist_ckpt_workers",
            "num_distributed_optimizer_instances",
        ),
        1,
        "nothing is done in less",
    ),
)
"""Every number with a least value. A flag that this Megatron does not have is skipped."""

_LARGEST_SEED = 2**32 - 1000 * 1000
"""NumPy's seeds have 32 bits; Megatron adds a few hundred of each rank's place to it."""


def refuse_impossible(args: argparse.Namespace) -> None:
    """Refuse a number with which no run can work.

    Args:
        args: Megatron's arguments, parsed and not yet validated; for a training run or a plan.

    Raises:
        UserError: with the flag, what Megatron would do, and the way out.
    """
    for rule in LEAST:
        for name in rule.names:
            value = getattr(args, name, None)
            if value is not None and value < rule.least:
                end = f"; {rule.way_out}" if rule.way_out else ""
                raise UserError(
                    f"--{_flag(name)} must be at least {rule.least}, not {value}: {rule.otherwise}"
                    f"{end}"
                )
    if args.seed > _LARGEST_SEED:
        raise UserError(f"--seed {args.seed} is too large: NumPy takes seeds below {2**32}")
    _refuse_pattern(args)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _refuse_pattern(args: argparse.Namespace) -> None:
    """Refuse a ``--moe-layer-freq`` that is no pattern, or leaves no MoE layer."""
    pattern = args.moe_layer_freq
    if isinstance(pattern, bool) or not isinstance(pattern, int | list):
        raise UserError(
            f"--moe-layer-freq {pattern} is neither a number nor a list of ones and zeros: write"
            ' every how many layers one is MoE, or a pattern such as "([0]*1+[1]*3)"'
        )
    if isinstance(pattern, int):
        if pattern < 1:
            raise UserError(
                f"--moe-layer-freq must be at least 1, not {pattern}: Megatron divides the number"
                " of the layer by it"
            )
        return
    if any(type(entry) is not int or entry not in (0, 1) for entry in pattern):
        raise UserError(
            f"--moe-layer-freq {pattern}: a pattern holds 1 for an MoE layer and 0 for a dense one"
        )
    if 1 not in pattern:
        raise UserError(
            f"--moe-layer-freq {pattern} leaves no MoE layer: put a 1 in it for each MoE layer"
        )


def complete_training(args: argparse.Namespace) -> list[str]:
    """Flags to add, of what Megatron counts with and a training run may leave out.

    Megatron documents that without ``--eval-interval`` there is no evaluation during training, and
    then divides by None; with ``--skip-train`` it still multiplies with the number of iterations.

    Args:
        args: Megatron's arguments, parsed and not yet validated, after :func:`refuse_impossible`.

    Returns:
        The flags, as words of a command line.

    Raises:
        UserError: nothing says how long the run is, or how large a micro-batch.
    """
    _refuse_missing(args)
    added = []
    steps = args.train_iters or args.train_samples
    if steps is None:
        added += ["--train-iters", "1"]
        steps = 1
    if args.eval_interval is None:
        # A step has one sample or more; in samples, this is later than the last step too.
        added += ["--eval-interval", str(steps + 1)]
    return added


def _refuse_missing(args: argparse.Namespace) -> None:
    needed: dict[str, Any] = {
        "num_layers": "layers",
        "hidden_size": "features",
        "num_attention_heads": "heads",
        "seq_length": "tokens",
        "micro_batch_size": "samples",
    }
    for name, unit in needed.items():
        if getattr(args, name) is None and not _from_elsewhere(args, name):
            raise UserError(f"--{_flag(name)} is missing: give the number of {unit}")
    if args.train_iters is None and args.train_samples is None and not args.skip_train:
        raise UserError(
            "nothing says how long to train: give --train-iters or --train-samples (or --skip-train"
            " for evaluation alone)"
        )
    if args.save and args.save_interval is None:
        raise UserError(
            "--save needs --save-interval: give the number of steps between checkpoints"
        )
    samples, batch = args.train_samples, args.global_batch_size
    if samples and batch and samples < batch and not args.rampup_batch_size:
        raise UserError(
            f"--train-samples {samples} is less than one step of --global-batch-size {batch}: give"
            " more samples or a smaller batch"
        )


def _from_elsewhere(args: argparse.Namespace, name: str) -> bool:
    """Whether a checkpoint, an encoder's flag or a YAML file of Megatron's gives it later."""
    other = {"num_layers": "encoder_num_layers", "seq_length": "encoder_seq_length"}
    return bool(
        args.use_checkpoint_args
        or getattr(args, "yaml_cfg", None)
        or getattr(args, other.get(name, ""), None)
    )
