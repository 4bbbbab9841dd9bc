"""For an entry script of one's own; see :mod:`megatron_default_moe.loop.entry`."""

from megatron_default_moe.loop.entry import prepare, with_flags

__all__ = ["prepare", "with_flags"]
