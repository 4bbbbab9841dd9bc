"""The way of a gradient between the graphs of Megatron's combined schedule, on one rank.

Contract: the combined schedule changes no bit of losses, gradients, state and metrics, with and
without CUDA graphs of routing and preprocessing (a twin stands for a graph, ``twin_graphs.py``);
cutting the scores off and bringing their gradient back changes no gradient, in a graph
that is cut in two as in a whole one; nothing is cut where no gradient is taken or no default vector
used; a first graph that runs backward before the last says so; memory that two streams use is
marked. Training with expert parallelism is in ``distributed/test_combined_schedule.py``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from building import build_layer, build_model
from megatron.core.models.common import utils as plan_nodes
from megatron.core.pipeline_parallel import utils
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from twin_graphs import GRAPHS, give_graph

from megatron_default_moe import commit, reduce_step_sums
from megatron_default_moe.layers import optimizer_step, overlap

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(autouse=True)
def no_loss_scale_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron keeps one in its class: of another shape without a schedule, and for ever."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)


def layer_and_input(**settings: Any) -> tuple[Any, torch.Tensor]:
    layer = build_layer(**settings)
    layer.router.default_vectors.normal_(generator=torch.Generator().manual_seed(3))
    x = torch.randn(7, 2, 12, generator=torch.Generator().manual_seed(5))
    return layer, x.requires_grad_()


def gradients(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    y, _ = layer(x)
    y.square().sum().backward()
    return [x.grad, layer.router.weight.grad]


@pytest.mark.parametrize("in_forward", [True, False])
def test_a_whole_graph_has_the_same_gradients(in_forward: bool) -> None:
    plain = gradients(*layer_and_input(in_forward=in_forward))
    layer, x = layer_and_input(in_forward=in_forward)
    # Upstream's config only takes the flag with expert parallelism.
    layer.config.overlap_moe_expert_parallel_comm = True
    cut = gradients(layer, x)
    assert all(map(torch.equal, cut, plain))
    assert plain[1].any()


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"weighting": "uniform", "bias_correction": True},
    "backward-only": {"in_forward": False},
    "normalised sigmoid": {"normalized_gate": True, "moe_router_score_function": "sigmoid"},
    "shared experts": {"moe_shared_expert_intermediate_size": 8},
    "topk": {"gradient": "topk"},
}


def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(16, (3, 9), generator=generator)
        yield {
            "input_ids": tokens[:, :-1],
            "position_ids": torch.arange(8).expand(3, 8),
            "attention_mask": torch.ones(1, 1, 8, 8).tril() < 0.5,
            "labels": tokens[:, 1:],
        }


def forward_step(
    data: Iterator[dict[str, torch.Tensor]], model: Any, return_schedule_plan: bool = False
) -> Any:
    run = model.build_schedule_plan if return_schedule_plan else model
    return run(**next(data)), lambda losses: (losses.mean(), {"loss": losses.mean().detach()})


def trained(model: Any, overlap: bool) -> list[torch.Tensor]:
    """Losses, metrics, gradients and state of two steps of three micro-batches."""
    # Upstream's config only takes the flag with expert parallelism.
    model.config.overlap_moe_expert_parallel_comm = overlap
    model.config.finalize_model_grads_func = None
    seen = []
    for number in range(2):
        for router in optimizer_step.routers(model):
            router.collects_details = number == 1
        losses = forward_backward_no_pipelining(
            forward_step_func=forward_step,
            data_iterator=batches(3),
            model=model,
            num_microbatches=3,
            seq_length=8,
            micro_batch_size=3,
        )
        reduce_step_sums(model)
        commit(model, taken=True)
        seen += [one["loss"] for one in losses]
    seen += [router.step_metrics for router in optimizer_step.routers(model)]
    return [*seen, *(parameter.grad for parameter in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs of the router"])
@pytest.mark.parametrize("name", CASES)
def test_the_combined_schedule_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, graphs: bool
) -> None:
    # On one rank what arrives is what was sent, and the schedule frees what was sent.
    monkeypatch.setattr(plan_nodes, "should_free_input", lambda *args: False)
    settings = {"beta": 0.5, **CASES[name], **(GRAPHS if graphs else {})}
    expected = trained(build_model(**settings), overlap=False)
    model = build_model(**settings)
    if graphs:
        twin = build_model(**settings)
        twin.config.overlap_moe_expert_parallel_comm = True
        model.config.overlap_moe_expert_parallel_comm = True
        for layer, other in zip(model.decoder.layers, twin.decoder.layers, strict=True):
            give_graph(layer, other, torch.randn(8, 3, 12, requires_grad=True))
    for one, other in zip(trained(model, overlap=True), expected, strict=True):
        assert torch.equal(one, other)


def test_the_layer_goes_on_with_a_leaf() -> None:
    layer, x = layer_and_input()
    probs, _ = layer.route(x)
    whole = layer.router.routed_scores
    assert not whole.is_leaf
    cut = overlap.cut(layer.router, probs)
    leaf = layer.router.routed_scores
    assert leaf.is_leaf
    assert torch.equal(leaf, whole)
    assert torch.equal(cut, probs)
    # The last graph first, then the first.
    (leaf * 2).sum().backward()
    (cut * 0).sum().backward()
    logits = torch.nn.functional.linear(x.detach().flatten(0, 1), layer.router.weight)
    assert torch.equal(leaf, logits)
    expected = (2 * x.detach().flatten(0, 1).sum(0)).expand_as(layer.router.weight)
    torch.testing.assert_close(layer.router.weight.grad, expected)
    assert leaf.grad is None


def test_memory_that_two_streams_use_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: dict[int, Any] = {}

    def record(tensor: torch.Tensor, stream: Any) -> None:
        marked[tensor.data_ptr()] = stream

    layer, x = layer_and_input()
    communicating, computing = torch.cuda.Stream(), torch.cuda.Stream()
    monkeypatch.setattr(utils, "_COMM_STREAM", communicating)
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    cut = overlap.cut(layer.router, layer.route(x)[0])
    carried = [getattr(layer.router, name) for name in layer.router.carried]
    assert marked == {tensor.data_ptr(): communicating for tensor in carried}
    leaf = layer.router.routed_scores
    leaf.sum().backward()
    gradient = leaf.grad.data_ptr()
    with torch.cuda.stream(computing):
        cut.sum().backward()
    assert marked[gradient] is computing


def test_the_wrong_order_is_noticed() -> None:
    layer, x = layer_and_input()
    cut = overlap.cut(layer.router, layer.route(x)[0])
    with pytest.raises(AssertionError, match="has not run backward"):
        cut.sum().backward()


@pytest.mark.parametrize("case", ["no gradient", "frozen", "unused"])
def test_nothing_is_cut_where_nothing_comes_back(case: str) -> None:
    layer, x = layer_and_input(in_eval=False)
    x = x.detach()
    layer.router.weight.requires_grad_(case != "frozen")
    layer.train(case != "unused")
    with torch.set_grad_enabled(case != "no gradient"):
        probs, _ = layer.route(x)
        scores = layer.router.routed_scores
        assert overlap.cut(layer.router, probs) is probs
    assert layer.router.routed_scores is scores
