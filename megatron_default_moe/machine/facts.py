"""What this machine has: facts for the doctor, gathered without importing what may be broken.

Megatron-Core and Apex are looked at on disk only: importing Megatron-Core imports Transformer
Engine, which raises OSError (not ImportError) where there is no CUDA driver. Transformer Engine is
imported, as the last fact, only where a GPU is usable. Nothing here judges; ``doctor`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import runpy
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Version = tuple[int, ...]

DISTRIBUTIONS = (
    *("megatron-core", "transformer-engine", "apex", "triton", "omegaconf", "tensorboard"),
    *("sentencepiece", "nvidia-resiliency-ext"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in this machine."""

    name: str
    count: int
    capability: tuple[int, int]
    memory: int
    """Bytes of one of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything the doctor judges by."""

    python: Version
    torch: str | None
    """Version; None if it cannot be imported."""
    torch_error: str = ""
    cuda: str | None = None
    """Version of the CUDA runtime torch was built with; None for a CPU build."""
    arch_list: tuple[str, ...] = ()
    """Chips torch has kernels for, as ``sm_90``."""
    nccl: Version | None = None
    driver: str | None = None
    """Version of the kernel driver; None where there is none."""
    gpus: tuple[Gpu, ...] = ()
    """Only those that torch can use."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of the installed ones among `DISTRIBUTIONS`."""
    megatron: Version | None = None
    """Megatron-Core's own word, which a source checkout has too; None if it is missing."""
    megatron_training: bool = False
    dataset_helper: bool = False
    """Compiled, and for this Python."""
    apex_present: bool = False
    apex_is_nvidia: bool = False
    wgrad_kernel: bool = False
    """``fused_weight_gradient_mlp_cuda`` is there."""
    te_error: str | None = None
    """What importing Transformer Engine raised; None if it worked or was not tried."""
    shared_memory: int | None = None
    """Bytes of /dev/shm; None where there is none."""
    memlock: int = resource.RLIM_INFINITY
    """Bytes a process may pin."""
    open_files: int = resource.RLIM_INFINITY
    adapters: tuple[str, ...] = ()
    """InfiniBand and RoCE adapters that this process can open."""
    pip_constraint: str = ""


def look(gpu: bool = True) -> Machine:
    """Gather the facts.

    Args:
        gpu: False leaves the GPUs and the import of Transformer Engine out, as when an image is
            built on a machine that has none.
    """
    facts: dict[str, Any] = {}
    try:
        import torch
    except Exception as error:  # a broken library raises OSError, ImportError or RuntimeError
        facts.update(torch=None, torch_error=_one_line(error))
    else:
        facts.update(torch=str(torch.__version__), cuda=torch.version.cuda)
        facts.update(arch_list=tuple(torch.cuda.get_arch_list()))
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            facts.update(nccl=tuple(torch.cuda.nccl.version()))
        if gpu and torch.cuda.is_available():
            facts.update(
                gpus=_gpus(torch.cuda), te_error=_import_error("transformer_engine.pytorch")
            )
    megatron = _folder("megatron.core")
    if megatron is not None:
        facts.update(megatron=_version_in(megatron / "package_info.py"))
        facts.update(megatron_training=(megatron.parent / "training" / "training.py").exists())
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        facts.update(dataset_helper=(megatron / "datasets" / f"helpers_cpp{suffix}").exists())
    apex = _folder("apex")
    if apex is not None:
        # NVIDIA's has optimizers; the package index's `apex` is a toolkit for web servers.
        facts.update(apex_present=True, apex_is_nvidia=(apex / "optimizers").is_dir())
    return Machine(
        python=tuple(int(part) for part in platform.python_version_tuple()[:2]),
        driver=_driver() if gpu else None,
        versions=_versions(),
        wgrad_kernel=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        shared_memory=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        pip_constraint=os.environ.get("PIP_CONSTRAINT", ""),
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        adapters=_adapters(),
        **facts,
    )


def _gpus(cuda: Any) -> tuple[Gpu, ...]:
    kinds: dict[tuple[str, tuple[int, int], int], int] = {}
    for index in range(cuda.device_count()):
        properties = cuda.get_device_properties(index)
        kind = (properties.name, (properties.major, properties.minor), properties.total_memory)
        kinds[kind] = kinds.get(kind, 0) + 1
    return tuple(
        Gpu(name=name, capability=capability, memory=memory, count=count)
        for (name, capability, memory), count in kinds.items()
    )


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return found.group(1) if found else "of unknown version"


def _adapters() -> tuple[str, ...]:
    """The kernel lists them in every container; only with /dev/infiniband can they be used."""
    if not os.path.isdir("/dev/infiniband"):
        return ()
    try:
        return tuple(sorted(os.listdir("/sys/class/infiniband")))
    except OSError:
        return ()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        # NVIDIA and PyTorch have named their builds of Triton like this.
        for also in (name, f"pytorch-{name}"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(name, importlib.metadata.version(also))
    return found


def _folder(name: str) -> Path | None:
    """Where a package lies, without importing it (its parents only)."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _version_in(file: Path) -> Version | None:
    """What Megatron-Core says of itself, or None if this is something else of its name."""
    try:
        return tuple(runpy.run_path(str(file))["VERSION"][:3])
    except (OSError, KeyError):
        return None


def _import_error(name: str) -> str | None:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    try:
        importlib.import_module(name)
    except Exception as error:  # OSError and FileNotFoundError where a library is missing
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
