"""The dataset helpers of a wheel need no compiler; those of a checkout are still compiled."""

import pathlib

from megatron.core.datasets import helpers_cpp, utils  # noqa: F401

folder = pathlib.Path(utils.__file__).parent
utils.compile_helpers()

made = folder / "made"
(folder / "Makefile").write_text(f"all:\n\ttouch {made}\n")
utils.compile_helpers()
assert made.exists(), "a Makefile that is there was not used"
