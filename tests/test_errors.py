"""A mistake is said once, by rank 0, unless only another node met it; before a GPU is touched."""

import pytest
import torch

from megatron_default_moe import UserError, errors
from megatron_default_moe.loop import command_line


@pytest.mark.parametrize(
    ("rank", "local_rank", "said", "waited"),
    [
        (None, None, "error: no such flag\n", []),
        ("0", "0", "error: no such flag\n", []),
        ("1", "1", "", [errors.HEAD_START]),
        ("8", "0", "error: rank 8: no such flag\n", [errors.HEAD_START]),
        ("9", "1", "", [errors.HEAD_START]),
    ],
)
def test_who_says_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str | None,
    local_rank: str | None,
    said: str,
    waited: list[float],
) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    assert errors.report(UserError("no such flag")) == 2
    assert capsys.readouterr().err == said
    assert slept == waited


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "1"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=r"8 ranks on a node with 4 GPUs: --nproc-per-node 4 "):
        command_line._refuse_ranks_without_gpu({"LOCAL_WORLD_SIZE": "8", **torchrun})
    command_line._refuse_ranks_without_gpu({"LOCAL_WORLD_SIZE": "4", **torchrun})
    command_line._refuse_ranks_without_gpu({"LOCAL_WORLD_SIZE": "8"})
    command_line._refuse_ranks_without_gpu({})
