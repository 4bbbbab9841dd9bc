"""From a command line for GPUs to checked arguments and a model config, on a machine without one.

Megatron parses and validates its own flags, as they are. What it asks of the machine while it does
so (the card's generation, Transformer Engine's version) is answered for the planned card.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from megatron_default_moe.errors import UserError
from megatron_default_moe.loop import command_line
from megatron_default_moe.machine.doctor import RECIPES
from megatron_default_moe.options import layout as layout_rules
from megatron_default_moe.options import support
from megatron_default_moe.options.config import RouterGradientConfig, options_from_args
from megatron_default_moe.options.flags import expand_config
from megatron_default_moe.options.numbers import refuse_impossible
from megatron_default_moe.options.settings import Settings
from megatron_default_moe.plan.cards import Card

ASSUMED_TE_VERSION = "2.14.0"
"""Transformer Engine's version while Megatron checks the flags; the lowest it asks for anywhere."""


_TE_KERNELS = {
    "megatron.core.models.common.embeddings.rope_utils": (
        "fused_apply_rotary_pos_emb",
        "fused_apply_rotary_pos_emb_thd",
    ),
    "megatron.core.transformer.moe.moe_utils": (
        "fused_permute",
        "fused_permute_with_probs",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "fused_unpermute",
    ),
}
"""Transformer Engine's kernels that TransformerConfig looks for when a flag asks for them."""


def _not_to_be_called(*_: Any, **__: Any) -> Any:
    raise AssertionError("a plan computes nothing")


class LayoutError(UserError):
    """A run that may work with other TP, PP and EP sizes."""


