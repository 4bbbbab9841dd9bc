"""Start torchrun with a hard limit, and the small model that the launched tests train."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import torch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent

TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32"
    " --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3"
    " --num-experts 4 --moe-router-topk 1 --moe-ffn-hidden-size 40 --swiglu --disable-bias-linear"
    " --moe-router-pre-softmax --moe-router-load-balancing-type none --moe-router-dtype fp32"
    " --moe-token-dispatcher-type alltoall --attention-dropout 0 --hidden-dropout 0 --mock-data"
    " --tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 8"
    " --position-embedding-type rope --normalization RMSNorm"
    " --untie-embeddings-and-output-weights --train-iters 8 --log-interval 1"
    " --eval-interval 1000 --eval-iters 0 --split 9,1,0 --distributed-timeout-minutes 2"
    " --default-vector-beta 0.5"
).split()
"""A model whose every step takes milliseconds; the last value of a repeated flag wins."""


def torchrun(
    ranks: int, arguments: list[str], timeout: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun --standalone`` and kill the whole group if it takes too long."""
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *arguments,
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    process = subprocess.Popen(
        command,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{output[-4000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def record(
    out: pathlib.Path, ranks: int, cases: dict[str, dict[str, Any]], timeout: float = 1200
) -> dict[str, list[dict[str, Any]]]:
    """Run the cases in one launch; return, per case, what each rank recorded."""
    listed = [{"name": name, **case} for name, case in cases.items()]
    file = out / f"cases-{ranks}.json"
    file.write_text(json.dumps(listed))
    done = torchrun(ranks, [str(HERE / "worker.py"), str(file), str(out)], timeout)
    assert done.returncode == 0, done.stdout[-6000:]
    return {
        name: [torch.load(out / f"{name}.{rank}.pt", weights_only=False) for rank in range(ranks)]
        for name in cases
    }


def steps_of(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the ranks of one run: the loss from the last stage, the layers from all stages."""
    merged = []
    for step in zip(*(rank["steps"] for rank in ranks), strict=True):
        loss = next(s["loss"] for s in reversed(step) if s["loss"])
        layers = {number: layer for s in reversed(step) for number, layer in s["layers"].items()}
        merged.append({**step[-1], "loss": float(loss["lm loss"]), "layers": layers})
    return merged
