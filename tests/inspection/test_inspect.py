"""``default-moe inspect``: the numbers of a real checkpoint's routers, and a page of them.

Contract: layers are numbered as the metrics number them, prediction layers last; the numbers are
those of a naive computation on the tensors that the run saved; no Megatron is imported.
"""

import csv
import math
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from training_line import TRAIN

from megatron_default_moe.inspection import command, routers
from megatron_default_moe.inspection.routers import Router

HEAD = "decoder.layers"


def test_cosines_against_a_naive_computation() -> None:
    rows_ED = torch.randn(5, 7, dtype=torch.float64)
    naive = [
        float(a @ b / (a.norm() * b.norm()))
        for i, a in enumerate(rows_ED)
        for j, b in enumerate(rows_ED)
        if i != j
    ]
    assert routers.mean_cosine(rows_ED) == pytest.approx(sum(naive) / len(naive))
    eigenvalues = torch.linalg.eigvalsh(routers.cosines(rows_ED))
    ratio = float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
    assert routers.directions(rows_ED) == pytest.approx(ratio)


def test_the_ends_of_diversity() -> None:
    assert routers.directions(torch.eye(6)) == pytest.approx(6)
    assert routers.mean_cosine(torch.eye(6)) == 0
    same = torch.ones(6, 4) * torch.arange(1, 7).unsqueeze(1)
    assert routers.directions(same) == pytest.approx(1)
    assert routers.mean_cosine(same) == pytest.approx(1)
    assert routers.directions(torch.zeros(3, 4)) == 0
    assert math.isnan(routers.mean_cosine(torch.ones(1, 4)))


def save(folder: pathlib.Path, state: dict[str, torch.Tensor], **args: Any) -> None:
    """A checkpoint in Megatron's format with these tensors and arguments."""
    import argparse

    folder.mkdir(parents=True)
    parts: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, one) for name, one in state.items()
    }
    dist_checkpointing.save(parts | {"args": argparse.Namespace(**args)}, str(folder))


def test_layers_by_depth_and_vectors_as_the_model_uses_them(
    one_rank: None, tmp_path: pathlib.Path
) -> None:
    """Layers of their own, one of them dense, and a prediction layer; vectors bias-corrected."""
    folder = tmp_path / "iter_0000003"
    weights = {name: torch.randn(3, 4) for name in (f"{HEAD}.10", f"{HEAD}.2", "mtp.layers.0")}
    vectors, updates = torch.randn(3, 4), torch.tensor([0, 1, 5])
    state = {}
    for name, weight in weights.items():
        inner = f"{name}.transformer_layer" if "mtp" in name else name
        state[f"{inner}.mlp.router.weight"] = weight
        state[f"{inner}.mlp.router.default_vectors"] = vectors
        state[f"{inner}.mlp.router.default_vector_updates"] = updates
        state[f"optimizer.state.exp_avg.{inner}.mlp.router.weight"] = weight
    save(folder, state, num_layers=11, default_vector_bias_correction=True, default_vector_beta=0.9)
    found = routers.read_routers(folder)
    assert [(one.layer, one.name) for one in found] == [(2, "2"), (10, "10"), (11, "mtp 0")]
    for router, name in zip(found, (f"{HEAD}.2", f"{HEAD}.10", "mtp.layers.0"), strict=True):
        assert torch.equal(router.weight_ED, weights[name])
        assert router.vectors_ED is not None
        scales = [1, 1 / (1 - 0.9), 1 / (1 - 0.9**5)]
        for row, scale in enumerate(scales):
            torch.testing.assert_close(router.vectors_ED[row], vectors[row] * scale)
    numbers = routers.measures(found[0])
    assert (numbers["fewest updates"], numbers["most updates"]) == (0, 5)
    assert numbers["never updated"] == 1


def test_a_checkpoint_without_experts_is_named(
    one_rank: None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "iter_0000001", {f"{HEAD}.mlp.linear_fc1.weight": torch.ones(2, 3)})
    assert command.main([str(tmp_path / "iter_0000001"), "--output-dir", str(tmp_path / "o")]) == 2
    assert "has no router: it is not of a model with --num-experts" in capsys.readouterr().err
    assert not (tmp_path / "o").exists(), "an empty folder was left behind"


def test_of_a_topk_checkpoint_the_router_is_shown(tmp_path: pathlib.Path) -> None:
    numbers = routers.measures(Router(0, "0", torch.eye(3)))
    assert numbers == {"router norm": 1.0, "router cosine": 0.0}


@pytest.mark.launch
def test_a_run_is_inspected_without_megatron(tmp_path: pathlib.Path) -> None:
    """A real run's checkpoint, in a process that imports no Megatron, with the logged load."""
    run = [
        *TRAIN[1:],
        "--num-layers",
        "3",
        "--save",
        str(tmp_path / "ck"),
        "--save-interval",
        "3",
        "--train-iters",
        "3",
    ]
    run += ["--tensorboard-dir", str(tmp_path / "tb"), "--moe-per-layer-logging"]
    pretrain = [sys.executable, "-m", "megatron_default_moe.pretrain", *run]
    subprocess.run(pretrain, check=True, capture_output=True, timeout=300)
    program = (
        "import sys; from megatron_default_moe.inspection import command;"
        "code = command.main(sys.argv[1:]);"
        "assert not [m for m in sys.modules if m.startswith('megatron.')], 'Megatron was imported';"
        "sys.exit(code)"
    )
    out = tmp_path / "out"
    shown = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "ck"), "--output-dir", str(out)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    with (out / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 1, shown
    assert [row["layer"] for row in rows] == [str(i) for i in range(len(rows))]
    for row in rows:
        assert float(row["vector norm"]) > 0
        assert int(row["most updates"]) == 3
        assert 1 <= float(row["load max/mean"]) < 9
    assert (out / "inspect.png").read_bytes().startswith(b"\x89PNG")
