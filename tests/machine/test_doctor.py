"""The doctor: one finding per cause, on machines that are not this one, and on this one."""

import dataclasses
import resource
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from megatron_default_moe.machine import facts as facts
from megatron_default_moe.machine.doctor import RECIPES, examine, version
from megatron_default_moe.machine.facts import Gpu, Machine, look

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
H100 = Gpu(name="H100", count=8, capability=(9, 0), memory=80 * GIB)
CPU = Machine(
    python=(3, 12),
    torch="2.15.0+cu132",
    cuda="13.0",
    arch_list=("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"),
    nccl=(2, 29, 7),
    versions={"megatron-core": "0.19.2", "omegaconf": "2.4.0", "triton": "3.7.1"},
    megatron=(0, 19, 2),
    megatron_training=True,
    dataset_helper=True,
    shared_memory=64 * GIB,
    open_files=65536,
)
"""A healthy machine without a GPU."""

HOPPER = dataclasses.replace(
    CPU,
    driver="580.95.05",
    gpus=(H100,),
    versions={**CPU.versions, "transformer-engine": "2.17.1+4fe7b07"},
    apex_present=True,
    apex_is_nvidia=True,
    wgrad_kernel=True,
)


def found(machine, what, **options):
    """The one finding about `what`."""
    (finding,) = (f for f in examine(machine, **options) if f.what == what)
    return finding


def bad(machine, **options):
    return [finding.what for finding in examine(machine, **options) if finding.verdict == "bad"]


def with_gpu(capability, **changes):
    gpu = dataclasses.replace(H100, name="chip", capability=capability)
    return dataclasses.replace(HOPPER, gpus=(gpu,), **changes)


def test_nothing_is_bad_on_healthy_machines():
    assert bad(CPU) == []
    assert bad(HOPPER) == []
    assert found(CPU, "GPU").verdict == "off"
    assert found(HOPPER, "GPU").why == "8 x H100, 80 GiB, sm_90"
    assert str(found(HOPPER, "driver")) == "ok: driver - 580.95.05"


def test_every_finding_is_one_line_and_what_is_not_ok_has_a_way_out():
    for machine in (CPU, HOPPER, Machine(python=(3, 11), torch=None, torch_error="ImportError: x")):
        for finding in examine(machine):
            assert "\n" not in str(finding)
            assert finding.verdict == "ok" or finding.way_out


@pytest.mark.parametrize(
    ("change", "what", "says"),
    [
        ({"python": (3, 11)}, "Python", "below 3.12"),
        ({"python": (3, 14)}, "Python", "from 3.14 on argparse refuses"),
        ({"torch": None, "torch_error": "OSError: libcudart"}, "torch", "libcudart"),
        ({"torch": "2.9.1"}, "torch", "below 2.11"),
        ({"megatron": None}, "megatron-core", "not found"),
        ({"megatron": (0, 20, 0)}, "megatron-core", "outside 0.19 to below 0.20"),
        ({"megatron": (0, 18, 3)}, "megatron-core", "outside 0.19 to below 0.20"),
        ({"megatron_training": False}, "training loop", "no megatron.training"),
        ({"versions": {}}, "training loop", "omegaconf"),
        ({"dataset_helper": False}, "dataset helper", "not compiled"),
        ({"driver": "470.1"}, "GPU", "driver 470.1"),
        ({"driver": "580.1", "cuda": None}, "GPU", "without CUDA"),
        ({"apex_present": True}, "Apex", "another project"),
    ],
)
def test_what_stops_training_is_bad(change, what, says):
    machine = dataclasses.replace(CPU, **change)
    assert bad(machine) == [what]
    assert says in found(machine, what).why


def test_transformer_engine_is_no_obstacle_to_training_on_the_cpu():
    machine = dataclasses.replace(CPU, versions={**CPU.versions, "transformer-engine": "2.17.1"})
    assert bad(machine) == []
    assert found(machine, "Transformer Engine").verdict == "off"
    assert "--gpus all" in found(machine, "Transformer Engine").way_out


def test_a_megatron_of_the_supported_range_that_was_not_tested_is_said():
    machine = dataclasses.replace(CPU, megatron=(0, 19, 1))
    assert found(machine, "megatron-core").verdict == "ok"
    assert "tested with 0.19.2" in found(machine, "megatron-core").why


@pytest.mark.parametrize(
    ("capability", "on"),
    [
        ((8, 0), ""),
        ((8, 9), "delayed tensorwise"),
        ((9, 0), "delayed tensorwise blockwise"),
        ((10, 0), "delayed tensorwise blockwise mxfp8"),
        ((12, 0), "delayed tensorwise blockwise"),
    ],
)
def test_recipes_by_chip(capability, on):
    machine = with_gpu(capability)
    verdicts = {r.name: found(machine, f"FP8 {r.name}").verdict for r in RECIPES}
    assert [name for name, verdict in verdicts.items() if verdict == "ok"] == on.split()


def test_recipes_need_a_recent_transformer_engine_and_cuda():
    old = dataclasses.replace(HOPPER, versions={**CPU.versions, "transformer-engine": "2.1.0"})
    assert found(old, "FP8 delayed").verdict == "ok"
    assert "Transformer Engine 2.2" in found(old, "FP8 tensorwise").why
    # Compared as numbers: as text 2.10 would be below 2.2.
    newer = dataclasses.replace(HOPPER, versions={**CPU.versions, "transformer-engine": "2.10"})
    assert found(newer, "FP8 tensorwise").verdict == "ok"
    assert "CUDA 12.9" in found(dataclasses.replace(HOPPER, cuda="12.8"), "FP8 blockwise").why


