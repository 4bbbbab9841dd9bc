"""Real text through Megatron's GPT datasets: datasets, batches, the loss of a micro-batch.

Megatron's wheel holds the datasets but not the entry script that feeds them; this is that part,
for plain pretraining.
"""

import contextlib
import errno
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_default_moe.data import checks, evaluation, tokenizers
from megatron_default_moe.data.checked_dataset import (
    CheckedConfig,
    CheckedGPTDataset,
    CheckedMockDataset,
)
from megatron_default_moe.data.parts import NAMES, parts
from megatron_default_moe.errors import RankError, UserError

_FIELDS = ("attention_mask", "labels", "loss_mask", "position_ids", "tokens")

SPIKY_LOSS_FACTOR = 10
"""``--check-for-spiky-loss`` reports a loss this many times the largest seen (as upstream)."""


def _has_mtp(config: TransformerConfig, vp_stage: int | None) -> bool:
    found: bool = mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )
    return found


def dataset_config(args: Any) -> CheckedConfig:
    """Build the configuration of Megatron's GPT datasets from its arguments.

    Parts that the run does not read are left out: Megatron would build them nevertheless, which it
    cannot of a part without a token.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    tokenizer = build_tokenizer(args)
    config = CheckedConfig(
        vocabulary=tokenizers.vocabulary(tokenizer, args.padded_vocab_size),
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=json.loads(pathlib.Path(sequences).read_text())
        if sequences
        else None,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    read = checks.wanted(args, parts(args))
    for place, name in enumerate(NAMES):
        if name in read:
            continue
        if config.split_matrix is not None:
            config.split_matrix[place] = None
        if config.blend_per_split is not None:
            config.blend_per_split[place] = None
    return config


@contextlib.contextmanager
def _faults_of_the_build_named(args: Any) -> Iterator[None]:
    """Megatron wraps what the system said of a folder it may not write to into a bare Exception."""
    try:
        yield
    except IndexError as error:
        if "mid_level_dataset_surplus" not in str(error):
            raise
        surplus = args.mid_level_dataset_surplus
        raise UserError(
            "a blend of small data asks more samples of one prefix than it was built with: raise"
            f" --mid-level-dataset-surplus (it is {surplus}), to 1.0 for example"
        ) from error
    except Exception as error:
        cause = error.__cause__
        if not isinstance(cause, PermissionError) and getattr(cause, "errno", 0) != errno.EROFS:
            raise
        raise UserError(
            f"--data-cache-path: the index files of the data cannot be written ({cause}); name a"
            " folder that all ranks see and may write to (by default they are beside the data)"
        ) from error


def build(args: Any, num_samples: Sequence[int | None], built_here: Callable[[], bool]) -> Any:
    """Build Megatron's datasets.

    Args:
        args: Megatron's, of a run that begins or goes on.
        num_samples: how many samples of train, validation and test Megatron asks for; None for one
            pass.
        built_here: whether this rank reads data.

    Returns:
        The three, None for a part that is not read; a list where there are several validation sets.

    Raises:
        UserError: the cached indices cannot be written, or a blend does not come out.
    """
    dataset = CheckedMockDataset if args.mock_data else CheckedGPTDataset
    samples = evaluation.with_consumed(args, num_samples)
    with _faults_of_the_build_named(args):
        return BlendedMegatronDatasetBuilder(
            dataset, samples, built_here, dataset_config(args)
        ).build()


def datasets_provider(config: TransformerConfig) -> Callable[..., tuple[Any, Any, Any]]:
    """Return the function with which ``pretrain`` builds train, validation and test datasets."""

    def provide(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        args = get_args()

        def built_here() -> bool:
            first_or_last = is_first_or_last_pipeline_stage(vp_stage)
            return mpu.get_tensor_model_parallel_rank() == 0 and (
                first_or_last or _has_mtp(config, vp_stage)
            )

        return build(args, num_samples, built_here)

    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide


def _next(iterator: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The next sample; torch wraps what a worker process raised into its traceback."""
    try:
        return next(iterator)
    except RankError as error:
        *_, sentence = str(error).rstrip().rsplit(f"{RankError.__name__}: ")
        raise RankError(sentence) from error


def _batch(
    iterator: Iterator[dict[str, Any]],
    config: TransformerConfig,
    vp_stage: int | None,
    micro_batch_size: int,
) -> dict[str, Tensor | None]:
    """This rank's share of the next micro-batch; only None on stages that need no tokens."""
    args = get_args()
    has_mtp = _has_mtp(config, vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not has_mtp:
        return dict.fromkeys(_FIELDS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = _next(iterator)
        batch = {key: sample.get(key) for key in _FIELDS}
        batch = {
            key: None if value is None else value.cuda(non_blocking=True)
            for key, value in batch.items()
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return {key: batch.get(key) for key in _FIELDS}


def loss_of_micro_batch(
    loss_mask: Tensor | None, token_losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the summed loss, the number of tokens it is over, and both for the log."""
    assert loss_mask is not None, "only the last stage has a loss"
    mask = loss_mask.view(-1).float()
    loss = torch.sum(token_losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _check_loss(loss)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def _check_loss(loss: Tensor) -> None:
    """Let Megatron's rerun state machine see the loss, as its own entry script does."""
    args, machine = get_args(), get_rerun_state_machine()
    checks: list[tuple[Callable[..., Any], str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [
            (torch.isnan, "found NaN in local forward loss calculation", True),
            (torch.isinf, "found Inf in local forward loss calculation", True),
        ]
    if args.check_for_spiky_loss:
        spiky = functools.partial(
            machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
        )
        checks.append((spiky, "Spiky loss", False))
    for rejection, message, fatal in checks:
        machine.validate_result(
            result=loss, rejection_func=rejection, message=message, tolerance=0.0, fatal=fatal
        )


def forward_step(
    data_iterator: Iterator[dict[str, Any]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    """Run one micro-batch forward (the ``forward_step_func`` of ``pretrain``).

    Args:
        data_iterator: yields samples on the ranks that build datasets.
        model: the model chunk.
        return_schedule_plan: return Megatron's plan of the chunk instead of its output, for
            ``--overlap-moe-expert-parallel-comm``.

    Returns:
        The output (or plan), and the function from output to loss.
    """
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _batch(
        data_iterator,
        get_model_config(model),
        get_attr_wrapped_model(model, "vp_stage"),
        args.micro_batch_size if model.training else args.eval_micro_batch_size,
    )
    timers("batch-generator").stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, functools.partial(loss_of_micro_batch, batch["loss_mask"])


def embedding_ranks(config: TransformerConfig) -> Callable[[list[int]], list[int]]:
    """Return the function that names the ranks of a pipeline which hold word embeddings."""

    def ranks_of(pp_ranks: list[int]) -> list[int]:
        ranks = {pp_ranks[0]}
        if len(pp_ranks) > 1:
            if not get_args().untie_embeddings_and_output_weights:
                ranks.add(pp_ranks[-1])
            ranks.update(get_mtp_ranks(pp_ranks, config))
        return sorted(ranks)

    return ranks_of
