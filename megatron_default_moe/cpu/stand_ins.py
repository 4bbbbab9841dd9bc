"""What the CPU runtime puts in the place of CUDA names; `replacements` says where and why.

A function named after its result, such as `created_on_cpu`, takes the original and returns the
replacement. All others are the replacement itself.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

planning_on_meta = False
"""Whether the current device is ``meta``; set by `runtime.planning_on_meta`."""

# -- Devices and streams ---------------------------------------------------------------------------


def nothing(*args: Any, **kwargs: Any) -> None:
    """For calls that have nothing to do on the CPU."""


def itself(value: Any, *args: Any, **kwargs: Any) -> Any:
    """For moves to a device where the value is already."""
    return value


def current_device() -> torch.device:
    """For ``torch.cuda.current_device``, which Megatron passes on as ``device=``."""
    return torch.device("meta" if planning_on_meta else "cpu")


def created_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that takes ``device="cuda"`` for the current device."""

    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = current_device()
        return original(*args, **kwargs)

    return create


def typed_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type`` that names the CUDA type of the same precision."""

    @functools.wraps(original)
    def tensor_type(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return tensor_type


def no_compile(model: Any = None, **options: Any) -> Any:
    """For ``torch.compile`` in both its forms: the function stays as written."""
    return itself if model is None else model


class Stream(torch.cpu.Stream):
    """For ``torch.cuda.Stream``: takes its arguments, and does its work at once."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        super().__init__(priority)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the lowest and the highest priority, as many as there are on a GPU."""
        return 0, -1

    def record_event(self, event: Any = None) -> Any:
        """Return an event that has already happened."""
        return torch.cpu.Event() if event is None else event

    def synchronize(self) -> None:
        """Return at once."""


# -- Random numbers --------------------------------------------------------------------------------
# On a GPU there are two generators: the host's, and the device's, whose state Megatron's tracker
# swaps. CPU tensors draw from torch's one default generator, so that plays the device's part; the
# host's draws in a training run are the data loaders', which get a generator of their own.


def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
    """For the state of the CUDA generator."""
    return torch.default_generator.get_state()


def set_rng_state(new_state: Any, device: Any = None, graph_safe: bool = False) -> None:
    """For setting the state of the CUDA generator."""
    torch.default_generator.set_state(new_state)


def manual_seed(seed: int) -> None:
    """For seeding the CUDA generator."""
    torch.default_generator.manual_seed(int(seed))


def loading_for_cpu(original: Callable[..., None]) -> Callable[..., None]:
    """A ``DataLoader.__init__`` without pinned memory and with the loader's own generator."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        original(self, *args, **kwargs)

    return init


def is_not_generator_warning(record: logging.LogRecord) -> bool:
    """Log filter for the tracker, which warns whenever the host's generator moves."""
    return "CPU RNG state changed" not in record.getMessage()


# -- Megatron: start and model ---------------------------------------------------------------------


def allowing_no_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """``initialize_megatron`` without its assertion."""
    return functools.wraps(original)(functools.partial(original, allow_no_cuda=True))


def materialised_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """``to_empty_if_meta_device`` onto the current device."""

    @functools.wraps(original)
    def to_empty(module: Any, *, device: Any, recurse: bool = True) -> Any:
        return original(module, device=current_device(), recurse=recurse)

    return to_empty


def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """For ``maybe_move_tensor_to_cpu``, which leaves tensors that are there already untouched."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def norm_with_sequence_parallelism(original: Any) -> Any:
    """``WrappedTorchNorm.__new__`` that marks its weight where upstream only asserts."""

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        norm = original(cls, unsharded, *args, **kwargs)
        # Each rank sees its part of the sequence: Megatron sums marked gradients over the ranks.
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return new


# -- Megatron: distributed optimizer ---------------------------------------------------------------


def with_first_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """``state_dict`` of a new optimizer: upstream reads the step from states it does not have."""

    @functools.wraps(original)
    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    state = {key: torch.zeros_like(parameter) for key in self.optimizer_state_keys}
                    self.optimizer.state[parameter] = {"step": torch.zeros(()), **state}
        return original(self, *args, **kwargs)

    return state_dict


def with_own_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_state_dict``: upstream gives all states one step tensor, and Adam counts in place."""

    @functools.wraps(original)
    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    return load_state_dict


def without_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_set_main_param_and_optimizer_states``: the step travels in the parameter groups.

    And in fp32 the main parameter is a view of the model's, which requires a gradient: upstream
    writes to it in place.
    """

    @functools.wraps(original)
    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {**tensors, "step": None})

    return set_states


# -- Megatron: uneven collectives ------------------------------------------------------------------
# NCCL gathers pieces of different lengths; gloo wants them equal. They are padded to the longest.


def _padded(piece: Any, length: int) -> Any:
    return torch.cat([piece, piece.new_zeros(length - piece.shape[0], *piece.shape[1:])])


def _for_uneven(uneven: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Leave even pieces to upstream; call ``uneven(input_, group, sizes)`` for the others."""

    def replacing(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            # Upstream names the sizes by whether they are of the input or of the output.
            input_, group, sizes = (*signature.bind(*args, **kwargs).args, None)[:3]
            if sizes is None or len(set(sizes)) == 1:
                return original(*args, **kwargs)
            return uneven(input_, group, sizes)

        return collective

    return replacing


def _gather(input_: Any, group: Any, sizes: list[int]) -> Any:
    length = max(sizes)
    pieces = [input_.new_empty(length, *input_.shape[1:]) for _ in sizes]
    torch.distributed.all_gather(pieces, _padded(input_, length), group=group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def _reduce_scatter(input_: Any, group: Any, sizes: list[int]) -> Any:
    length = max(sizes)
    pieces = [_padded(piece, length) for piece in input_.split(sizes)]
    output = torch.empty_like(pieces[0])
    torch.distributed.reduce_scatter(output, pieces, group=group)
    return output[: sizes[group.rank()]]


gather_uneven = _for_uneven(_gather)
"""For ``_gather_along_first_dim`` with the row counts of the ranks."""

reduce_scatter_uneven = _for_uneven(_reduce_scatter)
"""For ``_reduce_scatter_along_first_dim`` with the row counts of the ranks."""


# -- Megatron: asynchronous checkpoint writer ------------------------------------------------------


def preload_tensors(write_buckets: Any, non_blocking: bool = True) -> Any:
    """For the copy to the host, for which the trainer waits.

    In the writer's process the tensors are the trainer's own memory, so they are copied there;
    a checkpoint written by the trainer itself needs no copy.
    """
    if multiprocessing.parent_process() is None:
        return write_buckets
    return [
        (file_name, key, (blobs, [(item, tensor.clone()) for item, tensor in tensors]))
        for file_name, key, (blobs, tensors) in write_buckets
    ]
