"""What the CPU runtime replaces, and why: one table, and the way its rows are put in place.

`REPLACEMENTS` names what Megatron asks of CUDA and what stands there instead (`stand_ins`);
`HIDDEN` are the libraries that are kept out of Megatron's sight. `runtime.install` puts all of it
in place where there is no GPU, and `checkpoint_worker` the part that a checkpoint writer needs.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from megatron_default_moe.cpu import stand_ins


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


def in_place() -> bool:
    """Whether anything was replaced in this process."""
    return bool(_originals)


def hide_libraries() -> None:
    """Make the import of what is in `HIDDEN` fail as if it were not installed."""
    for name in HIDDEN:
        # What Python itself writes for a module that cannot be found: an ImportError follows.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def replace(rows: Iterable[Replacement]) -> None:
    """Put these rows in place, each once in a process."""
    for row in rows:
        if row.target in _originals:
            continue
        path, _, name = row.target.rpartition(".")
        owner = pkgutil.resolve_name(path)
        # From __dict__ first, because getattr would unwrap a static method.
        original = vars(owner).get(name) or getattr(owner, name)
        _originals[row.target] = original
        setattr(owner, name, row.make(original))


# -- The checkpoint writer's own process -----------------------------------------------------------


def prepare_checkpoint_worker() -> Callable[..., None]:
    """Replace in the checkpoint writer's process what it meets; return upstream's loop."""
    hide_libraries()
    # Not the whole table, which would import the training package into every writer.
    replace(row for row in REPLACEMENTS if row.target.startswith("torch."))
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    # Replaced here too if the main module, which a new process imports, calls `install`.
    loop = _originals.get(_WORKER_LOOP, PersistentAsyncCaller.async_loop)
    function: Callable[..., None] = getattr(loop, "__func__", loop)
    return function


def checkpoint_worker(*args: Any, **kwargs: Any) -> None:
    """For the loop of the writer's own process, which starts without any replacement."""
    loop = prepare_checkpoint_worker()
    loop(*args, **kwargs)


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
    yield _row(_WORKER_LOOP, reason, _always(staticmethod(checkpoint_worker)))
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
