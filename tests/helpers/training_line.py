"""The command line of a training that takes a second: the smallest model, on mock data."""

TRAIN = (
    "pretrain",
    *(
        "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16"
        " --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3"
        " --num-experts 4 --moe-router-topk 1 --moe-ffn-hidden-size 24 --disable-bias-linear"
        " --moe-router-pre-softmax --moe-router-load-balancing-type none --mock-data"
        " --moe-token-dispatcher-type alltoall --tokenizer-type NullTokenizer --vocab-size 31"
        " --make-vocab-size-divisible-by 8 --position-embedding-type rope --train-iters 2"
        " --log-interval 1 --eval-iters 0 --split 9,1,0 --num-workers 0"
    ).split(),
)
"""Behind ``default-moe``; the last value of a repeated flag wins."""
