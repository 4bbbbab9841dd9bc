"""The doctor: what works on this machine, what is off and why, and what to do about it.

``look`` (facts.py) gathers facts, `examine` turns them into findings, one line each:

    ok: what - why        off: what - why - way out        bad: what - why - way out

*off* is a feature one can train without; *bad* stops every training on this machine, and makes the
exit code 1. ``default-moe doctor`` prints it.
"""

from __future__ import annotations

import dataclasses
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

from megatron_default_moe import exits
from megatron_default_moe.machine.facts import Gpu, Machine, Version, look
from megatron_default_moe.machine.versions import SUPPORTED
from megatron_default_moe.options.flags import OneSentenceParser

GIB = 2**30

TESTED_TORCH = "2.15.0"
"""The locked version, with Python 3.12 and 3.13."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    verdict: Literal["ok", "off", "bad"]
    what: str
    why: str
    way_out: str = ""

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.verdict}: " + " - ".join(
            part for part in (self.what, self.why, self.way_out) if part
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An FP8 recipe of Megatron and what it needs."""

    name: str
    te: Version
    """Lowest Transformer Engine (megatron/core/fp8_utils.py, 0.19)."""
    capability: tuple[int, int]
    """Lowest compute capability, as Transformer Engine checks it."""
    below: tuple[int, int] = (99, 0)
    cuda: Version = (12, 1)


RECIPES = (
    Recipe("delayed", te=(1, 0), capability=(8, 9)),
    Recipe("tensorwise", te=(2, 2), capability=(8, 9)),
    Recipe("blockwise", te=(2, 3), capability=(9, 0), cuda=(12, 9)),
    # Transformer Engine refuses 12.x (consumer Blackwell): not all GEMM layouts exist there.
    Recipe("mxfp8", te=(2, 1), capability=(10, 0), below=(12, 0), cuda=(12, 8)),
)

GROUPED_GEMM_TE = (1, 9)
"""megatron/core/extensions/transformer_engine.py has TEGroupedLinear from this version on."""


def version(text: str | None) -> Version:
    """Numbers of a version for comparison: '2.17.1+abc' -> (2, 17, 1)."""
    found = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def examine(machine: Machine, building_image: bool = False) -> list[Finding]:
    """Judge a machine.

    Args:
        machine: the facts.
        building_image: the GPUs are elsewhere: leave out what only they can tell.
    """
    findings = [*_python(machine), *_torch(machine), *_megatron(machine)]
    if building_image:
        findings.append(Finding("off", "GPU", "not looked at while an image is built"))
    else:
        findings += _gpus(machine)
    findings += _transformer_engine(machine, building_image)
    return [*findings, *_apex(machine), *_others(machine), *_system(machine)]


def _python(machine: Machine) -> Iterator[Finding]:
    text = ".".join(map(str, machine.python))
    if machine.python < (3, 12):
        yield Finding("bad", "Python", f"{text} is below 3.12", "use Python 3.12 or 3.13")
    elif machine.python >= (3, 14):
        why = f"{text}: from 3.14 on argparse refuses how Megatron 0.19 makes its flags"
        yield Finding("bad", "Python", why, "use Python 3.12 or 3.13")
    else:
        yield Finding("ok", "Python", text)


def _torch(machine: Machine) -> Iterator[Finding]:
    if machine.torch is None:
        yield Finding(
            "bad", "torch", machine.torch_error, "install torch 2.15.0 (2.11 or newer works)"
        )
    elif version(machine.torch) < (2, 11):
        way_out = "install torch 2.15.0 (2.11 or newer works) or take a newer image"
        yield Finding("bad", "torch", f"{machine.torch} is below 2.11", way_out)
    else:
        built = f"built for CUDA {machine.cuda}" if machine.cuda else "a build without CUDA"
        exact = ".".join(map(str, version(machine.torch)[:3]))
        tested = "" if exact == TESTED_TORCH else f" (tested with {TESTED_TORCH})"
        yield Finding("ok", "torch", f"{machine.torch}, {built}{tested}")
        if machine.nccl:
            yield Finding("ok", "NCCL", ".".join(map(str, machine.nccl)))
        else:
            way_out = "needed on GPUs only: install a CUDA build of torch"
            yield Finding("off", "NCCL", "this torch has none", way_out)


