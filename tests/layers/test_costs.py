"""What default vectors cost a layer in operations and bytes: counted, and equal to the page.

Contract: docs/results/operations.md says what ``costs.py`` counts; a stage's reduction and commit
are as many operations for four layers as for one; nothing of the size of the layer's output is
made in float32.
"""

import pathlib
import re

import costs
import pytest
import torch

PAGE = pathlib.Path(__file__).parents[2] / "docs/results/operations.md"
CASES = {
    "topk": {"gradient": "topk"},
    "default": {},
    "backward only": {"in_forward": False},
    "uniform weighting": {"weighting": "uniform"},
    "order before-use": {"order": "before-use"},
}


@pytest.fixture(autouse=True)
def no_collectives(monkeypatch: pytest.MonkeyPatch, one_rank: None) -> None:
    # gloo has no meta tensors.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)


def row_of(name: str) -> list[str]:
    (line,) = [x for x in PAGE.read_text().splitlines() if x.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def after(cell: str) -> float:
    """The second of ``before -> after``."""
    return float(re.split(" -> ", cell)[-1].split()[0].replace(",", ""))


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_costs_what_the_page_says(name: str) -> None:
    counted = costs.micro_batch(costs.router_on_meta(**CASES[name]))
    forward, backward = counted["forward"], counted["backward"]
    found = [forward.operations, forward.allocated / 1e6, backward.operations]
    found += [backward.allocated / 1e6, counted["saved"] / 1e6]
    assert [after(cell) for cell in row_of(name)] == pytest.approx(found, abs=0.051)


@pytest.mark.parametrize("name", ["topk", "default"])
def test_a_step_costs_what_the_page_says_however_many_layers(name: str) -> None:
    one, four = (costs.step(layers, **CASES[name]) for layers in (1, 4))
    assert [x.operations for x in one] == [x.operations for x in four]
    row = row_of(f"{name}, step of 4 layers")
    assert [after(cell) for cell in row] == [x.operations for x in four]


def test_no_float32_tensor_is_as_large_as_the_output() -> None:
    counted = costs.micro_batch(costs.router_on_meta())
    output = 2 * costs.TOKENS * costs.WIDTH
    assert counted["forward"].allocated < 1.1 * output
    assert counted["backward"].allocated < 0.2 * output
