"""Every run-time change to Megatron, in one table.

A patch exists only where Megatron has no hook. Those in ``PATCHES`` are applied once however often
``install`` is called, keep the original as ``__wrapped__``, are logged once, and are only applied
to the versions they were written for; those in ``WHILE_BUILDING`` last as long as one call of
Megatron's model builder. (What the CPU runtime replaces is a table of its own, in
``cpu/replacements.py``; it never applies where there is a GPU.)

Importing this module imports nothing of Megatron, so that the version can be checked first.
"""

import contextlib
import dataclasses
import logging
import pkgutil
from collections.abc import Iterator
from typing import Any

from megatron_default_moe.machine.versions import check_version

__all__ = [
    "PATCHES",
    "WHILE_BUILDING",
    "Patch",
    "check_version",
    "install",
    "installed",
    "uninstall",
    "while_building",
]

logger = logging.getLogger(__name__)

_MARK = "_megatron_default_moe_patch"


@dataclasses.dataclass(frozen=True)
class Patch:
    """One replaced attribute of an upstream module or class."""

    owner: str
    """``module`` or ``module:class``."""
    attribute: str
    wrap: str
    """``module:function`` of this package, which makes the replacement from the original."""
    reason: str

    @property
    def present(self) -> Any:
        """What stands there now."""
        return getattr(pkgutil.resolve_name(self.owner), self.attribute)

    def put(self, value: Any) -> None:
        """Put a value there."""
        setattr(pkgutil.resolve_name(self.owner), self.attribute, value)

    def replacement(self) -> Any:
        """Wrap what stands there now."""
        return pkgutil.resolve_name(self.wrap)(self.present)


PATCHES = (
    Patch(
        owner="megatron.training.training",
        attribute="train_step",
        wrap="megatron_default_moe.loop.training:with_commit",
        reason="the default vectors change after an optimizer step that was taken, and the loop "
        "has no hook there (gradient finalisation runs before it, and again in a rerun)",
    ),
    Patch(
        owner="megatron.training.training",
        attribute="evaluate_and_print_results",
        wrap="megatron_default_moe.loop.tracker:with_evaluations_named",
        reason="the loss of the test set would be logged as validation loss, and two validation "
        "losses of the last step by one name",
    ),
    Patch(
        owner="megatron.core.optimizer.optimizer:ChainedOptimizer",
        attribute="load_state_dict",
        wrap="megatron_default_moe.loop.optimizer_layout:with_regrouped_state",
        reason="a checkpoint saved with expert parallelism cannot be resumed without it, or the "
        "other way round: the number of optimizers differs",
    ),
    Patch(
        owner="torch.distributed.checkpoint.filesystem:FileSystemReader",
        attribute="read_metadata",
        wrap="megatron_default_moe.checkpoint.safe_pickle:with_safe_index",
        reason="the index of a checkpoint is a pickle, and torch would execute what it names",
    ),
    Patch(
        owner="torch.distributed.checkpoint.default_planner:DefaultLoadPlanner",
        attribute="load_bytes",
        wrap="megatron_default_moe.checkpoint.safe_pickle:with_safe_state",
        reason="torch would execute what the pickles of a checkpoint's arguments and states name",
    ),
    Patch(
        owner="multiprocessing.process:BaseProcess",
        attribute="start",
        wrap="megatron_default_moe.loop.children:with_starter_named",
        reason="the next row has to know which kind of thread starts a process",
    ),
    Patch(
        owner="multiprocessing.process:BaseProcess",
        attribute="_bootstrap",
        wrap="megatron_default_moe.loop.children:with_parent_watched",
        reason="a rank that is killed leaves its checkpoint writer and others behind for good",
    ),
)
"""In place from ``install`` to ``uninstall``."""

WHILE_BUILDING = (
    Patch(
        owner="megatron.training.models.gpt",
        attribute="mtp_block_spec",
        wrap="megatron_default_moe.loop.model:with_default_moe_in_mtp",
        reason="GPTModelBuilder.build_model makes the spec of the multi-token prediction layers "
        "itself, apart from the layer spec that a config can name",
    ),
)
"""In place inside ``while_building``."""


def installed() -> bool:
    """Whether every patch is in place."""
    return all(hasattr(patch.present, _MARK) for patch in PATCHES)


def install() -> None:
    """Apply every patch that is not yet applied.

    Raises:
        UserError: the installed Megatron-Core is outside the supported range.
    """
    check_version()
    for patch in PATCHES:
        if hasattr(patch.present, _MARK):
            continue
        replacement = patch.replacement()
        setattr(replacement, _MARK, True)
        patch.put(replacement)
        logger.info("replaced %s.%s: %s", patch.owner, patch.attribute, patch.reason)


def uninstall() -> None:
    """Put the originals back."""
    for patch in PATCHES:
        if hasattr(patch.present, _MARK):
            patch.put(patch.present.__wrapped__)


@contextlib.contextmanager
def while_building() -> Iterator[None]:
    """Apply ``WHILE_BUILDING`` inside this block and put the originals back at its end."""
    originals = [(patch, patch.present) for patch in WHILE_BUILDING]
    try:
        for patch, _ in originals:
            patch.put(patch.replacement())
        yield
    finally:
        for patch, original in originals:
            patch.put(original)
