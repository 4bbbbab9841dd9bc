"""The package's entry, writing every step to ``$RECORD.<rank>`` as it is taken.

A line is ``step loss vectors``: the loss as hexadecimal digits (empty off the last pipeline stage)
and a digest of all default vectors after the step. Lines are appended, so those of a process that
was killed stay, and what its successor repeats can be compared with them to the last bit.
"""

import hashlib
import os
import sys
from typing import Any

from megatron_default_moe.cpu import runtime

runtime.install()

from megatron.training import training as megatron_training  # noqa: E402

from megatron_default_moe import pretrain  # noqa: E402
from megatron_default_moe.layers import optimizer_step  # noqa: E402
from megatron_default_moe.loop import patches  # noqa: E402


def recording(train_step: Any) -> Any:
    """Wrap the patched ``train_step``."""

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        digest = hashlib.sha256()
        for router in optimizer_step.routers(args[2]):
            digest.update(router.default_vectors.numpy().tobytes())
        loss = {key: float(value).hex() for key, value in (result[0] or {}).items()}
        step = kwargs["iteration"] + 1
        with open(f"{os.environ['RECORD']}.{os.environ['RANK']}", "a") as file:
            file.write(f"{step} {loss.get('lm loss', '')} {digest.hexdigest()}\n")
        return result

    return recorded


if __name__ == "__main__":
    install = patches.install

    def install_then_record() -> None:
        """Record around this package's own patch."""
        install()
        megatron_training.train_step = recording(megatron_training.train_step)

    patches.install = install_then_record
    sys.exit(pretrain.main())
