"""The layer with context parallelism 2 does what it does on one rank, in both orders."""

import pathlib

import pytest
import torch
from launching import HERE, torchrun

pytestmark = pytest.mark.launch


def test_half_of_each_sequence_on_each_rank_changes_nothing(tmp_path: pathlib.Path) -> None:
    results = {}
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        done = torchrun(ranks, [str(HERE / "layer_cp.py"), str(out)], timeout=300)
        assert done.returncode == 0, done.stdout[-3000:]
        results[ranks] = torch.load(out)
    for order, expected in results[1].items():
        for tensor, same in zip(results[2][order], expected, strict=True):
            assert expected[0].norm() > 0
            assert (tensor - same).norm() / same.norm() < 1e-5, order
