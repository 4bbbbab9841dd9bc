"""Tensors read from a checkpoint without Megatron are those that Megatron's own reader finds.

Contract: pieces of any layout become the whole tensor, bit for bit in its dtype; what is missing,
cut, compressed or of another format ends in one sentence; nothing in a file is executed.
"""

import pathlib
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_default_moe import UserError
from megatron_default_moe.checkpoint import tensors


def save(folder: pathlib.Path, parts: int = 3) -> dict[str, torch.Tensor]:
    """Write a checkpoint as Megatron does, a tensor in pieces along both axes."""
    wholes = {
        "pieces": torch.randn(6, 4).bfloat16(),
        "whole": torch.randn(5),
        "counts": torch.arange(7),
    }
    state: dict[str, Any] = {}
    rows = 6 // parts
    for i in range(parts):
        for j in range(2):
            piece = wholes["pieces"][i * rows : (i + 1) * rows, 2 * j : 2 * j + 2].contiguous()
            state[f"{i}-{j}"] = ShardedTensor.from_rank_offsets(
                "pieces", piece, (0, i, parts), (1, j, 2)
            )
    for name in ("whole", "counts"):
        state[name] = ShardedTensor.from_rank_offsets(name, wholes[name])
    folder.mkdir(parents=True)
    dist_checkpointing.save(state, str(folder))
    return wholes


@pytest.fixture
def folder(one_rank: None, tmp_path: pathlib.Path) -> tuple[pathlib.Path, dict[str, torch.Tensor]]:
    where = tmp_path / "iter_0000004"
    return where, save(where)


def test_pieces_become_whole_bit_for_bit(folder: Any) -> None:
    where, wholes = folder
    assert tensors.shapes(where) == {name: tuple(one.shape) for name, one in wholes.items()}
    found = tensors.read(where, wholes)
    for name, whole in wholes.items():
        assert found[name].dtype == whole.dtype
        assert torch.equal(found[name], whole)


def test_the_folder_is_the_one_that_megatron_would_load(folder: Any) -> None:
    where, _ = folder
    assert tensors.complete_folder(where) == where
    (where.parent / "latest_checkpointed_iteration.txt").write_text("4")
    assert tensors.complete_folder(where.parent) == where
    assert tensors.complete_folder(where.parent, 4) == where
    with pytest.raises(UserError, match=r"iter_0000009 is missing: choose step 4 with --ckpt-step"):
        tensors.complete_folder(where.parent, 9)
    with pytest.raises(UserError, match=r"is no checkpoint: name the folder that --save named"):
        tensors.complete_folder(where.parent.parent / "typo")


def test_what_is_cut_or_mixed_is_refused(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where, _ = folder
    (data,) = where.glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"is truncated"):
        tensors.complete_folder(where)
    data.write_bytes(b"\0" * len(content))
    with pytest.raises(UserError, match=r"cannot be read \(\w+\): it is damaged"):
        tensors.read(where, ["whole"])
    data.write_bytes(content)
    index = tensors.on_disk.index_of(where)
    lost = next(place for place in index.storage_data if place.fqn == "pieces")
    index.storage_data.pop(lost)
    monkeypatch.setattr(tensors.on_disk, "index_of", lambda folder: index)
    with pytest.raises(UserError, match=r"holds 20 of the 24 numbers of pieces"):
        tensors.read(where, ["pieces"])


def test_another_format_is_named(tmp_path: pathlib.Path) -> None:
    older = tmp_path / "iter_0000001" / "mp_rank_00"
    older.mkdir(parents=True)
    torch.save({"model": {}}, older / "model_optim_rng.pt")
    with pytest.raises(UserError, match=r"is not of --ckpt-format torch_dist"):
        tensors.complete_folder(older.parent)
