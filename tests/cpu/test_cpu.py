"""The CPU runtime's replacements and flags, without a launch.

Contract: every name in the table exists and is replaced once; with a GPU nothing is; the device
literals, streams, generators and norms behave as Megatron expects of their CUDA counterparts; a
flag that cannot work on the CPU is refused by name, whichever way it is written.
"""

import argparse
import importlib
import logging
import multiprocessing
import os
import pathlib
import pkgutil
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from megatron_default_moe.cpu import flag_choices, replacements, runtime, stand_ins
from megatron_default_moe.errors import UserError

pytestmark = pytest.mark.skipif(not runtime.needed(), reason="the CPU runtime is for no GPU")


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


# -- The table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", replacements.REPLACEMENTS, ids=lambda row: row.target)
def test_every_row_is_replaced_and_has_a_reason(row: replacements.Replacement):
    current = pkgutil.resolve_name(row.target)
    original = replacements._originals[row.target]
    assert current is not getattr(original, "__func__", original)
    assert row.reason
    assert "\n" not in row.reason


def test_table_names_each_target_once():
    targets = [row.target for row in replacements.REPLACEMENTS]
    assert len(set(targets)) == len(targets)


def test_install_twice_changes_nothing():
    before = [pkgutil.resolve_name(row.target) for row in replacements.REPLACEMENTS]
    assert runtime.install()
    assert [pkgutil.resolve_name(row.target) for row in replacements.REPLACEMENTS] == before


def test_with_a_gpu_nothing_is_replaced():
    program = """
import sys, torch
torch.cuda.is_available = lambda: True
before = torch.zeros, torch.Tensor.cuda, torch.cuda.Stream, torch.compile
from megatron_default_moe.cpu import replacements, runtime
assert not runtime.needed() and not runtime.install() and not replacements.in_place()
assert before == (torch.zeros, torch.Tensor.cuda, torch.cuda.Stream, torch.compile)
assert "megatron" not in sys.modules
"""
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, timeout=120)


def test_a_transformer_engine_that_finds_no_driver_is_left_aside(tmp_path: pathlib.Path):
    """Its import raises OSError, in the trainer and in the process that writes checkpoints."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text('raise OSError("libcuda.so.1: cannot open")')
    program = """
