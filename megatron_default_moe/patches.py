"""Every run-time change to Megatron, in one table.

A patch exists only where Megatron has no hook. Each is applied once however often ``install`` is
called, keeps the original as ``__wrapped__``, is logged once, and is only applied to the versions
it was written for. (What the CPU runtime replaces is its own table, in ``cpu.py``; it never
applies where there is a GPU.)
"""

import dataclasses
import importlib
import logging
from collections.abc import Callable
from typing import Any

from megatron_default_moe import training
from megatron_default_moe.errors import UserError

logger = logging.getLogger(__name__)

SUPPORTED = ((0, 19), (0, 20))
"""Megatron-Core versions from (inclusive) and to (exclusive); tested with 0.19.2."""

_MARK = "_megatron_default_moe_patch"


@dataclasses.dataclass(frozen=True)
class Patch:
    """One replaced attribute of an upstream module."""

    module: str
    attribute: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str


PATCHES = (
    Patch(
        module="megatron.training.training",
        attribute="train_step",
        wrap=training.with_commit,
        reason="the default vectors change after an optimizer step that was taken, and the loop "
        "has no hook there (gradient finalisation runs before it, and again in a rerun)",
    ),
)


def check_version() -> None:
    """Refuse a Megatron-Core outside the supported range.

    Raises:
        UserError: with the installed version and the range.
    """
    from megatron.core import package_info

    version = tuple(package_info.VERSION[:2])
    low, high = SUPPORTED
    if not low <= version < high:
        raise UserError(
            f"megatron-core {package_info.__version__} is not supported: install a version from"
            f" {low[0]}.{low[1]} up to, not including, {high[0]}.{high[1]}"
            " (for example megatron-core[training]==0.19.2)"
        )


def installed() -> bool:
    """Whether every patch is in place."""
    return all(hasattr(_current(patch), _MARK) for patch in PATCHES)


def install() -> None:
    """Apply every patch that is not yet applied.

    Raises:
        UserError: the installed Megatron-Core is outside the supported range.
    """
    check_version()
    for patch in PATCHES:
        original = _current(patch)
        if hasattr(original, _MARK):
            continue
        replacement = patch.wrap(original)
        setattr(replacement, _MARK, True)
        setattr(importlib.import_module(patch.module), patch.attribute, replacement)
        logger.info("replaced %s.%s: %s", patch.module, patch.attribute, patch.reason)


def uninstall() -> None:
    """Put the originals back."""
    for patch in PATCHES:
        present = _current(patch)
        if hasattr(present, _MARK):
            setattr(importlib.import_module(patch.module), patch.attribute, present.__wrapped__)


def _current(patch: Patch) -> Any:
    return getattr(importlib.import_module(patch.module), patch.attribute)
