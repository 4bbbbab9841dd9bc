"""What is logged is what the names say.

Contract: the metrics of a real step equal their definitions, computed apart in float64 from the
layer's weights; the tracker writes means (or sums) over the MoE layers to TensorBoard and W&B, per
layer and expert when asked, on logging steps only, and nothing for a step that was not taken.
(That the stages of a pipeline are gathered is shown by distributed/test_training.py.)
"""

from typing import Any

import pytest
import torch
from building import train_step
from layer_reference import record_routing, reference, tokens

from megatron_default_moe.layers import fidelity
from megatron_default_moe.layers.layer_metrics import NAMES, SUMMED
from megatron_default_moe.loop import tracker
from megatron_default_moe.loop.tracker import Progress, RouterMetricsTracker
from megatron_default_moe.options.estimators import ESTIMATORS


def logged(router: Any) -> dict[str, float]:
    values = dict(zip(NAMES, router.step_metrics.tolist(), strict=False))
    return {name: values[name] for name in (*tracker.OF_ALL, *router.options.metrics)}


@pytest.mark.parametrize("topk", [1, 2], ids="k{}".format)
def test_a_logged_step_has_the_metrics_of_its_definition(new_layer: Any, topk: int) -> None:
    layer = new_layer(moe_router_topk=topk, beta=0.5)
    train_step(layer, tokens(layer, 1))
    assert layer.router.step_metrics is None, "a step that is not logged"
    before_ED = layer.router.default_vectors.clone()
    layer.router.collects_details = True
    inputs = [tokens(layer, 2), tokens(layer, 3)]
    train_step(layer, *inputs)

    found = [reference(layer, x, before_ED) for x in inputs]
    probs_TE, active_TE, own_TED, output_TD = (
        torch.cat([one[name] for one in found]) for name in ("probs", "active", "own", "output")
    )
    weight_TE = probs_TE * active_TE
    mean_ED = torch.einsum("te,ted->ed", weight_TE, own_TED) / weight_TE.sum(0).unsqueeze(-1)
    term_TD = (probs_TE * ~active_TE) @ before_ED.double()
    counts_E = active_TE.sum(0).double()
    used_E = counts_E > 0
    distance_E = (before_ED - mean_ED).norm(dim=-1) / mean_ED.norm(dim=-1)
    expected = {
        "default-vector norm": layer.router.default_vectors.double().norm(dim=-1).mean(),
        "default-vector staleness": distance_E[used_E].mean(),
        "default-vector share": term_TD.norm() / output_TD.norm(),
        "default-vector rejected": 0.0,
        "router entropy": -(probs_TE * probs_TE.log()).sum(-1).mean(),
        "load max/mean": counts_E.max() / counts_E.mean(),
        "dead experts": (~used_E).sum(),
    }
    assert logged(layer.router) == pytest.approx({k: float(v) for k, v in expected.items()})
    load_E = layer.router.step_metrics[len(NAMES) :]
    torch.testing.assert_close(load_E, (counts_E / counts_E.sum()).float())


def test_experts_without_tokens_are_counted_dead(new_layer: Any) -> None:
    layer = new_layer(moe_router_topk=1)
    layer.router.collects_details = True
    x = tokens(layer)[:1, :2]  # two tokens, five experts
    train_step(layer, x)
    used = int(reference(layer, x, layer.router.default_vectors)["active"].any(0).sum())
    assert logged(layer.router)["dead experts"] == 5 - used >= 3


