"""The run-time patches, under their public name; see :mod:`megatron_default_moe.loop.patches`."""

from megatron_default_moe.loop.patches import (
    PATCHES,
    install,
    installed,
    uninstall,
)
from megatron_default_moe.machine.versions import check_version

__all__ = ["PATCHES", "check_version", "install", "installed", "uninstall"]
