"""``default-moe compare``, from a checkout: arms over seeds, compared in pairs.

python tools/compare.py STUDY.yaml [--out DIR] [--parallel N]
"""

import sys

from megatron_default_moe.compare.command import main

if __name__ == "__main__":
    sys.exit(main())