def test_topk_logs_its_load_too(new_layer: Any) -> None:
    layer = new_layer(gradient="topk")
    layer.router.collects_details = True
    train_step(layer, tokens(layer))
    values = logged(layer.router)
    assert values["router entropy"] > 0
    assert values["load max/mean"] >= 1
    reporter = RouterMetricsTracker(
        log_interval=1, num_experts=5, progress=Progress(2, lambda: 0), metrics=()
    )
    row = [[1.0, *layer.router.step_metrics.tolist()]]
    assert {*reporter._scalars(row)} == {"router entropy", "load max/mean", "dead experts"}
    assert not [name for name in reporter._per_layer(row) if "default-vector" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_share_is_as_exact_in_bfloat16(new_layer: Any, dtype: torch.dtype) -> None:
    """It is taken from the term itself, of which a bf16 output keeps little or nothing."""
    layer = new_layer(moe_router_topk=1)
    layer.to(dtype)
    vectors_ED = torch.randn(5, 12, generator=torch.Generator().manual_seed(4)) * 2e-8
    layer.router.default_vectors.copy_(vectors_ED)
    layer.router.collects_details = True
    routed = record_routing(layer)
    (y,) = train_step(layer, tokens(layer).to(dtype))
    ((logits_TE, _, map_TE),) = routed
    term_TD = (logits_TE.double().softmax(-1) * ~map_TE) @ vectors_ED.double()
    share = float(term_TD.norm() / y.double().norm())
    assert share < 1e-3
    assert logged(layer.router)["default-vector share"] == pytest.approx(share, rel=0.005)


def test_a_step_not_taken_has_no_metrics(new_layer: Any) -> None:
    layer = new_layer()
    layer.router.collects_details = True
    train_step(layer, tokens(layer))
    train_step(layer, tokens(layer), taken=False)
    assert layer.router.step_metrics is None


class Written:
    """Takes what TensorBoard's and W&B's writers take."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        self.scalars[name] = float(value)

    def log(self, values: dict[str, Any], iteration: int) -> None:
        self.scalars.update({name: float(value) for name, value in values.items()})


@pytest.fixture(params=[{}, {"gradient": "remoe"}, {"gradient": "topk", "loss_free_bias": 0.1}])
def report(new_layer: Any, request: pytest.FixtureRequest) -> Any:
    """Return a function that reports two MoE layers of three, numbers 1 and 3."""
    layers = [new_layer(seed=seed, num_layers=3, **request.param) for seed in (1, 2)]
    for number, layer in zip((1, 3), layers, strict=True):
        layer.set_layer_number(number)
        layer.router.collects_details = True
        train_step(layer, tokens(layer, number))
    progress = Progress(train_iters=40, tokens=lambda: 12345)
    options = layers[0].router.options
    reporter = RouterMetricsTracker(
        log_interval=10, num_experts=5, progress=progress, metrics=options.metrics
    )
    reporter.routers = [layer.router for layer in layers]

    def run(iteration: int, per_layer: bool = False) -> tuple[str, Written, Written, list[Any]]:
        writer, wandb = Written(), Written()
        line = reporter.report(
            1.0,
            iteration,
            writer=writer,
            wandb_writer=wandb,
            per_layer_logging=per_layer,
            force_initialize=True,
            track_names=[],
            num_layers=3,
            moe_layer_freq=2,
            mtp_num_layers=None,
        )
        return line, writer, wandb, reporter.routers

    return run


def test_scalars_are_means_or_sums_over_the_moe_layers(report: Any) -> None:
    line, writer, wandb, routers = report(10)
    assert writer.scalars == wandb.scalars
    names = {*tracker.OF_ALL, *routers[0].options.metrics}
    assert set(writer.scalars) == {*names, "consumed tokens"}
    assert writer.scalars["consumed tokens"] == 12345
    rows = [logged(router) for router in routers]
    for name in names:
        total = sum(row[name] for row in rows)
        expected = total if name in SUMMED else total / 2
        assert writer.scalars[name] == pytest.approx(expected), name
        assert f" {name}: " in line
    assert "consumed tokens: 12345" in line


def test_layers_and_experts_are_written_when_asked(report: Any) -> None:
    _, writer, _, routers = report(20, per_layer=True)
    for index, router in zip((0, 2), routers, strict=True):
        for name, value in logged(router).items():
            assert writer.scalars[f"moe/{name}_layer_{index}"] == pytest.approx(value)
        for expert in range(5):
            load = float(router.step_metrics[len(NAMES) + expert])
            assert writer.scalars[f"load/layer_{index}/expert_{expert}"] == pytest.approx(load)
    assert not any("_layer_1" in name or "layer_1/" in name for name in writer.scalars)


def test_other_steps_write_nothing(report: Any) -> None:
    line, writer, wandb, _ = report(11)
    assert not writer.scalars
    assert not wandb.scalars
    assert "dead experts" not in line


def test_remoe_logs_its_sparsity_and_the_lambda_of_the_step(new_layer: Any) -> None:
    layer = new_layer(gradient="remoe", remoe_lambda=0.5)
    layer.router.collects_details = True
    x = tokens(layer)
    train_step(layer, x)
    open_TE = x.detach().reshape(-1, x.shape[-1]) @ layer.router.weight.detach().T > 0
    values = logged(layer.router)
    assert values["remoe sparsity"] == pytest.approx(1 - float(open_TE.double().mean()))
    assert values["remoe lambda"] == 0.5
    assert layer.router.sparsity_weight != 0.5


def test_a_bias_logs_its_spread_in_the_step(new_layer: Any) -> None:
    layer = new_layer(gradient="topk", loss_free_bias=0.1)
    layer.router.choice_bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1, 0.0]))
    layer.router.collects_details = True
    train_step(layer, tokens(layer))
    assert logged(layer.router)["choice-bias spread"] == pytest.approx(0.5)


def test_every_metric_is_everybodys_or_an_estimators() -> None:
    owned = {name for one in ESTIMATORS for name in one.metrics}
    asked_for = {"choice-bias spread", *fidelity.NAMES}
    assert {*tracker.OF_ALL, *owned, *asked_for} == {*NAMES}


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(tracker.time, "monotonic", lambda: next(clock))
    progress = Progress(train_iters=40, tokens=lambda: 0)
    assert progress.eta(1) is None
    left = progress.eta(11)  # ten steps in thirty seconds, 29 to go
    assert left is not None
    assert left.total_seconds() == 87
