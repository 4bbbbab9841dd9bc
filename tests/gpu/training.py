"""Six steps of the entry point, and what their log says."""

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parent.parent.parent
MODEL = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256 --seq-length 64"
    " --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --train-iters 6"
    " --lr 0.001 --lr-decay-style constant --lr-warmup-iters 0 --eval-iters 0 --eval-interval 99"
    " --log-interval 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 127"
    " --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
    " --attention-dropout 0 --hidden-dropout 0 --split 100,0,0 --num-experts 4"
    " --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 256"
    " --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none"
    " --moe-router-dtype fp32 --default-vector-beta 0.5"
    # NVIDIA Apex need not be there.
    " --no-gradient-accumulation-fusion"
)
TE = "--transformer-impl transformer_engine --moe-grouped-gemm --bf16"
ENTRY = ("-m", "megatron_default_moe.pretrain")


def train(
    flags: str, program: Sequence[str] = ENTRY, metric: str = "default-vector norm"
) -> list[tuple[float, ...]]:
    """Loss, a metric of the routers and gradient norm of every step."""
    done = subprocess.run(
        [sys.executable, *program, *MODEL.split(), *flags.split()],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = ("lm loss", metric, "grad norm")
    found = re.findall(".*".join(rf"{name}: (\S+)" for name in names), done.stdout)
    assert len(found) == 6, done.stdout[-3000:]
    return [tuple(map(float, step)) for step in found]


def relative(actual: float, expected: float) -> float:
    """Relative difference of two numbers."""
    return abs(actual - expected) / abs(expected)