@dataclasses.dataclass(frozen=True, order=True)
class Layout:
    """The three sizes a plan may change to find a layout that works."""

    tp: int
    pp: int
    ep: int

    def __str__(self) -> str:
        """Return the layout as flags."""
        return (
            f"--tensor-model-parallel-size {self.tp} --pipeline-model-parallel-size {self.pp}"
            f" --expert-model-parallel-size {self.ep}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run whose arguments Megatron and this package accept."""

    args: argparse.Namespace
    """Megatron's validated arguments, GPU flags included."""
    options: RouterGradientConfig
    layout: Layout
    vocab: int
    """Padded vocabulary."""

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return int(self.args.data_parallel_size)

    @property
    def expert_dp(self) -> int:
        """How many ranks hold the same experts."""
        args = self.args
        per_replica = args.expert_tensor_parallel_size * self.layout.ep * self.layout.pp
        return int(args.world_size // per_replica)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step and data-parallel rank."""
        return int(self.args.global_batch_size // (self.args.micro_batch_size * self.dp))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Megatron's own lines and warnings out of the plan."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def as_if_on(card: Card) -> Iterator[None]:
    """Answer what Megatron's checks ask of the machine, for this card."""
    from megatron.core import utils
    from packaging.version import Version

    with contextlib.ExitStack() as answers:

        def answer(owner: Any, name: str, value: Any) -> None:
            answers.enter_context(_replaced(owner, name, value))

        answer(torch.cuda, "get_device_capability", lambda *_: card.capability)
        answer(utils, "_te_version", Version(ASSUMED_TE_VERSION))
        for module, names in _TE_KERNELS.items():
            for name in names:
                answer(importlib.import_module(module), name, _not_to_be_called)
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def parse(argv: list[str], gpus: int) -> argparse.Namespace:
    """Parse a command line of the training entry, ``--config`` included.

    Args:
        argv: Megatron's and this package's flags.
        gpus: the number of ranks.

    Raises:
        UserError: a mistake in the flags or the files.
    """
    from megatron.training.arguments import parse_args

    parser = command_line.build_parser()
    argv = expand_config(parser, argv)
    refuse_impossible(parser.parse_args(argv))
    with quiet(), _replaced(sys, "argv", ["plan", *argv]):
        args = parse_args(command_line.add_flags)
    args.rank, args.world_size = 0, gpus
    return args


def check(parsed: argparse.Namespace, card: Card, layout: Layout | None = None) -> CheckedRun:
    """Let this package and Megatron check the arguments, on a copy.

    Args:
        parsed: from :func:`parse`.
        card: the GPU to answer for.
        layout: sizes to use instead of the parsed ones.

    Raises:
        LayoutError: they do not work, at least not in this layout; with the reason.
        UserError: they do not work, or cannot be planned, in any layout.
    """
    from megatron.training.arguments import validate_args

    args = copy.deepcopy(parsed)
    if layout is not None:
        args.tensor_model_parallel_size = layout.tp
        args.pipeline_model_parallel_size = layout.pp
        args.expert_model_parallel_size = layout.ep
    options = options_from_args(args)
    _check_layout(args, options)
    vocab = _vocabulary(args)
    _check_countable(args)
    _check_chip(args, card)
    try:
        with quiet(), as_if_on(card):
            validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    except (AssertionError, ValueError, RuntimeError) as error:
        raise LayoutError(
            f"Megatron refuses these arguments: {command_line.reason_of(error)}"
        ) from error
    layout = Layout(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.expert_model_parallel_size,
    )
    return CheckedRun(args=args, options=options, layout=layout, vocab=vocab)


_UNCOUNTED = {
    "optimizer_cpu_offload": "the memory it leaves on the GPU is not counted",
    "fine_grained_activation_offloading": "the memory it leaves on the GPU is not counted",
    "cpu_offloading": "the memory it leaves on the GPU is not counted",
    "use_megatron_fsdp": "FSDP's shards are not counted",
    "use_torch_fsdp2": "FSDP's shards are not counted",
    "fp8_param_gather": "weights kept in FP8 alone are not counted",
    "fp4_param_gather": "weights kept in FP4 alone are not counted",
    "moe_latent_size": "its projections are Transformer Engine's, which is not used here",
    "experimental_attention_variant": "its layers are not counted",
}
"""Flags whose effect on memory the formulas do not know."""


def _check_countable(args: argparse.Namespace) -> None:
    if args.optimizer != "adam":
        raise UserError(
            f"--optimizer {args.optimizer} cannot be planned: only adam's state is counted"
        )
    for name, reason in _UNCOUNTED.items():
        if getattr(args, name, False):
            raise UserError(
                f"--{name.replace('_', '-')} cannot be planned: {reason}; plan without it"
            )


def _check_chip(args: argparse.Namespace, card: Card) -> None:
    """Formats that the card does not have, which Transformer Engine would refuse there."""
    chip = f"a {card.name} has {'.'.join(map(str, card.capability))}"
    for recipe in RECIPES if args.fp8 else ():
        if args.fp8_recipe == recipe.name and card.capability < recipe.capability:
            raise UserError(
                f"--fp8-recipe {recipe.name} needs compute capability"
                f" {'.'.join(map(str, recipe.capability))} and {chip}: take another recipe"
            )
    if args.fp4 and card.capability < (10, 0):
        raise UserError(f"--fp4-format needs compute capability 10.0 and {chip}: take FP8 or bf16")


def _check_layout(args: argparse.Namespace, options: RouterGradientConfig) -> None:
    """The support table, and what has to divide what: a fault of the layout may have a cure."""
    settings = Settings(args, options)
    if settings.layers_without_a_stage:
        raise LayoutError(support.LAYERS_WITHOUT_A_STAGE)
    with quiet():
        support.check(args, options, warn=False)
    fault = layout_rules.fault(settings, args.world_size)
    if fault is not None:
        raise LayoutError(fault)


def _vocabulary(args: argparse.Namespace) -> int:
    """The padded vocabulary, from the flags alone."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    if args.padded_vocab_size is not None:
        return int(args.padded_vocab_size)
    if args.vocab_size is None:
        raise UserError("--vocab-size is missing: a plan reads no tokenizer; add --vocab-size N")
    return int(
        calculate_padded_vocab_size(
            args.vocab_size,
            args.make_vocab_size_divisible_by,
            args.tensor_model_parallel_size,
            logging_enabled=False,
        )
    )


def model_config(run: CheckedRun, card: Card) -> Any:
    """Megatron's GPT model config of the run, with the options attached and the GPU flags kept.

    Raises:
        LayoutError: Megatron's TransformerConfig refuses a combination.
    """
    # Which tokenizer it was does not matter any more, its size does.
    args = copy.deepcopy(run.args)
    args.padded_vocab_size = run.vocab
    try:
        with quiet(), as_if_on(card):
            return command_line.build_model_config(args, run.options)
    except UserError as error:
        raise LayoutError(str(error)) from error
