"""An unknown name of a flag with fixed names ends in argparse's message."""

import argparse
import contextlib
import io

from megatron_default_moe.cpu import runtime

runtime.install()

from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

parser = add_megatron_arguments(argparse.ArgumentParser())
assert parser.parse_args(["--attention-backend", "flash"]).attention_backend is AttnBackend.flash
stderr = io.StringIO()
with contextlib.redirect_stderr(stderr), contextlib.suppress(SystemExit):
    parser.parse_args(["--attention-backend", "no-such-backend"])
assert "--attention-backend" in stderr.getvalue()
assert "no-such-backend" in stderr.getvalue()