def test_a_mixed_machine_is_judged_by_the_lesser_chip():
    lesser = Gpu(name="A100", count=1, capability=(8, 0), memory=40 * GIB)
    machine = dataclasses.replace(HOPPER, gpus=(H100, lesser))
    assert "A100 has 8.0" in found(machine, "FP8 delayed").why
    assert [f.what for f in examine(machine)].count("GPU") == 2


@pytest.mark.parametrize(
    ("arch_list", "verdict"),
    [
        (("sm_90",), "ok"),
        (("sm_90a",), "ok"),
        (("sm_80", "compute_80"), "ok"),
        (("sm_80", "sm_100"), "bad"),
        (("sm_80", "compute_100"), "bad"),
    ],
)
def test_torch_must_have_kernels_for_the_chip(arch_list, verdict):
    assert found(dataclasses.replace(HOPPER, arch_list=arch_list), "GPU").verdict == verdict


def test_a_broken_transformer_engine_turns_off_what_needs_it():
    machine = dataclasses.replace(HOPPER, te_error="OSError: libnvrtc.so.13: cannot open")
    assert bad(machine) == ["Transformer Engine"]
    assert "libnvrtc" in found(machine, "Transformer Engine").why
    assert found(machine, "grouped GEMM").verdict == "off"
    assert found(HOPPER, "grouped GEMM").verdict == "ok"
    assert found(machine, "FP8 delayed").verdict == "off"


def test_while_an_image_is_built_a_missing_gpu_is_nothing_bad():
    machine = dataclasses.replace(HOPPER, gpus=(), driver=None)
    assert bad(machine, building_image=True) == []
    findings = {f.what: f.verdict for f in examine(machine, building_image=True)}
    assert findings["Transformer Engine"] == "ok"


def test_missing_apex_names_the_flag_on_gpus():
    machine = dataclasses.replace(HOPPER, apex_present=False, wgrad_kernel=False)
    assert found(machine, "Apex").verdict == "off"
    assert "--no-gradient-accumulation-fusion" in found(machine, "fused weight gradient").way_out


def test_limits_of_the_container():
    machine = dataclasses.replace(
        CPU,
        shared_memory=64 * 2**20,
        memlock=65536,
        open_files=1024,
        pip_constraint="/etc/pip/constraint.txt",
    )
    assert bad(machine) == []
    assert found(machine, "/dev/shm").why.startswith("64 MiB")
    assert "--ulimit memlock=-1" in found(machine, "ulimit -l").way_out
    assert found(machine, "ulimit -n").verdict == "off"
    assert "PIP_CONSTRAINT=" in found(machine, "free pip").way_out
    endless = dataclasses.replace(CPU, open_files=resource.RLIM_INFINITY)
    assert found(endless, "ulimit -n").verdict == "ok"


def test_adapters_to_other_nodes_matter_on_gpus_only():
    assert "InfiniBand" not in [finding.what for finding in examine(CPU)]
    missing = found(HOPPER, "InfiniBand")
    assert (missing.verdict, "--device=/dev/infiniband" in missing.way_out) == ("off", True)
    there = dataclasses.replace(HOPPER, adapters=("mlx5_0", "mlx5_1"))
    assert str(found(there, "InfiniBand")) == "ok: InfiniBand - mlx5_0 mlx5_1"


def test_version_reads_numbers():
    assert version("2.17.1+4fe7b07") == (2, 17, 1)
    assert version("13.0") == (13, 0)
    assert version(None) == ()


def test_the_facts_of_this_machine():
    machine = look()
    assert machine.torch.partition("+")[0] == installed("torch").partition("+")[0]
    assert machine.megatron == version(installed("megatron-core"))
    assert machine.megatron_training
    assert machine.dataset_helper
    assert not machine.apex_present or machine.apex_is_nvidia


@pytest.mark.parametrize("nvidia", [True, False])
def test_whose_apex_it_is(tmp_path, monkeypatch, nvidia):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    if nvidia:
        (tmp_path / "apex" / "optimizers").mkdir()
    # The CPU runtime, which the doctor does not install, keeps it out of sight.
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    machine = look()
    assert (machine.apex_present, machine.apex_is_nvidia) == (True, nvidia)


def test_another_package_of_megatrons_name_is_not_megatron(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    for folder in (core, core.parent):
        (folder / "__init__.py").write_text("")
    done = run(PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.returncode, done.stderr) == (1, "")
    assert "bad: megatron-core - not found - pip install" in done.stdout


def test_an_import_that_raises_oserror_becomes_a_fact(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("raise OSError('libcuda.so.1:\\n not found')")
    monkeypatch.syspath_prepend(tmp_path)
    assert facts._import_error("broken_library") == "OSError: libcuda.so.1: not found"
    assert facts._import_error("not_installed_at_all") is None


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), *arguments]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_the_command_passes_here_and_fails_with_the_wrong_apex(tmp_path):
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert all(line.startswith(("ok: ", "off: ")) for line in lines)
    assert last == "training can run here"

    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    done = run(PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 1
    assert done.stdout.endswith("training cannot run here: Apex\n")


def test_triton_by_another_name(monkeypatch):
    def version_of(name):
        if name == "pytorch-triton":
            return "3.7.1+nv"
        raise facts.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(facts.importlib.metadata, "version", version_of)
    assert facts._versions() == {"triton": "3.7.1+nv"}
