"""Run a file of tests in a process of its own: what it needs holds for a whole process."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run_tests(name: str, *flags: str, **environment: str) -> None:
    """Run ``tests/<name>`` with pytest; its output is the failure."""
    # The caller's own paths stay: Transformer Engine and Megatron may lie there.
    given = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), given])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    # What this process is to pytest-xdist is none of that one's business.
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *flags, str(ROOT / "tests" / name)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
