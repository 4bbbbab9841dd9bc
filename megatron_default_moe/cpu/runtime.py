"""Run Megatron's own training loop on a machine without a GPU.

Megatron asks for a CUDA device by name in many places: ``device="cuda"``, ``.cuda()``, streams, the
CUDA generator, an assertion. Without a device, `install` points those names at their CPU
counterparts (`cpu_stand_ins`), so that ``megatron.training.pretrain`` runs unchanged over gloo.
Every name it replaces is a row of `REPLACEMENTS`, and `HIDDEN` are the libraries it keeps out of
Megatron's sight; with a GPU it does nothing.
``torch.cuda.is_available()`` keeps telling the truth.

`cpu_flags` chooses, or refuses, the command line flags that go with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from megatron_default_moe.cpu import stand_ins as stand_ins

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replacement:
    """One name the CPU runtime replaces."""

    target: str
    """Dotted name: module, then attributes."""
    reason: str
    """Why it cannot stay."""
    make: Callable[[Any], Any]
    """Builds the replacement from the original."""


HIDDEN = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
"""Libraries that an image may hold and only a GPU can use. Importing Transformer Engine without a
driver raises OSError, where Megatron catches ImportError; where its import works, Megatron calls
its kernels, also from modules of its own."""

_originals: dict[str, Any] = {}


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
    if _originals:
        return True
    _hide_libraries()
    # Compiled functions then run as written, also those made before this call or in a child.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Torch's optimizers import it anyway, and it takes stock of torch's names when imported.
    import torch._dynamo

    torch._dynamo.config.disable = True
    # `with torch.device(...)` recognises torch's factories by identity: let it note the originals.
    torch.utils._device._device_constructors()
    _replace(REPLACEMENTS)
    use_wheel_dataset_helpers()
    tracker_log = logging.getLogger("megatron.core.tensor_parallel.random")
    tracker_log.addFilter(stand_ins.is_not_generator_warning)
    logger.debug("no CUDA device: CPU runtime installed, %d names replaced", len(REPLACEMENTS))
    return True


def _hide_libraries() -> None:
    for name in HIDDEN:
        # What Python itself writes for a module that cannot be found: an ImportError follows.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


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


def prepare_checkpoint_worker() -> Callable[..., None]:
    """Replace in the checkpoint writer's process what it meets; return upstream's loop."""
    _hide_libraries()
    # Not the whole table, which would import the training package into every writer.
    _replace(row for row in REPLACEMENTS if row.target.startswith("torch."))
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    # Replaced here too if the main module, which a new process imports, calls `install`.
    loop = _originals.get(_WORKER_LOOP, PersistentAsyncCaller.async_loop)
    function: Callable[..., None] = getattr(loop, "__func__", loop)
    return function


def _replace(rows: Iterable[Replacement]) -> None:
    for row in rows:
        if row.target in _originals:
            continue
        path, _, name = row.target.rpartition(".")
        owner = pkgutil.resolve_name(path)
        # From __dict__ first, because getattr would unwrap a static method.
        original = vars(owner).get(name) or getattr(owner, name)
        _originals[row.target] = original
        setattr(owner, name, row.make(original))


# -- The table -------------------------------------------------------------------------------------

_DEVICE = "Megatron asks for the CUDA device, which is not there"
_STREAM = "CPU work is done when the call returns, so streams have nothing to order"
_RNG = "CPU tensors draw from the default CPU generator, which plays the device generator's part"
_ADAM = "with torch's Adam the distributed optimizer saves but cannot resume"
_WRITER = "megatron.core.dist_checkpointing.strategies"
_WORKER_LOOP = f"{_WRITER}.async_utils.PersistentAsyncCaller.async_loop"


def _always(replacement: Any) -> Callable[[Any], Any]:
    return lambda original: replacement


def _row(target: str, reason: str, make: Callable[[Any], Any]) -> Replacement:
    return Replacement(target=target, reason=reason, make=make)


def _devices() -> Iterator[Replacement]:
    yield _row("torch.cuda.device_count", _DEVICE, _always(torch.cpu.device_count))
    yield _row("torch.cuda.current_device", _DEVICE, _always(stand_ins.current_device))
    yield _row("torch.cuda.set_device", _DEVICE, _always(stand_ins.nothing))
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        reason = "Megatron creates tensors with the literal device 'cuda'"
        yield _row(f"torch.{name}", reason, stand_ins.created_on_cpu)
    reason = "tensors are already where they are used"
    yield _row("torch.Tensor.cuda", reason, _always(stand_ins.itself))
    reason = "Megatron's optimizers compare type names with 'torch.cuda.FloatTensor'"
    yield _row("torch.Tensor.type", reason, stand_ins.typed_as_cuda)
    reason = "compiling for the CPU takes minutes and a C++ compiler"
    yield _row("torch.compile", reason, _always(stand_ins.no_compile))
    yield _row("torch.cuda.Stream", _STREAM, _always(stand_ins.Stream))
    for name in ("Event", "stream", "current_stream", "synchronize"):
        yield _row(f"torch.cuda.{name}", _STREAM, _always(getattr(torch.cpu, name)))
    yield _row("torch.Tensor.record_stream", _STREAM, _always(stand_ins.nothing))


def _random_numbers() -> Iterator[Replacement]:
    yield _row("torch.cuda.get_rng_state", _RNG, _always(stand_ins.get_rng_state))
    yield _row("torch.cuda.set_rng_state", _RNG, _always(stand_ins.set_rng_state))
    yield _row("torch.cuda.manual_seed", _RNG, _always(stand_ins.manual_seed))
    module = "megatron.core.tensor_parallel.random"
    yield _row(f"{module}._get_cuda_rng_state", _RNG, _always(stand_ins.get_rng_state))
    yield _row(f"{module}._set_cuda_rng_state", _RNG, _always(stand_ins.set_rng_state))
    reason = "its draws are the host generator's, and there is no memory to pin"
    yield _row("torch.utils.data.DataLoader.__init__", reason, stand_ins.loading_for_cpu)


def _model() -> Iterator[Replacement]:
    reason = "without Transformer Engine and Apex no norm knows sequence parallelism"
    target = "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__"
    yield _row(target, reason, stand_ins.norm_with_sequence_parallelism)
    reason = "all-to-all needs its split sizes as numbers, and upstream converts CUDA tensors only"
    target = "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu"
    yield _row(target, reason, _always(stand_ins.move_to_cpu))
    target = "megatron.training.models.dist_utils.to_empty_if_meta_device"
    yield _row(target, _DEVICE, stand_ins.materialised_on_cpu)

    reason = "expert tensor parallelism gathers pieces of different lengths, which gloo refuses"
    module = "megatron.core.tensor_parallel.mappings"
    yield _row(f"{module}._gather_along_first_dim", reason, stand_ins.gather_uneven)
    yield _row(f"{module}._reduce_scatter_along_first_dim", reason, stand_ins.reduce_scatter_uneven)


def _optimizer_and_checkpoints() -> Iterator[Replacement]:
    module = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    yield _row(f"{module}.state_dict", _ADAM, stand_ins.with_first_states)
    yield _row(f"{module}.load_state_dict", _ADAM, stand_ins.with_own_steps)
    yield _row(f"{module}._set_main_param_and_optimizer_states", _ADAM, stand_ins.without_step)
    reason = "the asynchronous writer is a new process, which needs these replacements too"
    yield _row(_WORKER_LOOP, reason, _always(staticmethod(stand_ins.checkpoint_worker)))
    reason = "CPU tensors reach the asynchronous writer as shared memory, which training changes"
    target = f"{_WRITER}.filesystem_async.FileSystemWriterAsync.preload_tensors"
    yield _row(target, reason, _always(staticmethod(stand_ins.preload_tensors)))


def _start() -> Iterator[Replacement]:
    reason = "a rule about CUDA_DEVICE_MAX_CONNECTIONS asks for the device's generation"
    yield _row("megatron.training.arguments.get_device_arch_version", reason, _always(lambda: 10))
    reason = "it asserts that a CUDA device is there"
    target = "megatron.training.training.initialize_megatron"
    yield _row(target, reason, stand_ins.allowing_no_cuda)
    reason = "it warms up compiled functions, and none are compiled"
    target = "megatron.training.training.set_jit_fusion_options"
    yield _row(target, reason, _always(stand_ins.nothing))


REPLACEMENTS: tuple[Replacement, ...] = (
    *_devices(),
    *_random_numbers(),
    *_model(),
    *_optimizer_and_checkpoints(),
    *_start(),
)
"""Every name that `install` replaces, in order."""
