"""Megatron's own training loop, unchanged, on two gloo ranks without a GPU.

Contract: every parallel layout trains; norm weights stay equal over tensor-parallel ranks under
sequence parallelism; an overflow in fp16 is a skipped step; recomputation changes no bit; a run
resumed from any kind of checkpoint continues with the identical losses and gradient norms. Ranks
with and without a GPU end before they build process groups.
"""

import dataclasses
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest
from launching import HERE, ROOT, torchrun

pytestmark = pytest.mark.launch

TINY = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --swiglu"
    " --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 4"
    " --lr 1e-2 --lr-decay-style constant --log-interval 1 --mock-data --vocab-size 127"
    " --tokenizer-type NullTokenizer --attention-dropout 0 --hidden-dropout 0 --num-workers 0"
    " --position-embedding-type rope --normalization RMSNorm --disable-bias-linear"
    " --no-create-attention-mask-in-dataloader --eval-iters 0 --eval-interval 99"
    " --num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 48"
    " --moe-token-dispatcher-type alltoall --distributed-timeout-minutes 10"
).split()
TP2 = [*TINY, "--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = [*TINY, "--pipeline-model-parallel-size", "2"]
EP2 = [*TINY, "--expert-model-parallel-size", "2"]
DISTRIBUTED = [*TINY, "--bf16", "--use-distributed-optimizer"]
DROPOUT = [*TP2, "--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()
RESHARDABLE = [*EP2, "--bf16", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a rank's log."""

    loss: float
    grad_norm: float
    norm_weights: float
    skipped: bool


Runs = dict[str, list[list[Step]]]


def launch(out: pathlib.Path, cases: dict[str, list[str]]) -> Runs:
    """Run the cases on two ranks; return the steps of each rank by case."""
    file = out / "cases.json"
    file.write_text(json.dumps(cases))
    done = torchrun(2, [str(HERE / "stock_pretrain.py"), str(file), str(out)], timeout=1000)
    assert done.returncode == 0, done.stdout[-6000:]
    return {name: [read(out / f"{name}.{rank}") for rank in range(2)] for name in cases}


def read(log: pathlib.Path) -> list[Step]:
    """The steps in one rank's log."""
    rows = [line.split() for line in log.read_text().splitlines()]
    return [Step(*map(float.fromhex, row[:3]), skipped=row[3] == "1") for row in rows]


def halves(out: pathlib.Path, name: str, flags: list[str], *load: str) -> dict[str, list[str]]:
    """An uninterrupted run, one that ends half way, and one that takes up from there."""
    folder = str(out / f"{name}-checkpoint")
    save = ["--save", folder, "--save-interval", "2", "--exit-interval", "2"]
    return {
        f"{name}-whole": flags,
        f"{name}-first": [*flags, *save],
        f"{name}-second": [*flags, "--load", folder, *load],
    }


def check_resumed(runs: Runs, name: str) -> None:
    """The two halves are the whole, to the last bit, on every rank."""
    for whole, first, second in zip(
        runs[f"{name}-whole"], runs[f"{name}-first"], runs[f"{name}-second"], strict=True
    ):
        assert len(whole) == 4
        assert [*first, *second] == whole


def check_learned(ranks: list[list[Step]]) -> None:
    """The last rank saw a loss that starts at chance and falls."""
    losses = [step.loss for step in ranks[-1]]
    assert len(losses) == 4
    assert abs(losses[0] - math.log(128)) < 1
    assert losses[-1] < losses[0] - 0.3
    assert not any(step.skipped for step in ranks[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The cases of every test run, in one launch."""
    out = tmp_path_factory.mktemp("runs")
    return launch(
        out, {"tp2": TP2, "ep2": EP2, "pp2": PP2, **halves(out, "distributed", DISTRIBUTED)}
    )


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The cases of the full test run, in one launch."""
    out = tmp_path_factory.mktemp("more_runs")
    uniform = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    asynchronous = halves(out, "async", [*EP2, "--bf16"])
    # Ends at 4, after training on while the checkpoint of step 2 was written; resumes from 2.
    folder = out / "async-checkpoint"
    asynchronous["async-first"] = [
        *(*EP2, "--bf16", *ASYNC, "--save", str(folder), "--save-interval", "2")
    ]
    asynchronous["async-second"] += ["--ckpt-step", "2"]
    return launch(
        out,
        {
            "ep2": EP2,
            "allgather": [*EP2, "--moe-token-dispatcher-type", "allgather"],
            "interleaved": [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"],
            "overflow": [*EP2, "--fp16", "--initial-loss-scale", "1e30", "--hysteresis", "1"],
            "fp16": [*EP2, "--fp16", "--initial-loss-scale", "1024"],
            "layer-norm": [*TP2, "--normalization", "LayerNorm"],
            "plain": DROPOUT,
            "recomputed": [*DROPOUT, *uniform.split()],
            "recomputed-moe": [
                *(*DROPOUT, "--recompute-granularity", "selective", "--recompute-modules", "moe")
            ],
            **halves(out, "dropout", DROPOUT),
            **halves(out, "reshardable", RESHARDABLE, "--ckpt-fully-parallel-load"),
            # Only a checkpoint fills what was made on the meta device.
            **halves(out, "meta", EP2, "--init-model-with-meta-device"),
            **halves(out, "fp32", [*TINY, "--use-distributed-optimizer"]),
            **halves(out, "overlap", [*DISTRIBUTED, "--overlap-grad-reduce"]),
            **asynchronous,
        },
    )


@pytest.mark.parametrize("name", ["tp2", "ep2", "pp2", "distributed-whole"])
def test_layout_learns(runs: Runs, name: str):
    check_learned(runs[name])


def test_norm_weights_stay_equal_under_sequence_parallelism(runs: Runs):
    first, second = ([step.norm_weights for step in rank] for rank in runs["tp2"])
    assert first == second
    assert len(set(first)) == len(first)


def test_distributed_optimizer_resumes_bit_for_bit(runs: Runs):
    check_resumed(runs, "distributed")


@pytest.mark.full
@pytest.mark.parametrize("name", ["allgather", "interleaved", "fp16", "layer-norm"])
def test_more_layouts_learn(more_runs: Runs, name: str):
    check_learned(more_runs[name])


@pytest.mark.full
def test_allgather_equals_alltoall(more_runs: Runs):
    for other, step in zip(more_runs["allgather"][-1], more_runs["ep2"][-1], strict=True):
        assert other.loss == pytest.approx(step.loss, rel=1e-5)


@pytest.mark.full
def test_overflow_is_a_skipped_step(more_runs: Runs):
    steps = more_runs["overflow"][-1]
    assert all(step.skipped for step in steps)
    assert len({step.norm_weights for step in steps}) == 1


@pytest.mark.full
@pytest.mark.parametrize("name", ["recomputed", "recomputed-moe"])
def test_recomputation_repeats_dropout_bit_for_bit(more_runs: Runs, name: str):
    assert more_runs[name] == more_runs["plain"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["dropout", "reshardable", "meta", "fp32", "overlap"])
def test_resumes_bit_for_bit(more_runs: Runs, name: str):
    check_resumed(more_runs, name)


@pytest.mark.full
def test_async_checkpoint_holds_the_step_it_was_taken_at(more_runs: Runs):
    for whole, first, second in zip(
        *(more_runs[f"async-{part}"] for part in ("whole", "first", "second")), strict=True
    ):
        assert first == whole
        assert second == whole[2:]


SCRIPT = """
import os, sys, types
from megatron_default_moe import pretrain
from megatron_default_moe.loop import restarts
# The second rank takes itself for one with a GPU, when it is asked.
restarts.runtime = types.SimpleNamespace(needed=lambda: os.environ["RANK"] == "0")
sys.exit(pretrain.main(sys.argv[1:]))
"""


def test_a_run_of_two_kinds_ends_before_its_process_groups() -> None:
    """Two processes without torchrun: the store is one of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *TINY],
            env=given | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert outputs[0][1].count("error: rank 0 has the CPU") == 1
    assert "rank 1 has a GPU" in outputs[0][1]
    assert "initializing torch distributed" not in outputs[0][0]
    assert not any("Traceback" in said for output in outputs for said in output)
