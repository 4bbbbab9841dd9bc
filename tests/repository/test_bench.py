"""The benches: their statistics, their bounds in time, and a whole run at a tiny size.

Contract: a ratio is of neighbours, so that drift cancels; a bench ends when its time is over and
keeps what it has; what trains on a GPU trains, tiny, without one. (That Megatron takes the flags
for an H100, and that the models fit it: ``test_plan.py``.)
"""

import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import pairs  # noqa: E402
import step  # noqa: E402


def test_blocks_alternate_and_drift_cancels() -> None:
    order: list[str] = []

    def block(name: str) -> float:
        order.append(name)
        # The machine gets slower with every round; one way takes 3 % longer.
        return (1 + (len(order) - 1) // 2) * {"a": 1.0, "b": 1.03}[name]

    times = pairs.alternate(["a", "b"], block, rounds=6)
    assert order == ["b", "a", "a", "b"] * 3
    found = pairs.ratio(times["b"], times["a"])
    assert found == pytest.approx((1.03, 1.03, 1.03))
    assert statistics.median(times["b"]) / times["a"][0] > 2
    assert str(pairs.Ratio(1.0021, 0.99, 1.01)) == "1.0021 | 0.9900 to 1.0100"


def test_quartiles_are_of_the_ratios() -> None:
    found = pairs.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert found == (3.0, 1.5, 4.5)
    with pytest.raises(ValueError, match="longer"):
        pairs.ratio([1.0], [1.0, 2.0])


def test_no_round_begins_when_the_time_is_over() -> None:
    done = pairs.alternate("ab", lambda name: 1.0, rounds=50, until=time.monotonic() - 1)
    assert [len(blocks) for blocks in done.values()] == [pairs.FEWEST] * 2
    assert len(pairs.alternate("ab", lambda name: 1.0, rounds=50, until=math.inf)["a"]) == 50


def test_flags_are_left_out_with_their_values() -> None:
    argv = "--a 1 --keep x y --b --c=2 --d 3 4 --last".split()
    flags = frozenset(("--a", "--b", "--c", "--d"))
    assert step.without(argv, flags) == "--keep x y --last".split()


def test_a_process_that_takes_too_long_or_fails_is_one_line() -> None:
    code, output = step.bounded([sys.executable, "-uc", "import time; print(7); time.sleep(99)"], 3)
    assert (code, output) == (124, "7\n")
    assert step.reason(code, output) == "not measured: out of time"
    code, output = step.bounded([sys.executable, "-c", "raise ValueError('a | b')"], math.inf)
    assert step.reason(code, output) == "failed (exit code 1): ValueError: a / b"


def test_launches_beyond_the_stock_layers() -> None:
    assert step.extra([20, 14], [14, 8], 3) == "2 + 2"
    assert step.extra([15, 14], [14, 8], 2) == "0.5 + 3"
    assert step.extra([0, 14], [0, 8], 3).startswith("not measured")


def test_a_profiler_that_fails_costs_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(step, "counted", fail)
    none = step.launches_if_counted(None, None)
    assert step.extra(none, none, 2) == "not measured: the profiler saw none"


def test_without_a_device_the_bench_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "bench/step.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.strip()) == (2, step.NEEDS_DEVICE)


@pytest.mark.launch
def test_whole_steps_at_a_tiny_size(tmp_path: pathlib.Path) -> None:
    """Megatron's own model, schedule and optimizer, from a file of examples/."""
    flags = f"--tiny --rounds 3 --steps 1 --out {tmp_path}".split()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "bench/step.py", *flags, "--shape", "1.96B 32c4"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = [line for line in (tmp_path / step.PAGE).read_text().splitlines() if "32c4" in line]
    topk, default, kernels = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table)
    assert topk[1:3] == ["TopK", "2 of 24"]
    assert default[1] == "Default"
    assert 0 < float(default[5]) < 100
    assert default[8] == "3"
    # Default MoE's own operators are there, and TopK has fewer.
    assert min(float(count) for count in default[9].split(" + ")) > 0
    assert kernels[1:] == ["Default, kernels", "not measured: there are none for this device"]
