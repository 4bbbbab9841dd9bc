"""What a test of this folder measures is recorded with it, so that the results hold numbers."""

from collections.abc import Callable

import pytest
from layer_reference import relative_error
from torch import Tensor

Compare = Callable[[float, float], None]


@pytest.fixture
def within(record_property: Callable[[str, object], None]) -> Compare:
    """Record a relative error and its tolerance, then hold the one to the other."""

    def within(error: float, tolerance: float) -> None:
        record_property("error", (error, tolerance))
        assert error <= tolerance, f"relative error {error:.2e} of {tolerance:.0e}"

    return within


@pytest.fixture
def close(within: Compare) -> Callable[[Tensor, Tensor, float], None]:
    """``layer_reference.close``, recorded."""

    def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        within(relative_error(actual, expected), tolerance)

    return close