from megatron_default_moe.cpu import replacements, runtime
{start}()
from megatron.core.models.gpt import gpt_layer_specs
assert not gpt_layer_specs.HAVE_TE
"""
    root = pathlib.Path(__file__).parents[2]
    path = [str(root), str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    for start in ("runtime.install", "replacements.prepare_checkpoint_worker"):
        command = [sys.executable, "-W", "ignore", "-c", program.format(start=start)]
        subprocess.run(command, env=environment, check=True, timeout=120)


# -- Devices, streams and compilation --------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "cpu", None])
def test_tensors_asked_of_cuda_are_made_on_the_cpu(device: Any):
    made = [
        torch.tensor([1.0, 2.0], device=device),
        torch.zeros(2, dtype=torch.float64, device=device),
        torch.ones(2, device=device),
        torch.empty(2, device=device),
        torch.empty_like(torch.ones(3), device=device),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[0].tolist() == [1.0, 2.0]


def test_moves_to_cuda_keep_the_tensor():
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    weight = module.weight
    assert tensor.cuda(non_blocking=True) is tensor
    assert module.cuda(torch.cuda.current_device()).weight is weight


def test_type_names_are_cudas_and_conversions_still_work():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_no_device_is_pretended():
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"


def test_planning_makes_meta_tensors_and_ends():
    with runtime.planning_on_meta():
        assert torch.empty(2, device=torch.cuda.current_device()).is_meta
        assert torch.zeros(2, device="cuda").is_meta
    assert not torch.empty(2, device=torch.cuda.current_device()).is_meta


def test_streams_and_events_are_callable_as_on_a_gpu():
    stream = torch.cuda.Stream(device="cuda", priority=-1)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream
        event = stream.record_event()
    event.synchronize()
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() is not stream
    # As Megatron's combined schedule uses them.
    low, high = torch.cuda.Stream.priority_range()
    assert high < low
    torch.cuda.Event().wait(stream)
    torch.ones(1).record_stream(stream)


def test_nothing_is_compiled():
    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    assert torch.compile(double) is double
    assert torch.compile(dynamic=True)(double) is double


# -- Random numbers --------------------------------------------------------------------------------


@pytest.fixture
def tracker() -> Any:
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed(1)
    tracker = random.CudaRNGStatesTracker()
    tracker.add("one", 2)
    tracker.add("two", 3)
    return tracker


def test_tracker_keeps_its_streams_apart(tracker: Any):
    before = torch.cuda.get_rng_state()
    with tracker.fork("one"):
        first = torch.rand(3)
    with tracker.fork("two"):
        other = torch.rand(3)
    with tracker.fork("one"):
        second = torch.rand(3)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    expected = torch.rand(6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat([first, second]), expected)
    assert torch.equal(other, torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_tracker_does_not_warn_of_its_own_draws(tracker: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING), tracker.fork("one"):
        torch.rand(1)
    assert not caplog.records


def test_data_loader_leaves_the_device_generator_alone():
    before = torch.cuda.get_rng_state()
    loader = torch.utils.data.DataLoader([1, 2, 3, 4], shuffle=True, pin_memory=True)
    assert sorted(int(item) for item in loader) == [1, 2, 3, 4]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert not loader.pin_memory


# -- Megatron's parts ------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_weights_are_marked_for_sequence_parallelism(
    normalization: str, sequence_parallel: bool
):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = types.SimpleNamespace(
        sequence_parallel=sequence_parallel,
        normalization=normalization,
        layernorm_zero_centered_gamma=False,
        persist_layer_norm=False,
        memory_efficient_layer_norm=False,
    )
    norm = WrappedTorchNorm(config, 8, eps=1e-4)
    assert isinstance(norm, getattr(torch.nn, normalization))
    assert norm.eps == 1e-4
    assert config.sequence_parallel == sequence_parallel
    marks = [getattr(weight, "sequence_parallel", False) for weight in norm.parameters()]
    assert marks == [sequence_parallel] * (2 if normalization == "LayerNorm" else 1)


def test_split_sizes_become_numbers():
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    sizes = torch.tensor([1, 2])
    assert list(maybe_move_tensor_to_cpu(sizes, as_numpy=True)) == [1, 2]
    assert maybe_move_tensor_to_cpu(sizes) is sizes
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_checkpoint_writer_copies_shared_memory(monkeypatch: pytest.MonkeyPatch):
    weight = torch.ones(2)
    buckets = [("file", "key", (["bytes"], [("item", weight)]))]
    assert stand_ins.preload_tensors(buckets) is buckets
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    [(name, key, (blobs, [(item, copied)]))] = stand_ins.preload_tensors(buckets)
    weight += 1
    assert (name, key, blobs, item) == ("file", "key", ["bytes"], "item")
    assert copied.tolist() == [1, 1]


@pytest.mark.parametrize("makefile", [False, True])
def test_wheel_helpers_are_used_only_without_a_makefile(
    makefile: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    from megatron.core.datasets import utils

    def upstream() -> None:
        raise AssertionError

    monkeypatch.setattr(utils, "compile_helpers", upstream)
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    if makefile:
        (tmp_path / "Makefile").touch()
    assert runtime.use_wheel_dataset_helpers() is not makefile
    assert (utils.compile_helpers is upstream) is makefile


def test_wheel_helper_is_there():
    assert importlib.import_module("megatron.core.datasets.helpers_cpp")


# -- Flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [*flag_choices.CHOICES, *flag_choices.REFUSALS], ids=lambda row: row.flag
)
def test_every_flag_in_the_tables_is_megatrons(row: Any, parser: argparse.ArgumentParser):
    assert row.flag in parser._option_string_actions


def test_choices_are_put_in_and_told(parser: argparse.ArgumentParser):
    argv, told = flag_choices.apply(parser, ["--num-layers", "2"])
    assert argv[:2] == ["--num-layers", "2"]
    assert len(told) == len(flag_choices.CHOICES)
    assert "--distributed-backend gloo (NCCL needs GPUs)" in told
    args = parser.parse_args(argv)
    assert (args.distributed_backend, args.transformer_impl) == ("gloo", "local")
    assert not args.gradient_accumulation_fusion


@pytest.mark.parametrize(
    "written", [["--transformer-impl", "local"], ["--transformer-impl=local"]], ids=" ".join
)
def test_a_choice_the_user_made_is_left_alone(written: list[str], parser: Any):
    argv, told = flag_choices.apply(parser, [*written, "--no-rope-fusion"])
    assert argv[: len(written)] == written
    assert argv.count("--no-rope-fusion") == 1
    assert len(told) == len(flag_choices.CHOICES) - 2


def _unusable(row: flag_choices.Refusal, parser: argparse.ArgumentParser) -> list[str]:
    action = parser._option_string_actions[row.flag]
    if action.nargs == 0:
        return [row.flag]
    return [row.flag, *row.values[:1]] if row.values else [row.flag, "7"]


@pytest.mark.parametrize("row", flag_choices.REFUSALS, ids=lambda row: row.flag)
def test_refusals_name_the_flag_and_the_way_out(row: flag_choices.Refusal, parser: Any):
    written = _unusable(row, parser)
    for argv in (written, ["=".join(written)]):
        with pytest.raises(UserError) as error:
            flag_choices.apply(parser, ["--num-layers", "2", *argv, "--bf16"])
        message = str(error.value)
        assert message.startswith(" ".join(written))
        assert row.reason in message
        assert message.rpartition("; ")[2]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--transformer-impl transformer_engine", "--transformer-impl local"),
        ("--distributed-backend=nccl", "--distributed-backend gloo"),
        ("--attention-backend flash", "--attention-backend unfused"),
        ("--context-parallel-size 1 --context-parallel-size 2", "use 1 or leave it out"),
        ("--recompute-modules moe moe_act", "core_attn, mlp, moe or shared_experts"),
        ("--recompute-modules=layernorm", "--recompute-modules layernorm"),
        ("--profile", "--use-pytorch-profiler"),
        ("--async-save", flag_choices.ASYNC_SAVE),
        ("--async-save --use-persistent-ckpt-worker", flag_choices.ASYNC_SAVE),
        ("--async-save --async-strategy mcore", flag_choices.ASYNC_SAVE),
        (
            "--async-save --use-persistent-ckpt-worker --async-strategy nvrx",
            flag_choices.ASYNC_SAVE,
        ),
        (f"{flag_choices.ASYNC_SAVE} --async-ckpt-use-cpu-shm", flag_choices.ASYNC_SAVE),
    ],
)
def test_refused_combinations(argv: str, named: str, parser: argparse.ArgumentParser):
    with pytest.raises(UserError, match=named.replace("(", "\\(")):
        flag_choices.apply(parser, argv.split())


@pytest.mark.parametrize(
    "argv",
    [
        "--context-parallel-size 1",
        "--cuda-graph-impl=none",
        "--moe-token-dispatcher-type allgather",
        "--ckpt-format torch_dist --tensor-model-parallel-size 2 --sequence-parallel",
        "--profile --use-pytorch-profiler",
        "--recompute-granularity selective --recompute-modules moe",
        "--moe-layer-recompute --overlap-grad-reduce",
        flag_choices.ASYNC_SAVE,
    ],
)
def test_what_works_is_accepted(argv: str, parser: argparse.ArgumentParser):
    completed, _ = flag_choices.apply(parser, argv.split())
    assert completed[: len(argv.split())] == argv.split()
    parser.parse_args(completed)


def test_flags_this_megatron_does_not_have_are_not_put_in():
    bare = argparse.ArgumentParser()
    bare.add_argument("--distributed-backend")
    argv, told = flag_choices.apply(bare, ["--unknown", "1"])
    assert argv == ["--unknown", "1", "--distributed-backend", "gloo"]
    assert len(told) == 1
