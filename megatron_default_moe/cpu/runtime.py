"""Run Megatron's own training loop on a machine without a GPU.

Megatron asks for a CUDA device by name in many places: ``device="cuda"``, ``.cuda()``, streams, the
CUDA generator, an assertion. Without a device, `install` points those names at their CPU
counterparts (`replacements`), so that ``megatron.training.pretrain`` runs unchanged over gloo; with
a GPU it does nothing.
``torch.cuda.is_available()`` keeps telling the truth.

`flag_choices` chooses, or refuses, the command line flags that go with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

from megatron_default_moe.cpu import replacements, stand_ins

logger = logging.getLogger(__name__)


def needed() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Make Megatron's loop run without a CUDA device; call it before importing megatron.training.

    Returns:
        True if the runtime is in place, False if a GPU is present and nothing was changed.
    """
    if not needed():
        return False
    if replacements.in_place():
        return True
    replacements.hide_libraries()
    # Compiled functions then run as written, also those made before this call or in a child.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Torch's optimizers import it anyway, and it takes stock of torch's names when imported.
    import torch._dynamo

    torch._dynamo.config.disable = True
    # `with torch.device(...)` recognises torch's factories by identity: let it note the originals.
    torch.utils._device._device_constructors()
    replacements.replace(replacements.REPLACEMENTS)
    use_wheel_dataset_helpers()
    tracker_log = logging.getLogger("megatron.core.tensor_parallel.random")
    tracker_log.addFilter(stand_ins.is_not_generator_warning)
    replaced = len(replacements.REPLACEMENTS)
    logger.debug("no CUDA device: CPU runtime installed, %d names replaced", replaced)
    return True


def use_wheel_dataset_helpers() -> bool:
    """Stop Megatron from calling ``make`` for the dataset helper that its wheel already contains.

    The wheel ships the compiled helper but no Makefile, so upstream's build step exits. Safe on
    every machine: with a Makefile beside the helper, or without the helper, nothing changes.

    Returns:
        True if the build step is now skipped.
    """
    from megatron.core.datasets import utils

    makefile = os.path.join(os.path.dirname(utils.__file__), "Makefile")
    if os.path.exists(makefile):
        return False
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return False
    utils.compile_helpers = stand_ins.nothing
    return True


@contextlib.contextmanager
def planning_on_meta() -> Iterator[None]:
    """Within this block, tensors that ask for the current CUDA device are created on ``meta``.

    For planning only: a model built here has no values at all.
    """
    before, stand_ins.planning_on_meta = stand_ins.planning_on_meta, True
    try:
        yield
    finally:
        stand_ins.planning_on_meta = before
