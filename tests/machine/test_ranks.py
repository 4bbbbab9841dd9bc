"""Contract: a process knows which rank of which run it is, or nothing is trained.

Tasks of a launcher that gave no ranks are refused, each by itself; so is a run on the CPU where a
GPU should be, and one whose ranks have different kinds of devices: in one sentence on every rank,
exit code 2, before any process group is built.
"""

import os
import pathlib
import socket
import threading

import pytest
import torch

from megatron_default_moe import pretrain
from megatron_default_moe.errors import UserError
from megatron_default_moe.machine import ranks

RANK = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "16", "PMI_RANK": "0"},
        {"MV2_COMM_WORLD_SIZE": "2"},
        {"FLUX_JOB_SIZE": "2"},
        {"JSM_NAMESPACE_SIZE": "2"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_tasks_without_ranks_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"RANK is not set.* torchrun .*examples/launch"):
        ranks.prepare(environment)
    # With ranks, from torchrun or by hand, they are what they say.
    ranks.prepare(environment | RANK)
    assert ranks.one_of_several(environment | RANK)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "8"},  # The shell of an allocation is none of its tasks.
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "RANK": "0", "WORLD_SIZE": "1"},
        {"MASTER_ADDR": "elsewhere"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_a_single_task_is_a_run_of_its_own(environment: dict[str, str]) -> None:
    ranks.prepare(environment)
    assert ALONE.items() <= environment.items()
    assert environment["MASTER_PORT"] == "0"


def test_the_only_rank_of_torchrun_keeps_where_its_store_is() -> None:
    environment = RANK | {"RANK": "0", "WORLD_SIZE": "1"}
    before = dict(environment)
    ranks.prepare(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"RANK": None}, "RANK is not"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not"),
        ({"LOCAL_RANK": None, "WORLD_SIZE": ""}, "WORLD_SIZE, LOCAL_RANK is not"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"RANK": "2"}, "no rank of a run"),
        ({"RANK": "one"}, "no rank of a run"),
    ],
)
def test_half_a_rank_is_refused(change: dict[str, str | None], says: str) -> None:
    environment = {name: value for name, value in (RANK | change).items() if value is not None}
    said = []
    for check in (ranks.prepare, ranks.refuse_no_meeting_place):
        try:
            check(environment)
        except UserError as error:
            said.append(str(error))
    assert says in said[0]


def test_a_broken_gpu_is_refused_unless_the_cpu_is_chosen(tmp_path: pathlib.Path) -> None:
    programs = tmp_path / "bin"
    devices = tmp_path / "dev"
    programs.mkdir()
    devices.mkdir()
    nothing = {"PATH": str(programs)}
    (devices / "nvidiactl").touch()
    ranks.refuse_broken_gpu(nothing, devices)  # A machine without a GPU trains on its CPU.
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES=0,1\) and torch cannot"):
        ranks.refuse_broken_gpu(nothing | {"CUDA_VISIBLE_DEVICES": "0,1"}, devices)
    (programs / "nvidia-smi").touch(mode=0o755)
    with pytest.raises(UserError, match=r"bin/nvidia-smi\)"):
        ranks.refuse_broken_gpu(nothing, devices)
    (devices / "nvidia0").touch()
    with pytest.raises(UserError, match=r"dev/nvidia0\).*default-moe doctor"):
        ranks.refuse_broken_gpu(nothing, devices)
    for chosen in ("", "-1"):
        ranks.refuse_broken_gpu(nothing | {"CUDA_VISIBLE_DEVICES": chosen}, devices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU here works")
@pytest.mark.parametrize(
    "environment",
    [{"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, {"CUDA_VISIBLE_DEVICES": "0"}],
    ids=["tasks", "gpu"],
)
def test_the_entry_refuses_before_any_work(
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in RANK:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as guarded:
        # What `prepare` writes into the environment goes again.
        guarded.setattr(os, "environ", os.environ.copy())
        assert pretrain.main(["--mock-data"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert next(iter(environment)).split("_")[0] in said


def on_all(devices: list[str]) -> list[str | None]:
    """What each rank is told, if these are their devices."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told: list[str | None] = [None] * len(devices)

    def agree(rank: int) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False)
        try:
            ranks.agree_on_device(store, rank, len(devices), devices[rank] == "cpu")
        except UserError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=agree, args=(rank,)) for rank in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return told


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_ranks_of_one_kind_agree(device: str) -> None:
    assert on_all([device] * 4) == [None] * 4


@pytest.mark.parametrize("odd", [0, 2])
def test_ranks_of_two_kinds_are_all_told_so(odd: int) -> None:
    devices = ["gpu"] * 4
    devices[odd] = "cpu"
    told = on_all(devices)
    assert len(set(told)) == 1
    (said,) = {*told}
    assert said is not None
    assert f"rank {odd} has the CPU ({socket.gethostname()})" in said
    assert f"rank {1 if odd == 0 else 0} has a GPU" in said
