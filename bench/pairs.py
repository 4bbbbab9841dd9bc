"""What the benches share: ways of running in alternating blocks, and the ratio of neighbours.

Whatever else a machine does meets all of them alike. A block's number divided by that of the block
beside it is one ratio; what is reported is the median of the ratios, with quartiles.
"""

import argparse
import importlib.metadata
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
"""Where the benches write to unless told otherwise."""
FEWEST = 3
"""Rounds that are run whatever they take: fewer have no quartiles worth the name."""


class Ratio(NamedTuple):
    """Quotients of neighbouring blocks."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    def __str__(self) -> str:
        """Return two cells of a table."""
        return f"{self.median:.4f} | {self.low:.4f} to {self.high:.4f}"


def alternate[Number](
    names: Sequence[str],
    block: Callable[[str], Number],
    rounds: int,
    until: float = math.inf,
) -> dict[str, list[Number]]:
    """Run a block of each name in turn, round after round; who goes first changes, too.

    Args:
        names: the ways of running.
        block: runs one block and returns its number, usually seconds a step.
        rounds: at most so many.
        until: no round begins after this time (``time.monotonic``), except the first few.

    Returns:
        The blocks' numbers by name, in the order of the rounds.
    """
    found: dict[str, list[Number]] = {name: [] for name in names}
    for number in range(rounds):
        if number >= FEWEST and time.monotonic() > until:
            break
        for name in list(names)[:: 1 if number % 2 else -1]:
            found[name].append(block(name))
    return found


def ratio(blocks: Sequence[float], others: Sequence[float]) -> Ratio:
    """Compare blocks with the others of the same rounds (the denominators)."""
    quotients = [one / other for one, other in zip(blocks, others, strict=True)]
    low, median, high = statistics.quantiles(quotients, n=4)
    return Ratio(median, low, high)


def versions() -> str:
    """Name the device and what was installed, in one sentence."""
    import torch

    names = ("megatron-core", "transformer-engine", "triton")
    have = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    for name in names:
        try:
            have.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            have.append(f"no {name}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"{device}, {', '.join(have)}."


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says where a page of results goes."""
    parser.add_argument(
        "--out",
        type=lambda text: pathlib.Path(text).resolve(),
        default=RESULTS,
        help="folder of the page (docs/results)",
    )


def anonymous(text: str) -> str:
    """Without the places of this checkout and of Python on this machine."""
    return (
        text.replace(sys.executable, "python")
        .replace(f"{ROOT}{os.sep}", "")
        .replace(sys.prefix, "PREFIX")
    )


def write(page: pathlib.Path, lines: Sequence[str]) -> None:
    """Write a page of results, its folder too; it names no place on this machine."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(anonymous("\n".join([*lines, ""])))
