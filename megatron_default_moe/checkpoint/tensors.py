"""Tensors of a ``torch_dist`` checkpoint, whole whatever the layout was; torch alone, no Megatron.

Nothing pickled is executed: the index is read by ``safe_pickle``, the pieces with ``weights_only``.
"""

import io
import pathlib
import pickle
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron_default_moe.checkpoint import on_disk
from megatron_default_moe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def complete_folder(directory: str | pathlib.Path, step: int | None = None) -> pathlib.Path:
    """Return the folder of one whole checkpoint.

    Args:
        directory: what ``--save`` named, or the folder of one iteration.
        step: of the iteration; None is the latest complete one.

    Raises:
        UserError: there is none, it is damaged, or it is of another format.
    """
    root = pathlib.Path(directory)
    if (root / on_disk.INDEX).is_file() or on_disk.older_files(root):
        folder: pathlib.Path | None = root
    else:
        folder = on_disk.folder_of(root, step)
    if folder is None:
        raise UserError(
            f"{root} is no checkpoint: name the folder that --save named, or one of its iter_*"
        )
    if what := on_disk.damage(folder):
        newest = on_disk.newest_complete(root, besides=folder)
        way_out = "choose another" if newest is None else f"choose step {newest} with --ckpt-step"
        raise UserError(f"{what}: {way_out}")
    if not (folder / on_disk.INDEX).is_file():
        raise UserError(
            f"{folder} is not of --ckpt-format torch_dist, the only one that is read here: load it"
            " once with --ckpt-format torch --ckpt-convert-format torch_dist"
        )
    return folder


def shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, by name; optimizer state included."""
    stored = on_disk.index_of(folder).state_dict_metadata
    return {name: tuple(one.size) for name, one in stored.items() if hasattr(one, "chunks")}


def read(folder: pathlib.Path, names: Iterable[str]) -> dict[str, "Tensor"]:
    """Read whole tensors in the dtype they were saved in.

    Args:
        folder: of one iteration.
        names: of its tensors.

    Raises:
        UserError: pieces of one are missing, or cannot be read.
        KeyError: there is no tensor of that name.
    """
    import torch

    index = on_disk.index_of(folder)
    pieces: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for place, item in index.storage_data.items():
        pieces[place.fqn].append((place, item))
    result = {}
    for name in names:
        stored = index.state_dict_metadata[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        covered = 0
        for place, item in pieces[name]:
            piece = _piece(folder, item)
            begin = place.offset if place.offset is not None else [0] * piece.dim()
            where = tuple(slice(a, a + n) for a, n in zip(begin, piece.shape, strict=True))
            tensor[where] = piece
            covered += piece.numel()
        if covered != tensor.numel():
            raise UserError(
                f"{folder} holds {covered:,} of the {tensor.numel():,} numbers of {name}: saving"
                " was interrupted, or files of two checkpoints were mixed; choose another one"
            )
        result[name] = tensor
    return result


def _piece(folder: pathlib.Path, item: Any) -> "Tensor":
    import torch

    if getattr(item, "transform_descriptors", None):
        raise UserError(f"{folder} holds compressed tensors, which are not read here")
    path = folder / item.relative_path
    try:
        with path.open("rb") as stream:
            stream.seek(item.offset)
            data = io.BytesIO(stream.read(item.length))
        piece: Tensor = torch.load(data, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is damaged") from error
    return piece
