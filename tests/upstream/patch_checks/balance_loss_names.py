"""The log of a run with ``global_aux_loss`` names this balance loss, and no other."""

import contextlib
import io
import re

from megatron_default_moe import pretrain

FLAGS = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 32 --seq-length 16"
    " --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 2 --train-iters 2"
    " --lr 0.001 --lr-decay-style constant --lr-warmup-iters 0 --eval-iters 0 --eval-interval 9"
    " --log-interval 1"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 63 --position-embedding-type rope"
    " --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0"
    " --hidden-dropout 0 --split 100,0,0 --num-experts 4 --moe-router-topk 1"
    " --moe-router-pre-softmax --moe-ffn-hidden-size 16 --moe-token-dispatcher-type alltoall"
    " --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.01"
    " --moe-router-gradient topk --no-bias-swiglu-fusion"
)

if __name__ == "__main__":
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert pretrain.main(FLAGS.split()) == 0
    named = set(re.findall(r"\| (\w*load_balancing_loss):", output.getvalue()))
    print("the log names", sorted(named))
    assert named == {"global_load_balancing_loss"}, f"the log names {sorted(named)}"