def _megatron(machine: Machine) -> Iterator[Finding]:
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    install = 'pip install "megatron-core[training]==0.19.2"'
    if machine.megatron is None:
        yield Finding("bad", "megatron-core", "not found", install)
        return
    text = ".".join(map(str, machine.megatron))
    if SUPPORTED[0] <= machine.megatron[:2] < SUPPORTED[1]:
        tested = "" if machine.megatron == (0, 19, 2) else ", tested with 0.19.2"
        yield Finding("ok", "megatron-core", f"{text} (supported: {low} to below {high}{tested})")
    else:
        why = f"{text} is outside {low} to below {high}"
        yield Finding("bad", "megatron-core", why, install)
    if not machine.megatron_training:
        why = "this megatron-core has no megatron.training"
        yield Finding("bad", "training loop", why, install)
    elif "omegaconf" not in machine.versions:
        yield Finding("bad", "training loop", "omegaconf is missing", install)
    if machine.dataset_helper:
        yield Finding("ok", "dataset helper", "compiled for this Python")
    else:
        why = "helpers_cpp is not compiled for this Python, and Megatron needs it for any data set"
        way_out = "install the wheel, or run make in megatron/core/datasets of a source checkout"
        yield Finding("bad", "dataset helper", why, way_out)


def _gpus(machine: Machine) -> Iterator[Finding]:
    if machine.driver:
        yield Finding("ok", "driver", machine.driver)
    if not machine.gpus:
        yield _no_gpu(machine)
    for gpu in machine.gpus:
        major, minor = gpu.capability
        text = f"{gpu.count} x {gpu.name}, {gpu.memory / GIB:.0f} GiB, sm_{major}{minor}"
        if _has_kernels(gpu, machine.arch_list):
            yield Finding("ok", "GPU", text)
        else:
            why = f"{text}: torch has kernels for {' '.join(machine.arch_list)} only"
            yield Finding("bad", "GPU", why, "install a torch built for this chip")


def _no_gpu(machine: Machine) -> Finding:
    if machine.driver is None:
        way_out = "on a GPU host: install the driver; in a container: --gpus all"
        return Finding("off", "GPU", "no driver: training runs on the CPU (gloo)", way_out)
    if machine.torch and machine.cuda is None:
        return Finding("bad", "GPU", "torch is a build without CUDA", "install a CUDA build")
    why = f"torch cannot use it (driver {machine.driver}, torch needs CUDA {machine.cuda})"
    way_out = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; a driver too old must be updated"
    return Finding("bad", "GPU", why, way_out)


def _has_kernels(gpu: Gpu, arch_list: Sequence[str]) -> bool:
    """Binaries run on chips of the same major version and at least their minor version."""
    major, minor = gpu.capability
    built = [re.match(r"sm_(\d+)(\d)[af]?$", arch) for arch in arch_list]
    found = any(b and int(b[1]) == major and int(b[2]) <= minor for b in built)
    ptx = [re.match(r"compute_(\d+)(\d)$", arch) for arch in arch_list]
    return found or any(p and (int(p[1]), int(p[2])) <= (major, minor) for p in ptx)


def _transformer_engine(machine: Machine, building_image: bool) -> Iterator[Finding]:
    what = "Transformer Engine"
    installed = machine.versions.get("transformer-engine")
    if installed is None:
        way_out = "on GPUs: use the NGC image, or pip install --no-build-isolation"
        way_out += ' "megatron-core[te]==0.19.2"; without: --transformer-impl local'
        reason = "needs Transformer Engine"
        yield Finding("off", what, "not installed", way_out)
    elif building_image:
        reason = "depends on the GPU"
        yield Finding("ok", what, f"{installed} is installed")
    elif not machine.gpus:
        reason = "needs a GPU"
        why = f"{installed} is installed, and left aside by training on the CPU"
        yield Finding("off", what, why, "on a GPU host: start the container with --gpus all")
    elif machine.te_error:
        reason = "Transformer Engine is broken"
        way_out = "reinstall it for this torch and CUDA, or use the NGC image"
        yield Finding("bad", what, f"{installed}: {machine.te_error}", way_out)
    else:
        reason = ""
        yield Finding("ok", what, installed)
    yield from _needs_te(machine, reason)


def _needs_te(machine: Machine, reason: str) -> Iterator[Finding]:
    te = version(machine.versions.get("transformer-engine"))
    what, out = "grouped GEMM", "leave --moe-grouped-gemm out: experts run one after the other"
    if reason:
        yield Finding("off", what, reason, out)
    elif te < GROUPED_GEMM_TE:
        yield Finding("off", what, "needs Transformer Engine 1.9 or newer", out)
    else:
        yield Finding("ok", what, "--transformer-impl transformer_engine --moe-grouped-gemm")
    for recipe in RECIPES:
        why = reason or _refused(recipe, machine, te)
        what = f"FP8 {recipe.name}"
        if why:
            yield Finding("off", what, why, "train in --bf16" if reason else "take another recipe")
        else:
            yield Finding("ok", what, f"--fp8-format hybrid --fp8-recipe {recipe.name}")


