"""``default-moe doctor``, from a checkout: what works on this machine, and what to do.

python tools/doctor.py
"""

import sys

from megatron_default_moe.machine.doctor import main

if __name__ == "__main__":
    sys.exit(main())
