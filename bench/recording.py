"""A pytest plugin: every test's result as a line of JSON, written as soon as it is known.

    python -m pytest -p recording --record FILE [--until MONOTONIC_SECONDS] ...

A session that is ended from outside loses only the test it was in. After ``--until``
(``time.monotonic``) no test begins any more; the rest is skipped for want of time.
"""

import json
import math
import pathlib
import time
from typing import Any

import pytest

OUT_OF_TIME = "out of time"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two flags."""
    parser.addoption("--record", type=pathlib.Path, help="file of the results, a line a test")
    parser.addoption("--until", type=float, default=math.inf, help="begin no test after this")


def pytest_configure(config: pytest.Config) -> None:
    """Start to record if a file was named."""
    if path := config.getoption("--record"):
        config.pluginmanager.register(Recorder(path, config.getoption("--until")))


class Recorder:
    """Writes the lines."""

    def __init__(self, path: pathlib.Path, until: float) -> None:
        self.path, self.until = path, until

    def pytest_runtest_setup(self) -> None:
        """Begin no test when the time is over."""
        if time.monotonic() > self.until:
            pytest.skip(OUT_OF_TIME)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure, too."""
        if report.failed:
            self._write(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the test itself, or what kept it from running or ended badly after it."""
        if report.when == "call" or not report.passed:
            self._write(report)

    def _write(self, report: Any) -> None:
        properties = getattr(report, "user_properties", [])
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": getattr(report, "duration", 0.0),
            "errors": [value for name, value in properties if name == "error"],
            "implementation": dict(properties).get("implementation", ""),
            "reason": _reason(report),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _reason(report: Any) -> str:
    """Why a test was skipped or failed, in one line."""
    if report.passed:
        return ""
    if report.skipped and isinstance(report.longrepr, tuple):
        return " ".join(report.longrepr[2].removeprefix("Skipped: ").split())
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).strip().splitlines() or [""]
    # The error is the first line of a crash, and the last of a file that cannot be imported.
    return lines[0 if crash else -1].strip()
