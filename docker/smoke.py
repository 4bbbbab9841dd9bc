"""Train two steps of a tiny model on the CPU: what an image can show of itself while it is built.

There is no GPU driver then, and training on the CPU leaves Transformer Engine aside; ``tests/gpu``
and ``default-moe doctor`` are for a GPU host.
"""

import os
import sys
import tempfile
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "examples" / "quickstart.yaml"
FLAGS = (
    f"--config {CONFIG} --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-layers 2"
    " --expert-model-parallel-size 1 --train-iters 2 --lr-warmup-iters 0 --log-interval 1"
    " --eval-iters 0 --split 9,1,0 --save-interval 2"
)


def main() -> int:
    """Train, save, and look at what was saved."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_default_moe import pretrain

    with tempfile.TemporaryDirectory() as folder:
        code = pretrain.main([*FLAGS.split(), "--save", folder])
        if code == 0 and Path(folder, "latest_checkpointed_iteration.txt").read_text() != "2":
            print("error: no checkpoint after two steps", file=sys.stderr)
            return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
