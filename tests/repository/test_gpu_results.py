"""``make gpu``: its page, its bounds in time, what it records; none of which needs a GPU.

Contract: docs/results/gpu.md has the rows of today, measured or not; every GPU test belongs
to one row and every row has tests; results become numbers, failures and reasons; a program is ended
with all its children when its time is over, and the others go on.
"""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import gpu_page  # noqa: E402
import pairs  # noqa: E402
import recording  # noqa: E402


def result(test: str, outcome: str, errors: object = (), one: str = "", reason: str = "") -> dict:
    return {
        **{"test": test, "outcome": outcome, "errors": errors},
        **{"implementation": one, "reason": reason},
    }


def row(page: list[str], what: str) -> list[str]:
    (line,) = (line for line in page if line.startswith(f"| {what} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def parts_that_stay(page: list[str]) -> list[tuple[str, str]]:
    """What each row is about, and its command: all that no measurement changes."""
    rows = [line.split("|") for line in page if line.startswith("| ")]
    assert [len(cells) for cells in rows] == [6] * len(rows)
    return [(cells[1], cells[-2]) for cells in rows]


def test_the_page_is_current() -> None:
    page = (pairs.RESULTS / gpu_page.PAGE).read_text().splitlines()
    assert parts_that_stay(page) == parts_that_stay(gpu_page.lines([])), "write it with `make gpu`"


def test_a_measured_page_is_current_too() -> None:
    """Else the first results would break the tests."""
    passed = result(f"{gpu_page.LAYER}::test_constant_experts", "passed", [[1e-4, 1e-2]])
    failed = result(f"{gpu_page.KERNELS}::test_one", "failed", reason="a reason")
    measured = gpu_page.lines([passed, failed], "`make gpu`. A GPU.", ["a program: ended well"])
    empty = gpu_page.lines([])
    assert parts_that_stay(measured) == parts_that_stay(empty)
    assert "\n".join(empty).count("| not measured |") == len(gpu_page.ROWS)
    without_a_row = [line for line in measured if not line.startswith("| constant experts")]
    assert parts_that_stay(without_a_row) != parts_that_stay(empty)


def test_every_gpu_test_is_in_one_row() -> None:
    command = "-m pytest -o addopts= --collect-only -q -p no:cacheprovider -m".split()
    collected = []
    for path, marker in gpu.MARKERS.items():
        done = subprocess.run(
            [sys.executable, *command, marker, path],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        collected += [line for line in done.stdout.splitlines() if "::" in line]
    assert len(collected) > 100
    for test in collected:
        assert sum(one.holds(test) for one in gpu_page.ROWS) == 1, test
    for one in gpu_page.ROWS:
        assert any(one.holds(test) for test in collected), one.what


def test_a_page_with_results() -> None:
    layer = f"{gpu_page.LAYER}::test_constant_experts_make_a_dense_mixture"
    training = f"{gpu_page.TRAINING}::test_losses_and_vectors_stay"
    page = gpu_page.lines(
        [
            result(f"{layer}[a]", "passed", [[1e-4, 1e-2], [3e-3, 1e-2]], "te-bf16"),
            result(f"{layer}[b]", "failed", [[2e-1, 1e-1]], "te-fp8", "AssertionError: a | b"),
            result(f"{layer}[c]", "skipped", reason="no FP8"),
            result(f"{training}[triton-kernels]", "skipped", reason="no FP8"),
            result(f"{training}[full-recompute]", "passed", [[float("nan"), 1e-3], [9.0, 1e-3]]),
            result(f"{training}[fused-permute-and-router]", "passed", [[0.0, 0.0]]),
            result(f"{training}[fused-permute-and-router]", "failed", reason="at its end"),
            result(f"{training}[fp8-delayed]", "failed", reason="at its end"),
        ],
        "`make gpu`. A GPU.",
        ["bench/step.py: ended well"],
    )
    assert "`make gpu`. A GPU." in page
    assert row(page, "constant experts")[:2] == [
        "1 passed, 1 failed, 1 not measured",
        "te-bf16 3.0e-03 of 0.01; te-fp8 2.0e-01 of 0.1",
    ]
    assert row(page, "the Triton kernels in training")[0] == "not measured"
    assert row(page, "full recomputation in training")[:2] == ["1 passed", "nan of 0.001"]
    assert row(page, "fused permutation and routing in training")[0] == "1 failed"
    text = "\n".join(page)
    assert f"## Failed\n\n- `{layer}[b]`: AssertionError: a / b\n- `{training}[fused" in text
    assert "[fused-permute-and-router]` and 1 more: at its end\n" in text
    assert "## Not measured, and why\n\n- 2 tests: no FP8\n" in text
    assert text.endswith("## Programs\n\n- bench/step.py: ended well")


def test_programs_are_bounded_and_go_on(tmp_path: pathlib.Path) -> None:
    """The first has a child of its own, which must not stay behind either."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); "
    grandchild = f"import time; time.sleep(4); open({str(tmp_path / 'alive')!r}, 'w')"
    now = time.monotonic()
    ended = gpu.run_together(
        [
            gpu.Part("slow", ["-c", child.format(grandchild) + "time.sleep(60)"], now + 2),
            gpu.Part("fails", ["-c", f"raise ValueError({str(gpu.ROOT / 'a.py')!r})"], now + 60),
            gpu.Part("fine", ["-c", "import recording, megatron_default_moe"], now + 60),
        ],
        tmp_path,
    )
    assert time.monotonic() - now < 20
    assert ended[0].startswith("slow: stopped for want of time after 2 s")
    assert ended[1].startswith("fails: failed (exit code 1): ValueError: a.py after")
    assert ended[2].startswith("fine: ended well")
    time.sleep(max(0.0, now + 6 - time.monotonic()))
    assert not (tmp_path / "alive").exists()


def test_all_parts_end_before_the_time_is_over(tmp_path: pathlib.Path) -> None:
    assert list(gpu.SHARES) == sorted(gpu.SHARES)
    assert gpu.SHARES[-1] < 1
    end = time.monotonic() + 100
    part = gpu.bench("bench/step.py", tmp_path, end)
    assert part.end == end
    seconds = float(part.command[part.command.index("--seconds") + 1])
    assert 80 < seconds < 100 - gpu.GRACE / 2 + 1
    for one in gpu.parts_of_tests(tmp_path, end):
        assert float(one.command[one.command.index("--until") + 1]) == end - gpu.GRACE


@pytest.mark.launch
def test_real_tests_become_rows(tmp_path: pathlib.Path) -> None:
    """The rows of the layer's tests that need no GPU, through the same commands."""
    end = time.monotonic() + 120
    (part,) = gpu.parts_of_tests(tmp_path, end, {gpu_page.LAYER: "not gpu"})
    ended = gpu.run_together([part._replace(command=[*part.command, "-k", "constant"])], tmp_path)
    assert "ended well" in ended[0], (tmp_path / "test_te_layer.log").read_text()
    results = gpu.read(tmp_path)
    assert len(results) == 2
    found = row(gpu_page.lines(results), "constant experts")
    assert found[0] == "2 passed"
    number = r"\d\.\de-\d\d"
    assert re.fullmatch(
        f"cpu-local-fp32 {number} of 1e-05; cpu-local-bf16 {number} of 0.02", found[1]
    )


def test_what_is_recorded(tmp_path: pathlib.Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nowhere\n")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_fails(record_property):\n"
        "    record_property('error', (2.0, 1.0))\n"
        "    assert 2.0 <= 1.0, 'too far'\n"
        "def test_skips(): pytest.skip('no such device')\n"
    )
    gpu.run_together(
        [
            gpu.Part(
                name,
                f"-m pytest -q -p recording -p no:cacheprovider -c {os.devnull}"
                f" --rootdir {tmp_path} --record {tmp_path / name}.jsonl --until {until}"
                f" {tmp_path / name}.py".split(),
                time.monotonic() + 60,
            )
            for name, until in {"test_broken": "inf", "test_some": "inf"}.items()
        ],
        tmp_path,
    )
    with (tmp_path / "test_some.jsonl").open("a") as file:
        file.write('{"test": "cut off')
    broken, fails, skips = gpu.read(tmp_path)
    assert (broken["outcome"], broken["test"]) == ("failed", "test_broken.py")
    assert "nowhere" in broken["reason"]
    assert (fails["outcome"], fails["errors"]) == ("failed", [[2.0, 1.0]])
    assert "too far" in fails["reason"]
    assert (skips["outcome"], skips["reason"]) == ("skipped", "no such device")


def test_no_test_begins_when_the_time_is_over(tmp_path: pathlib.Path) -> None:
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    record = tmp_path / "one.jsonl"
    command = f"-m pytest -q -p recording -p no:cacheprovider -c {os.devnull} --rootdir {tmp_path}"
    gpu.run_together(
        [
            gpu.Part(
                "one",
                f"{command} --record {record} --until 1 {tmp_path}/test_one.py".split(),
                time.monotonic() + 60,
            )
        ],
        tmp_path,
    )
    (found,) = gpu.read(tmp_path)
    assert (found["outcome"], found["reason"]) == ("skipped", recording.OUT_OF_TIME)


def test_a_python_without_torch_is_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "bench/gpu.py"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = gpu.NEEDS_PACKAGE.format("torch")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (2, "", said)


def test_a_page_names_no_place_on_this_machine(tmp_path: pathlib.Path) -> None:
    places = [str(ROOT / "bench" / "gpu.py"), sys.executable, f"{sys.prefix}/lib/x.so"]
    pairs.write(tmp_path / "page.md", places)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("bench/gpu.py\npython\n")
    assert str(ROOT) not in text
    assert sys.prefix not in text


def test_without_a_device_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "bench/gpu.py"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (2, "", gpu.NEEDS_DEVICE)
