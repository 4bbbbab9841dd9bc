"""Run Megatron's own training loop on a machine without a GPU.

Megatron asks for a CUDA device by name in many places: ``device="cuda"``, ``.cuda()``, streams, the
CUDA generator, an assertion. Without a device, `install` points those names at their CPU
counterparts, so that ``megatron.training.pretrain`` runs unchanged over gloo. Every name it
replaces is a row of `REPLACEMENTS`; with a GPU it replaces nothing. ``torch.cuda.is_available()``
keeps telling the truth.

`cpu_flags` chooses, or refuses, the command line flags that go with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replacement:
    """One name the CPU runtime replaces."""

    target: str
    """Dotted name: module, then attributes."""
    reason: str
    """Why it cannot stay, as one sentence."""
    make: Callable[[Any], Any]
    """Builds the replacement from the original."""


_originals: dict[str, Any] = {}
_planning_on_meta = False


def needed() -> bool:
    """Whether this machine has no CUDA device."""
    import torch

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
    # Compiled functions then run as written, also those made before this call or in a child.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Torch's optimizers import it anyway, and it takes stock of torch's names when imported.
    import torch._dynamo

    torch._dynamo.config.disable = True
    _replace(REPLACEMENTS)
    use_wheel_dataset_helpers()
    tracker_log = logging.getLogger("megatron.core.tensor_parallel.random")
    tracker_log.addFilter(_is_not_generator_warning)
    logger.info("no CUDA device: CPU runtime installed, %d names replaced", len(REPLACEMENTS))
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
    utils.compile_helpers = _nothing
    return True


@contextlib.contextmanager
def planning_on_meta() -> Iterator[None]:
    """Within this block, tensors that ask for the current CUDA device are created on ``meta``.

    For planning only: a model built here has no values at all.
    """
    global _planning_on_meta
    before, _planning_on_meta = _planning_on_meta, True
    try:
        yield
    finally:
        _planning_on_meta = before


def _replace(rows: Iterable[Replacement]) -> None:
    for row in rows:
        path, _, name = row.target.rpartition(".")
        owner = pkgutil.resolve_name(path)
        # From __dict__ first, because getattr would unwrap a static method.
        original = vars(owner).get(name) or getattr(owner, name)
        _originals[row.target] = original
        setattr(owner, name, row.make(original))


def _always(replacement: Any) -> Callable[[Any], Any]:
    """For replacements that do not need the original."""
    return lambda original: replacement


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for calls that have nothing to do on the CPU."""


# -- devices ---------------------------------------------------------------------------------------


def _current_device() -> Any:
    import torch

    return torch.device("meta" if _planning_on_meta else "cpu")


