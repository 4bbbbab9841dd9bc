"""``default-moe calibrate``, from a checkout: default vectors for a TopK checkpoint.

torchrun --nproc-per-node N tools/calibrate.py <flags of the training run> --load TOPK --save NEW
    [--calibration-batches 50]
"""

import sys

from megatron_default_moe.loop.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
