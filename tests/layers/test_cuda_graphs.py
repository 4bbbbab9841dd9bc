"""A replayed graph of routing and preprocessing: the router's Python is skipped, nothing is lost.

Contract: with ``--cuda-graph-modules moe_router moe_preprocess`` outputs, gradients, committed
vectors and logged metrics are those of the run without graphs, to the bit; capturing adds nothing
to any sum. What is handed on has a gradient only where default vectors give it one; a layer that
gets no routing says so.

Without a GPU a twin of the layer stands for its graph, see ``twin_graphs.py``.
"""

from typing import Any

import pytest
import torch
from building import build_layer, build_transformer_layer
from torch import Tensor
from twin_graphs import GRAPHS, give_graph

from megatron_default_moe import commit, reduce_step_sums

pytestmark = pytest.mark.usefixtures("one_rank")

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"weighting": "uniform"},
    "before-use": {"order": "before-use"},
    "backward-only": {"in_forward": False},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "normalised sigmoid": {"normalized_gate": True, "moe_router_score_function": "sigmoid"},
    "balance loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    "shared experts": {"moe_shared_expert_intermediate_size": 8},
    "topk": {"gradient": "topk"},
    "topk, normalised": {
        "gradient": "topk",
        "normalized_gate": True,
        "moe_router_score_function": "sigmoid",
    },
}


def graphed(**settings: Any) -> Any:
    """A layer after Megatron's capture, its graph the capture pass of a twin."""
    both = {**GRAPHS, **settings}
    layer, twin = build_transformer_layer(**both), build_transformer_layer(**both)
    give_graph(layer, twin, inputs(0))
    return layer


def inputs(seed: int) -> Tensor:
    """[6, 3, 12]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 12, generator=generator, requires_grad=True)


def trained(layer: Any, steps: int = 3) -> list[Tensor]:
    """Outputs, input gradients, metrics and state of some steps of two micro-batches."""
    seen = []
    router = layer.mlp.router
    for number in range(steps):
        router.collects_details = number == steps - 1
        for micro_batch in range(2):
            x = inputs(10 * number + micro_batch)
            y, _ = layer(x, attention_mask=None)
            y.square().sum().backward()
            seen += [y.detach(), x.grad]
        reduce_step_sums(layer)
        commit(layer, taken=True)
    seen += [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    return [*seen, router.step_metrics, *router.buffers()]


@pytest.mark.parametrize("name", CASES)
def test_graphs_of_the_router_change_nothing(name: str) -> None:
    settings = {"beta": 0.5, **CASES[name]}
    expected = trained(build_transformer_layer(**settings))
    layer = graphed(**settings)
    assert not any(buffer.any() for name, buffer in layer.named_buffers() if "local" in name)
    actual = trained(layer)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_topk_hands_on_no_gradient() -> None:
    x = inputs(0)
    for gradient, expected in (("topk", False), ("default", True)):
        router = build_layer(gradient=gradient).router
        router(x)
        carried = [getattr(router, name).requires_grad for name in router.carried]
        assert carried == [expected, False]


def test_a_layer_that_gets_no_routing_says_so() -> None:
    layer, x = build_layer().eval(), inputs(0)
    y, _ = layer(x)
    with pytest.raises(AssertionError, match="routing of this micro-batch is not known"):
        layer.router.finish_output(y)
