"""A study whose runs take seconds."""

import pathlib

FLAGS = """
  mock-data: true
  num-layers: 2
  hidden-size: 32
  num-attention-heads: 4
  seq-length: 32
  max-position-embeddings: 32
  micro-batch-size: 2
  global-batch-size: 4
  lr: 1e-3
  num-experts: 4
  moe-router-topk: 2
  moe-ffn-hidden-size: 40
  swiglu: true
  disable-bias-linear: true
  moe-router-pre-softmax: true
  moe-router-load-balancing-type: none
  moe-router-dtype: fp32
  moe-token-dispatcher-type: alltoall
  attention-dropout: 0
  hidden-dropout: 0
  tokenizer-type: NullTokenizer
  vocab-size: 63
  make-vocab-size-divisible-by: 8
  position-embedding-type: rope
  normalization: RMSNorm
  untie-embeddings-and-output-weights: true
  train-iters: 6
  log-interval: 1
  eval-interval: 3
  eval-iters: 2
  split: 9,1,0
  moe-per-layer-logging: true
  distributed-timeout-minutes: 2
"""


def write(file: pathlib.Path, arms: dict[str, str], seeds: str = "[1, 2]", more: str = "") -> None:
    """Write a study of these arms (name to flags, in braces); the first is the baseline."""
    listed = "".join(f"  {name}: {{{flags}}}\n" for name, flags in arms.items())
    file.write_text(
        f"flags:{FLAGS}{more}seeds: {seeds}\nbaseline: {next(iter(arms))}\narms:\n{listed}"
    )
