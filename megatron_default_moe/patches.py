"""The run-time patches, under their public name; see :mod:`megatron_default_moe.loop.patches`."""

from megatron_default_moe.loop.patches import (
    PATCHES,
    check_version,
    install,
    installed,
    uninstall,
)

__all__ = ["PATCHES", "check_version", "install", "installed", "uninstall"]
