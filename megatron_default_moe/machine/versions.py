"""The versions of Megatron-Core that this package was written for.

Importing this module imports nothing of Megatron, so that the version can be checked first.
"""

from megatron_default_moe.errors import UserError

SUPPORTED = ((0, 19), (0, 20))
"""Megatron-Core versions from (inclusive) and to (exclusive); tested with 0.19.2."""


def check_version() -> None:
    """Refuse a Megatron-Core outside the supported range.

    Raises:
        UserError: with the installed version and the range.
    """
    from megatron.core import package_info

    version = tuple(package_info.VERSION[:2])
    low, high = SUPPORTED
    if not low <= version < high:
        raise UserError(
            f"megatron-core {package_info.__shortversion__} is not supported: install a version"
            f" from {low[0]}.{low[1]} up to, not including, {high[0]}.{high[1]}"
            " (for example megatron-core[training]==0.19.2)"
        )
