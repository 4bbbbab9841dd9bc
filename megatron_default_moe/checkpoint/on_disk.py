"""What is on disk of a checkpoint, without loading it: names, shapes, damage."""

import dataclasses
import io
import json
import pathlib
import pickle
from collections import defaultdict
from typing import Any

from megatron_default_moe.checkpoint import safe_pickle
from megatron_default_moe.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the latest complete iteration."""

INDEX = ".metadata"
"""The file that says which tensor lies where; written after all data."""

FORMAT = "metadata.json"
"""The file that names the format; written last."""

COMMON, COMMON_KEY = "common.pt", "common_state/shard_0_1"
"""What all ranks share: a file of its own once, an entry of the index today."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint that Megatron will load."""

    flag: str
    """The flag and its value, which messages begin with."""
    folder: pathlib.Path
    pretrained: bool = False
    """Named by --pretrained-checkpoint: weights only, as with --finetune."""


def folder_of(directory: str | pathlib.Path, step: int | None = None) -> pathlib.Path | None:
    """Return the folder of a checkpoint directory that Megatron would load, or None.

    Args:
        directory: what ``--load`` names.
        step: the iteration ``--ckpt-step`` asks for; None is the latest complete one.

    Raises:
        UserError: the file that names the latest iteration is broken.
    """
    root = pathlib.Path(directory)
    if step is not None:
        return root / f"iter_{step:07d}"
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    name = tracker.read_text(errors="replace").strip()
    if name == "release":
        return root / name
    if not name.isdecimal():
        raise UserError(
            f"{tracker} should hold the number of the latest complete iteration, not {name!r}:"
            f" write it there, or choose one with --ckpt-step{_newest_hint(root)}"
        )
    return root / f"iter_{int(name):07d}"


def _newest_hint(root: pathlib.Path) -> str:
    step = newest_complete(root)
    return "" if step is None else f"; the newest complete one is {step}"


def index_of(folder: pathlib.Path) -> Any:
    """Return torch's index of a checkpoint (``torch.distributed.checkpoint`` Metadata).

    Raises:
        pickle.UnpicklingError: it is not made as an index is (see ``safe_pickle.read_index``).
        Exception: of many kinds, if the file is not a whole pickle.
    """
    with (folder / INDEX).open("rb") as stream:
        return safe_pickle.read_index(stream, folder)


def older_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of the first tensor-parallel rank in ``--ckpt-format torch``, if it is that.

    There is one for each pipeline stage and expert-parallel rank.
    """
    return sorted(folder.glob("mp_rank_00*/model_optim_rng.pt"))


def keys(folder: pathlib.Path) -> set[str] | None:
    """Return the tensor names of a checkpoint, or None for formats that are not known."""
    if (folder / INDEX).is_file():
        return set(index_of(folder).state_dict_metadata)
    older = older_files(folder)
    if not older:
        return None
    names: set[str] = set()
    for path in older:
        state = safe_pickle.read_file(path)
        for part, weights in state.items():
            if part.startswith("model"):  # and a number, on an interleaved pipeline
                names |= set(weights)
    return names


def damage(folder: pathlib.Path, torch_dist: bool = True) -> str | None:
    """Say what is missing or too short in a checkpoint folder, or None if it is whole.

    Compares the length of every data file with what the index places in it: the cost is one look
    at each file's entry, no data is read.

    Args:
        folder: of one iteration.
        torch_dist: the format that is expected; other formats of torch's have the same index, but
            no file that names the format, and of Megatron's older one each file is opened.
    """
    if not folder.is_dir():
        return f"the folder {folder} is missing"
    for path in older_files(folder):
        try:
            safe_pickle.read_file(path)
        except Exception as error:
            why = error if isinstance(error, pickle.UnpicklingError) else type(error).__name__
            return f"the file {path} is damaged ({why})"
    if not (any(folder.glob("*.distcp")) or (folder / INDEX).exists() or _is_torch_dist(folder)):
        return None
    for name in (INDEX, FORMAT) if torch_dist else (INDEX,):
        if not (folder / name).is_file():
            return f"the file {folder / name} is missing (saving was interrupted?)"
    try:
        if torch_dist:
            json.loads((folder / FORMAT).read_text())
    except ValueError:
        return f"the file {folder / FORMAT} is damaged"
    try:
        stored = index_of(folder).storage_data.values()
    except Exception as error:
        why = error if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        return f"the file {folder / INDEX} is damaged ({why})"
    ends: dict[str, int] = defaultdict(int)
    for item in stored:
        ends[item.relative_path] = max(ends[item.relative_path], item.offset + item.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            return f"the file {path} is missing"
        if (size := path.stat().st_size) < end:
            return f"the file {path} is truncated ({size:,} bytes of at least {end:,})"
    return None


def _is_torch_dist(folder: pathlib.Path) -> bool:
    return (folder / FORMAT).is_file() and "torch_dist" in (folder / FORMAT).read_text()


def newest_complete(
    directory: str | pathlib.Path, besides: pathlib.Path | None = None
) -> int | None:
    """Return the step of the newest whole checkpoint in a directory, or None.

    Args:
        directory: what ``--load`` names.
        besides: a folder to leave out.
    """
    for folder in sorted(pathlib.Path(directory).glob("iter_*"), reverse=True):
        step = folder.name.removeprefix("iter_")
        if not step.isdecimal() or folder == besides or not (folder / INDEX).is_file():
            continue
        if damage(folder) is None:
            return int(step)
    return None


def common_state(folder: pathlib.Path) -> dict[str, Any]:
    """Return what all ranks share of a checkpoint: ``args``, ``content_metadata`` and more.

    Raises:
        Exception: of many kinds, if the data is corrupt or names what a checkpoint has no use for.
    """
    for path in older_files(folder)[:1]:
        whole: dict[str, Any] = safe_pickle.read_file(path)
        return whole
    if (folder / COMMON).is_file():  # Megatron before 0.18
        with (folder / COMMON).open("rb") as stream:
            older: dict[str, Any] = safe_pickle.read_state(stream, "cpu", without_megatron=True)
        return older
    places = {place.fqn: item for place, item in index_of(folder).storage_data.items()}
    item = places[COMMON_KEY]
    with (folder / item.relative_path).open("rb") as stream:
        stream.seek(item.offset)
        data = io.BytesIO(stream.read(item.length))
    state: dict[str, Any] = safe_pickle.read_state(data, "cpu", without_megatron=True)[0]
    return state
