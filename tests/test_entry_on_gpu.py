"""What the entry chooses on a GPU machine: its own flags for libraries that are not there.

There is no GPU here: the question whether there is one is answered with yes, and the run ends where
Megatron would start.
"""

import sys
import types
from typing import Any

import pytest
import torch

from megatron_default_moe import cpu, pretrain

NO_FUSION = "--no-gradient-accumulation-fusion"
LINE = (
    "--num-experts 8 --moe-router-topk 1 --moe-router-pre-softmax --mock-data"
    " --moe-router-load-balancing-type aux_loss"
)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that reach Megatron."""
    reached: list[list[str]] = []

    def take(argv: list[str]) -> Any:
        reached.append(argv)

    monkeypatch.setattr(cpu, "needed", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(pretrain, "megatron_args", take)
    monkeypatch.setenv("RANK", "0")
    return reached


def test_without_apex_its_kernel_is_not_asked_for(
    prepared: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.prepare(LINE.split())
    pretrain.prepare([*LINE.split(), NO_FUSION])
    assert prepared == [[*LINE.split(), NO_FUSION]] * 2
    assert (
        capsys.readouterr().out.count("> no Apex: chosen --no-gradient-accumulation-fusion\n") == 1
    )


def test_with_apex_nothing_is_added(
    prepared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "fused_weight_gradient_mlp_cuda"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    pretrain.prepare(LINE.split())
    assert prepared == [LINE.split()]