def _refused(recipe: Recipe, machine: Machine, te: Version) -> str:
    """Why a recipe cannot run, or nothing."""
    if te < recipe.te:
        return f"needs Transformer Engine {'.'.join(map(str, recipe.te))} or newer"
    if version(machine.cuda) < recipe.cuda:
        return f"needs CUDA {'.'.join(map(str, recipe.cuda))} or newer, torch has {machine.cuda}"
    for gpu in machine.gpus:
        if not recipe.capability <= gpu.capability < recipe.below:
            low, chip = (".".join(map(str, c)) for c in (recipe.capability, gpu.capability))
            limit = "" if gpu.capability < recipe.capability else f", below {recipe.below[0]}.0"
            return f"needs compute capability {low} or higher{limit}; {gpu.name} has {chip}"
    return ""


def _apex(machine: Machine) -> Iterator[Finding]:
    if machine.apex_present and not machine.apex_is_nvidia:
        why = "this is the package index's apex, another project, which Megatron takes for NVIDIA's"
        yield Finding("bad", "Apex", why, "pip uninstall apex")
    elif machine.apex_present:
        yield Finding("ok", "Apex", machine.versions.get("apex", "of unknown version"))
    else:
        way_out = "optional; from source, never pip install apex (docker build APEX=1)"
        yield Finding("off", "Apex", "not installed", way_out)
    what = "fused weight gradient"
    if machine.wgrad_kernel:
        yield Finding("ok", what, "fused_weight_gradient_mlp_cuda is installed")
    elif machine.gpus:
        way_out = "--no-gradient-accumulation-fusion is chosen by itself"
        yield Finding("off", what, "needs Apex", way_out)
    else:
        yield Finding("off", what, "needs Apex and a GPU", "chosen by itself on a CPU")


def _others(machine: Machine) -> Iterator[Finding]:
    for name, lost in (
        ("triton", "no fused kernels, the PyTorch form takes their place"),
        ("tensorboard", "no metrics in files, and no reports made of them"),
        ("sentencepiece", "no SentencePiece tokenizers"),
        ("nvidia-resiliency-ext", "async saves need --async-strategy mcore"),
    ):
        if name in machine.versions:
            yield Finding("ok", name, machine.versions[name])
        else:
            yield Finding("off", name, f"not installed: {lost}", f"pip install {name}")


def _system(machine: Machine) -> Iterator[Finding]:
    if machine.adapters:
        yield Finding("ok", "InfiniBand", " ".join(machine.adapters))
    elif machine.gpus:
        why = "no adapter is to be seen: NCCL talks to other nodes over TCP"
        way_out = "needed on several nodes only: docker run --device=/dev/infiniband --network=host"
        yield Finding("off", "InfiniBand", why, way_out)
    size = machine.shared_memory or 0
    if size >= GIB:
        yield Finding("ok", "/dev/shm", f"{size / GIB:.0f} GiB; async saves put checkpoints there")
    else:
        why = f"{size / 2**20:.0f} MiB is too small for NCCL, data loading and async saves"
        yield Finding("off", "/dev/shm", why, "docker run --ipc=host or --shm-size=64g")
    if machine.memlock == resource.RLIM_INFINITY:
        yield Finding("ok", "ulimit -l", "unlimited")
    else:
        why = f"{machine.memlock // 1024} KiB may be pinned; InfiniBand needs more"
        yield Finding("off", "ulimit -l", why, "docker run --ulimit memlock=-1")
    if machine.open_files == resource.RLIM_INFINITY or machine.open_files >= 4096:
        yield Finding("ok", "ulimit -n", "enough open files")
    else:
        why = f"{machine.open_files} open files are few for many ranks and data files"
        yield Finding("off", "ulimit -n", why, "ulimit -n 65536 before the start")
    if machine.pip_constraint:
        why = f"PIP_CONSTRAINT={machine.pip_constraint} holds pip to the image's own versions"
        yield Finding("off", "free pip", why, "PIP_CONSTRAINT= pip install ... for other versions")


def run(argv: list[str]) -> int:
    """Print the findings; 1 if training cannot run here."""
    parser = OneSentenceParser(
        prog="default-moe doctor", description="What works on this machine, and what to do."
    )
    parser.add_argument(
        "--building-image", action="store_true", help="leave the GPUs out: they are elsewhere"
    )
    exits.add_flag(parser)
    args = parser.parse_args(argv)
    findings = examine(look(gpu=not args.building_image), args.building_image)
    for finding in findings:
        print(finding)
    bad = [finding.what for finding in findings if finding.verdict == "bad"]
    if bad:
        print(f"training cannot run here: {', '.join(bad)}")
        return 1
    print("training can run here")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exits.exit_code`."""
    return exits.exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
