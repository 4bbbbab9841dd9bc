"""Megatron's parser can print its help."""

import argparse

from megatron_default_moe.cpu import runtime

runtime.install()

from megatron.training.arguments import add_megatron_arguments  # noqa: E402

parser = add_megatron_arguments(argparse.ArgumentParser())
text = parser.format_help()
assert "--moe-paged-stash-buffer-size-factor-cuda" in text
assert "(e.g. 1.10 = 10%)" in " ".join(text.split())
