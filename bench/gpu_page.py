"""The page docs/results/gpu.md: a row for everything that a GPU has to show, measured or not."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

PAGE = "gpu.md"
NOT_MEASURED = "not measured"
LAYER, TRAINING = "tests/gpu/test_te_layer.py", "tests/gpu/test_te_training.py"
ESTIMATORS = "tests/gpu/test_te_estimators.py"
KERNELS = "tests/kernels/kernels_in_interpreter.py"
Result = dict[str, Any]
"""One line of ``recording``."""


class Row(NamedTuple):
    """Tests that show one thing."""

    what: str
    path: str
    words: tuple[str, ...] = ()
    """All of them are in the tests' names."""

    def holds(self, test: str) -> bool:
        """Whether a test (its pytest id) belongs to this row."""
        return test.startswith(f"{self.path}::") and all(word in test for word in self.words)

    @property
    def command(self) -> str:
        """What runs the tests of this row alone."""
        if not self.words:
            return f"python -m pytest {self.path}"
        return f'python -m pytest -m gpu {self.path} -k "{" and ".join(self.words)}"'


ROWS = (
    Row("the Triton kernels against float64", KERNELS),
    Row(
        "output and router gradient, bf16 and every FP8 recipe",
        LAYER,
        ("output_and_router_gradient",),
    ),
    Row(
        "committed vectors: capacity, fused permutation and routing, operation fuser",
        LAYER,
        ("committed_vectors",),
    ),
    Row("FP8 router padding enters no sum", LAYER, ("router_padding",)),
    Row("constant experts", LAYER, ("constant_experts",)),
    Row("checkpoint round trip", LAYER, ("checkpoint",)),
    Row("recomputation of the layer and of the activation", LAYER, ("recomputation",)),
    Row("shared experts beside the communication", LAYER, ("shared_experts",)),
    Row("the Triton kernels in training", TRAINING, ("losses", "triton-kernels")),
    Row("full recomputation in training", TRAINING, ("losses", "full-recompute")),
    Row(
        "CUDA graphs of attention, of dense layers, of routing and preprocessing",
        TRAINING,
        ("losses", "graphs"),
    ),
    Row("fused permutation and routing in training", TRAINING, ("losses", "fused")),
    Row("weight gradients beside the dispatch", TRAINING, ("losses", "overlapped")),
    Row("FP8 against bf16 in training", TRAINING, ("losses", "fp8-delayed")),
    Row("FP8 router padding in training", TRAINING, ("losses", "fp8-router")),
    *(
        Row(f"{estimator} in a layer and in training", ESTIMATORS, (word,))
        for estimator, word in {
            "`dense`": "straight-through",
            "`sparsemixer`": "mixer-one",
            "`sparsemixer-v2`": "mixer-two",
            "`expert-group`": "groups",
            "`remoe`": "relu",
            "`default-linear`": "linear",
            "`--moe-loss-free-bias`": "bias",
        }.items()
    ),
)

TEXT = """# Results on a GPU

Written by `make gpu`, which runs all of this on one GPU (`tests/gpu/README.md` says what it needs).
A row's command, with `PYTHONPATH=$PWD` before it, runs that row alone. Errors are relative, in the
Euclidean norm of a tensor; each is the nearest to its tolerance in that row."""


def lines(results: Iterable[Result], measured: str = "", parts: Sequence[str] = ()) -> list[str]:
    """Return the page.

    Args:
        results: one a test; a later one of the same test wins.
        measured: hardware, versions and command; empty if nothing has been measured.
        parts: how each program of the run ended.
    """
    by_test = {result["test"]: result for result in results}
    rows = [_row(row, [r for test, r in by_test.items() if row.holds(test)]) for row in ROWS]
    page = [TEXT, "", measured or "Nothing here has been measured yet.", ""]
    page += ["| what | result | largest relative error of its tolerance | command |"]
    page += ["|---|---|---|---|", *rows]
    failed: dict[str, list[str]] = {}
    for test, result in by_test.items():
        if result["outcome"] == "failed":
            failed.setdefault(cell(result["reason"]), []).append(test)
    skipped = Counter(r["reason"] for r in by_test.values() if r["outcome"] == "skipped")
    for title, bullets in {
        "Failed": [_failure(reason, tests) for reason, tests in failed.items()],
        "Not measured, and why": [f"{n} tests: {cell(why)}" for why, n in skipped.most_common()],
        "Programs": parts,
    }.items():
        if bullets:
            page += ["", f"## {title}", "", *(f"- {bullet}" for bullet in bullets)]
    return page


def _failure(reason: str, tests: Sequence[str]) -> str:
    more = f" and {len(tests) - 1} more" if tests[1:] else ""
    return f"`{tests[0]}`{more}: {reason}"


def _row(row: Row, results: Sequence[Result]) -> str:
    counts = Counter(result["outcome"] for result in results)
    found = [f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed") if counts[outcome]]
    result = ", ".join(found) or NOT_MEASURED
    if found and counts["skipped"]:
        result += f", {counts['skipped']} {NOT_MEASURED}"
    return f"| {row.what} | {result} | {_largest(results)} | `{row.command}` |"


def _largest(results: Sequence[Result]) -> str:
    """Of every implementation, the error that is nearest to (or furthest above) its tolerance."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        errors.setdefault(result["implementation"], []).extend(result["errors"])
    worst = {name: max(found, key=_share) for name, found in errors.items() if found}
    return "; ".join(
        f"{name} {error:.1e} of {tolerance:g}".strip() for name, (error, tolerance) in worst.items()
    )


def _share(found: Sequence[float]) -> float:
    """Error over tolerance; what is no number is the worst."""
    error, tolerance = found
    if math.isnan(error) or (error and not tolerance):
        return math.inf
    return error / tolerance if tolerance else 0.0


def cell(text: str) -> str:
    """A line of any text that breaks no table."""
    return " ".join(text.split())[:200].replace("|", "/")
