"""``python -m megatron_default_moe`` is ``default-moe``; so is ``torchrun -m`` with it."""

import sys

from megatron_default_moe.commands.line import main

if __name__ == "__main__":
    sys.exit(main())
