"""``default-moe report``, from a checkout: metrics.csv and the plots of a run.

python tools/report.py runs/quickstart
"""

import sys

from megatron_default_moe.report.command import main

if __name__ == "__main__":
    sys.exit(main())
