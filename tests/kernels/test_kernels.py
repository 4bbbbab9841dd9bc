"""The Triton kernels where there is no GPU: run by the interpreter, compiled by ptxas, chosen.

Contract: the numbers are right (``kernels_in_interpreter.py``, in a process of its own because
Triton decides at import whether it interprets); every kernel compiles for the supported devices at
the paper's shapes, fits, and spills nothing; one function decides who uses them.
"""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from own_process import ROOT, run_tests

from megatron_default_moe import RouterGradientConfig
from megatron_default_moe.estimators import registry
from megatron_default_moe.estimators.default import DefaultMoERouter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def test_in_the_interpreter() -> None:
    run_tests("kernels/kernels_in_interpreter.py", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_the_device() -> None:
    run_tests("kernels/kernels_in_interpreter.py", TRITON_INTERPRET="0")


@pytest.mark.parametrize("capability", [90, 100], ids="sm_{}".format)
def test_the_kernels_compile_and_fit(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import compile_kernels

    for name, shape in compile_kernels.SHAPES.items():
        for launch in compile_kernels.launches(*shape):
            found = compile_kernels.compiled(*launch, capability)
            what = f"{name}: {found.name}, {found.registers} registers, {found.spilled} spilled"
            # A kernel that Triton cannot lower may come out as a lone trap, without an error.
            assert "trap;" not in found.ptx, what
            assert found.ptx.count("ld.global") + found.ptx.count("cp.async") > 3, what
            # Triton 3.9 keeps the address of sm_100's tensor memory in 8 bytes of the stack.
            no_spill = 8 if capability == 100 and found.registers <= 128 else 0
            assert found.spilled <= no_spill, what
            assert found.shared <= compile_kernels.SHARED_MEMORY, f"{what}: {found.shared} bytes"


@pytest.mark.parametrize("capability", [90, 100], ids="sm_{}".format)
def test_one_local_expert_compiles(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """An argument of one is a constant to Triton: expert parallelism 8 of 8 experts, one row."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import compile_kernels

    from megatron_default_moe.kernels import sums

    constants = {"UNIFORM": True, **sums.blocks(1, 8), "e": 1, "R": 1, "T": 1}
    kernel, types = sums.statistics_kernel, compile_kernels.SUMS
    found = compile_kernels.compiled(kernel, types, constants, capability)
    assert "trap;" not in found.ptx


def test_the_benchmark_needs_a_device_and_says_so() -> None:
    command = [sys.executable, "-W", "ignore", "bench/kernels.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr


@pytest.mark.parametrize(
    ("available", "capability", "wanted", "fused"),
    [
        (False, (9, 0), True, False),
        (True, (9, 0), True, True),
        (True, (10, 0), True, True),
        (True, (8, 0), True, False),
        (True, (12, 0), True, False),
        (True, (9, 0), False, False),
    ],
    ids=["no device", "H100", "B200", "A100", "sm_120", "not asked for"],
)
def test_who_uses_them(
    monkeypatch: pytest.MonkeyPatch, available: bool, capability: Any, wanted: bool, fused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    options = RouterGradientConfig(kernels=wanted)
    router = registry.router_class(options)
    assert issubclass(router, DefaultMoERouter)
    assert router.__name__ == ("FusedDefaultMoERouter" if fused else "DefaultMoERouter")


def test_without_triton_the_functions_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert registry.router_class(RouterGradientConfig(kernels=True)) is DefaultMoERouter
