"""Say what works on this machine, what is off and why, and what to do about it.

python tools/doctor.py
"""

import sys

from megatron_default_moe.machine.doctor import main

if __name__ == "__main__":
    sys.exit(main())