def _create_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _current_device()
        return factory(*args, **kwargs)

    return create


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tensor_type(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return tensor_type


def _no_compile(model: Any = None, **options: Any) -> Any:
    return (lambda function: function) if model is None else model


def _torch_cpu(name: str) -> Any:
    import torch

    return getattr(torch.cpu, name)


def _stream_class(original: Any) -> Any:
    import torch

    class Stream(torch.cpu.Stream):
        """A stream that does its work at once, with the arguments of a CUDA stream."""

        def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
            super().__init__(priority)

        def record_event(self, event: Any = None) -> Any:
            return event or torch.cpu.Event()

        def synchronize(self) -> None:
            pass

    return Stream


# -- random numbers --------------------------------------------------------------------------------
# On a GPU there are two generators: the host's, and the device's whose state Megatron's tracker
# swaps. CPU tensors draw from the one default generator, so that one plays the device's part. The
# host's draws are those of data loaders, which get a generator of their own.


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
    import torch

    return torch.default_generator.get_state()


def _set_rng_state(new_state: Any, device: Any = None, graph_safe: bool = False) -> None:
    import torch

    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    import torch

    torch.default_generator.manual_seed(int(seed))


def _data_loader_init(original: Callable[..., None]) -> Callable[..., None]:
    import torch

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        if kwargs.get("generator") is None:
            # Seeded like the host's generator: the same on every start of a run.
            kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        original(self, *args, **kwargs)

    return init


def _is_not_generator_warning(record: logging.LogRecord) -> bool:
    """Drops the tracker's warning that the host generator moved: here it is the device's too."""
    return "CPU RNG state changed" not in record.getMessage()


# -- Megatron --------------------------------------------------------------------------------------


def _allow_no_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(original)(functools.partial(original, allow_no_cuda=True))


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    import torch

    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _norm_new(original: Any) -> Any:
    new = original.__func__ if isinstance(original, staticmethod) else original

    def norm_new(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return new(cls, config, *args, **kwargs)
        import copy

        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        norm = new(cls, unsharded, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(norm_new)


def _optimizer_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(original)
    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        **{key: torch.zeros_like(parameter) for key in self.optimizer_state_keys},
                    }
        return original(self, *args, **kwargs)

    return state_dict


def _optimizer_load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(original)
    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                # One tensor for each: Adam counts in place.
                step = torch.tensor(float(group["step"]), dtype=torch.float32)
                self.optimizer.state[parameter]["step"] = step

    return load_state_dict


def _checkpoint_worker(*args: Any, **kwargs: Any) -> None:
    """The loop of the asynchronous checkpoint writer, in its own process."""
    # Only what the writer meets: the whole table would import the training package.
    _replace(row for row in REPLACEMENTS if row.target.startswith("torch."))
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args, **kwargs)


def _preload_tensors(write_buckets: Any, non_blocking: bool = True) -> Any:
    """Upstream's staging copy; in the writer's process the tensors are the trainer's own memory."""
    if multiprocessing.parent_process() is None:
        return write_buckets
    return [
        (file_name, key, (blobs, [(item, tensor.clone()) for item, tensor in tensors]))
        for file_name, key, (blobs, tensors) in write_buckets
    ]


# -- the table -------------------------------------------------------------------------------------

_DEVICE = "Megatron asks for the CUDA device, which is not there"
_LITERAL = "Megatron creates tensors with the literal device 'cuda'"
_STREAM = "CPU work is done when the call returns, so streams have nothing to order"
_RNG = "CPU tensors draw from the default CPU generator, which plays the device generator's part"
_ADAM = "without Transformer Engine and Apex the distributed optimizer saves but cannot resume"
_WRITER = "megatron.core.dist_checkpointing.strategies"


def _table() -> Iterator[Replacement]:
    def row(target: str, reason: str, make: Callable[[Any], Any]) -> Replacement:
        return Replacement(target=target, reason=reason, make=make)

    yield row("torch.compile", "compiling for the CPU costs minutes and a C++ compiler", _always(_no_compile))
    yield row("torch.cuda.device_count", _DEVICE + "; model parallelism is only set up if there is one", _always(lambda: 1))
    yield row("torch.cuda.current_device", _DEVICE, _always(_current_device))
    yield row("torch.cuda.set_device", _DEVICE, _always(_nothing))
    yield row("torch.cuda.synchronize", _STREAM, _always(_nothing))
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        yield row(f"torch.{name}", _LITERAL, _create_on_cpu)
    yield row("torch.Tensor.cuda", "tensors and modules are already where they are used", _always(lambda self, *args, **kwargs: self))
    yield row("torch.Tensor.type", "the optimizers compare type names with 'torch.cuda.FloatTensor'", _tensor_type)
    yield row("torch.cuda.Stream", _STREAM, _stream_class)
    yield row("torch.cuda.Event", _STREAM, lambda original: _torch_cpu("Event"))
    yield row("torch.cuda.stream", _STREAM, lambda original: _torch_cpu("stream"))
    yield row("torch.cuda.current_stream", _STREAM, lambda original: _torch_cpu("current_stream"))
    yield row("torch.cuda.get_rng_state", _RNG, _always(_get_rng_state))
    yield row("torch.cuda.set_rng_state", _RNG, _always(_set_rng_state))
    yield row("torch.cuda.manual_seed", _RNG, _always(_manual_seed))
    yield row("torch.utils.data.DataLoader.__init__", "a data loader draws from the host's generator, which must stay apart from the device's, and there is no memory to pin", _data_loader_init)
    random = "megatron.core.tensor_parallel.random"
    yield row(f"{random}._get_cuda_rng_state", _RNG, _always(_get_rng_state))
    yield row(f"{random}._set_cuda_rng_state", _RNG, _always(_set_rng_state))
    yield row("megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__", "without Transformer Engine and Apex no norm marks its weight for sequence parallelism", _norm_new)
    yield row("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", "all-to-all needs its split sizes as numbers, and upstream converts CUDA tensors only", _always(_move_to_cpu))
    distrib = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    yield row(f"{distrib}.state_dict", _ADAM + ": it asserts on the empty state of a new run", _optimizer_state_dict)
    yield row(f"{distrib}.load_state_dict", _ADAM + ": all its states share one step count", _optimizer_load_state_dict)
    yield row(f"{_WRITER}.async_utils.PersistentAsyncCaller.async_loop", "the checkpoint writer is a new process that needs these replacements too", _always(staticmethod(_checkpoint_worker)))
    yield row(f"{_WRITER}.filesystem_async.FileSystemWriterAsync.preload_tensors", "CPU tensors reach the checkpoint writer as shared memory that training goes on changing", _always(staticmethod(_preload_tensors)))
    yield row("megatron.training.arguments.get_device_arch_version", "rules for old GPU generations are decided by the device's generation", _always(lambda: 10))
    yield row("megatron.training.training.initialize_megatron", "it asserts that a CUDA device is there", _allow_no_cuda)
    yield row("megatron.training.training.set_jit_fusion_options", "it warms up compiled functions, and none are compiled", _always(_nothing))


REPLACEMENTS: tuple[Replacement, ...] = tuple(_table())
