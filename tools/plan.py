"""``default-moe plan``, from a checkout: what a run will need of its GPUs, without any.

python tools/plan.py 7.33b-8c1 --gpus 64 --gpu h100 [Megatron flags]
"""

import sys

from megatron_default_moe.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
