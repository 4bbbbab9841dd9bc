"""Checkpoints read as data: no pickle in them may name a function to run.

A ``torch_dist`` folder holds two kinds of pickle: the index (``.metadata``), which torch reads with
a plain ``pickle.load``, and what is no tensor (arguments, schedule, random state), which torch's
default planner reads with ``weights_only=False``. Both would execute what a stranger's file says.
Here the index is read by an unpickler that knows the classes of an index and no others; the rest
with ``weights_only=True``, extended by the few kinds of class that Megatron's checkpoints hold. The
checks before training and Megatron's own loading (rows of ``loop/patches.py``) go through here.
"""

import enum
import functools
import io
import pathlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict", "defaultdict"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
}
"""What an index is made of: classes that only hold values (and torch's dtypes)."""

STATE_CLASSES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.timedelta",
    "_io.BytesIO",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
)
"""What the state that is no tensor may hold besides what ``weights_only`` knows, and enums."""


class Unknown:
    """Stands for a value of Megatron's where Megatron is not imported: kept, never used."""

    def __new__(cls, *values: Any) -> "Unknown":
        """Ignore what the class would have been built from."""
        return super().__new__(cls)


class IndexUnpickler(pickle.Unpickler):
    """An unpickler for ``.metadata`` that refuses every name an index has no use for."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of an index.

        Raises:
            pickle.UnpicklingError: the name is another one.
        """
        import torch

        if name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index holds")


def read_index(stream: Any, folder: str | pathlib.Path) -> Any:
    """Read a checkpoint's index (torch's ``Metadata``) without executing anything.

    Args:
        stream: the open file ``.metadata``.
        folder: where its data files lie.

    Raises:
        pickle.UnpicklingError: it names something that an index does not hold, or a data file
            outside of the folder.
        Exception: of many kinds, if it is no whole pickle.
    """
    index = IndexUnpickler(stream).load()
    for item in index.storage_data.values():
        name = pathlib.PurePosixPath(item.relative_path)
        if name.is_absolute() or ".." in name.parts:
            raise pickle.UnpicklingError(f"it places data in {name}, outside of {folder}")
    return index


def read_state(stream: Any, device: str | None = None, *, without_megatron: bool = False) -> Any:
    """Read what is no tensor (``torch.save`` of arguments, counters, random state) as data.

    Args:
        stream: seekable, from the first byte of the archive.
        device: where tensors inside go; None is where they were.
        without_megatron: values of Megatron's classes whose module is not imported are ``Unknown``,
            for a reader of the arguments alone; nothing that trains may go on with such a value.

    Raises:
        pickle.UnpicklingError: it names a class that is neither torch's, nor of ``STATE_CLASSES``,
            nor an enum of a module that is already imported.
    """
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    start = stream.tell()
    allowed = _allowed(get_unsafe_globals_in_checkpoint(stream), without_megatron)
    stream.seek(start)
    with safe_globals(allowed):
        return torch.load(stream, map_location=device, weights_only=True)


def read_file(path: pathlib.Path) -> Any:
    """Read a file of ``--ckpt-format torch`` as data; its tensors stay on disk until they are used.

    Raises:
        pickle.UnpicklingError: as :func:`read_state`.
        Exception: of many kinds, if it is no whole archive.
    """
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    with safe_globals(_allowed(get_unsafe_globals_in_checkpoint(path))):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _allowed(names: list[str], without_megatron: bool = False) -> list[Any]:
    """What ``weights_only`` has to be told of these names, besides the dtypes of numpy.

    Raises:
        pickle.UnpicklingError: one of them is not harmless.
    """
    import numpy

    allowed: list[Any] = [kind for kind in vars(numpy.dtypes).values() if isinstance(kind, type)]
    for name in names:
        found = _harmless(name)
        module = name.rpartition(".")[0]
        if without_megatron and name.startswith("megatron.") and module not in sys.modules:
            found = Unknown
        if found is None:
            raise pickle.UnpicklingError(f"it names {name}, which no state of Megatron's holds")
        allowed.append((found, name))
    return allowed


def _harmless(name: str) -> Any:
    """The class of that name if building it only holds values; never imports a module."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    if name in STATE_CLASSES:
        return found
    return found if isinstance(found, type) and issubclass(found, enum.Enum) else None


def with_safe_index(read_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch's ``FileSystemReader.read_metadata``: the same, without executing anything.

    Args:
        read_metadata: upstream's method; `rank` names one rank's own index.
    """
    from torch.distributed.checkpoint.metadata import StorageMeta

    @functools.wraps(read_metadata)
    def read_safely(reader: Any, *args: Any, **kwargs: Any) -> Any:
        path = reader._get_metadata_path(kwargs.get("rank"))
        with reader.fs.create_stream(path, "rb") as stream:
            index = read_index(stream, reader.path)
        if getattr(index, "storage_meta", None) is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = reader.load_id
        return index

    return read_safely


def with_safe_state(load_bytes: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch's ``DefaultLoadPlanner.load_bytes``: what comes from a file is read as data.

    Upstream's method then gets an archive of what was read, whose pickle is our own.

    Args:
        load_bytes: upstream's method.
    """
    import torch

    @functools.wraps(load_bytes)
    def load_safely(planner: Any, read_item: Any, value: io.BytesIO) -> None:
        archive = io.BytesIO()
        torch.save(read_state(value), archive)
        archive.seek(0)
        load_bytes(planner, read_item, archive)

    return load_safely
