"""Whole runs of every estimator on two gloo ranks: resumed, recomputed, repeated, skipped, moved.

Contract: a run that is resumed from its own checkpoint, one that recomputes activations and one
whose steps Megatron's rerun machine repeats, give every loss, gradient, weight and state of the
plain run to the last bit; a skipped step leaves no trace in the state; in another layout the run
goes on to 1e-5. A checkpoint of another estimator trains on where that was asked for. ``make test``
runs the cases not marked ``full``; all cases of a session are one launch.
"""

import math
import pathlib
from typing import Any

import pytest
import torch
from launching import TINY, record, steps_of

pytestmark = [pytest.mark.launch, pytest.mark.timeout(3600)]

EP2 = "--expert-model-parallel-size 2"
SELECTIVE = "--recompute-granularity selective --recompute-modules moe"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
FP16 = "--fp16 --initial-loss-scale 256 --loss-scale-window 1000"
HALF_WAY = 4

ESTIMATORS = {
    "dense": "--moe-router-gradient dense --moe-router-topk 2",
    "sparsemixer": "--moe-router-gradient sparsemixer --sparsemixer-mask-width 0.9",
    "sparsemixer-v2": "--moe-router-gradient sparsemixer-v2 --sparsemixer-mask-width 0.9"
    " --moe-router-topk 2",
    "expert-group": "--moe-router-gradient expert-group --moe-router-topk 2",
    "remoe": "--moe-router-gradient remoe --remoe-lambda 2e-3",
    "default-linear": "--moe-router-gradient default-linear --moe-router-topk 2"
    " --default-linear-rank 4",
    "bias": "--moe-loss-free-bias 0.003 --moe-router-topk 2",
}
SHORT = tuple(name for name in ESTIMATORS if name != "default-linear")
VARIANTS: dict[str, tuple[str, bool]] = {
    "again": (f"{EP2} {SELECTIVE}", True),
    "resumed": (EP2, True),
    # As many micro-batches as on two data-parallel ranks: draws and remoe's loss are of each.
    "tp2": ("--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 4", True),
    "recomputed": (f"{EP2} {FULL}", False),
    "recomputed-moe": (f"{EP2} {SELECTIVE}", False),
    "rerun": (EP2, False),
    "skipped": (f"{EP2} {FP16}", False),
    "bf16": (f"{EP2} --bf16 --use-distributed-optimizer", False),
    "mtp": (f"{EP2} {SELECTIVE} --mtp-num-layers 1", False),
    "shared": (f"{EP2} {SELECTIVE} --moe-shared-expert-intermediate-size 24", False),
    "capacity": (f"{EP2} {SELECTIVE} --moe-expert-capacity-factor 0.7", False),
}
"""Flags of a run, and whether it goes on from the checkpoint that the whole run left half-way."""
SPARSE_STEPS = 120
REMOE = (
    f"--moe-router-gradient remoe --remoe-lambda 1e-3 --remoe-factor 1.2 --train-iters"
    f" {SPARSE_STEPS}"
)
RERUN, SKIPPED = ("again", "rerun"), ("skipped",)
NO_CAPACITY = ("remoe",)
BEGUN = {
    "topk-sparsemixer": "--finetune",
    "topk-sparsemixer-v2": "",
    "topk-remoe": "",
    "topk-default-linear": "",
    "sparsemixer-remoe": "--no-load-optim",
    "sparsemixer-topk": "--no-load-optim",
}
"""``SAVED-NOW``, by --default-vector-from-baseline: state that one of the two lacks."""


def case(out: pathlib.Path, name: str, variant: str) -> dict[str, Any]:
    saved = str(out / f"saved-{name}")
    argv = [*TINY, *ESTIMATORS.get(name, f"--moe-router-gradient {name}").split()]
    if variant == "whole":
        return {"argv": [*argv, *EP2.split(), "--save", saved, "--save-interval", str(HALF_WAY)]}
    flags, resumes = VARIANTS[variant]
    argv += [*flags.split(), *(["--load", saved, "--ckpt-step", str(HALF_WAY)] if resumes else [])]
    poison = {"poison": ["gradient", 3, "inf"]} if variant in SKIPPED else {}
    return {"argv": argv, "rerun": variant in RERUN, **poison}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """Every run that the tests of this session ask for."""
    out = tmp_path_factory.mktemp("estimators")
    items = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params for item in items if hasattr(item, "callspec")]
    pairs = {(row["name"], row["variant"]) for row in asked if "variant" in row}
    begun = sorted(row["pair"] for row in asked if "pair" in row)
    names = {name for name, variant in pairs if not alone(variant)}
    names |= {pair.split("-")[0] for pair in begun}
    cases = {f"{name}-whole": case(out, name, "whole") for name in sorted(names)}
    cases |= {f"{name}-{variant}": case(out, name, variant) for name, variant in sorted(pairs)}
    for pair in begun:
        saved, now = pair.split("-", 1)
        flags = ["--load", str(out / f"saved-{saved}"), "--ckpt-step", str(HALF_WAY)]
        argv = [*TINY, "--moe-router-gradient", now, *EP2.split(), *flags, *BEGUN[pair].split()]
        cases[f"begun-{pair}"] = {"argv": [*argv, "--default-vector-from-baseline"]}
    return record(out, 2, cases, timeout=300 + 30 * len(cases))


def alone(variant: str) -> bool:
    """Whether a variant is compared with nothing but itself."""
    return variant in ("skipped", "bf16", "mtp", "shared", "capacity")


def steps(runs: dict[str, Any], name: str, variant: str) -> list[dict[str, Any]]:
    ranks = runs[f"{name}-{variant}"]
    assert {rank["status"] for rank in ranks} == {"ok"}, ranks[0]["status"]
    return steps_of(ranks)


def rows(*variants: str, full: bool = False, names: Any = tuple(ESTIMATORS)) -> list[Any]:
    marks = [pytest.mark.full] if full else []
    return [
        pytest.param(name, variant, id=f"{name}-{variant}", marks=marks)
        for variant in variants
        for name in names
        if not (variant == "capacity" and name in NO_CAPACITY)
    ]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *rows("again", names=SHORT),
        *rows("again", full=True, names=("default-linear",)),
        *rows("resumed", "recomputed", "recomputed-moe", "rerun", full=True),
    ],
)
def test_a_run_is_repeated_to_the_bit(runs: dict[str, Any], name: str, variant: str) -> None:
    """``again`` is resumed, recomputes, and runs every step twice."""
    whole, found = steps(runs, name, "whole"), steps(runs, name, variant)
    assert [step["runs"] for step in found] == [2 if variant in RERUN else 1] * len(found)
    if VARIANTS[variant][1]:
        whole = whole[HALF_WAY:]
    for step, same in zip(found, whole, strict=True):
        assert step["loss"] == same["loss"]
        for number, layer in same["layers"].items():
            mine = step["layers"][number]
            assert torch.equal(mine["router_grad"], layer["router_grad"])
            assert torch.equal(mine["router_weight"], layer["router_weight"])
            assert mine["state"].keys() == layer["state"].keys()
            assert bool(layer["state"]) == (name not in ("dense", "expert-group"))
            for state, value in layer["state"].items():
                assert torch.equal(mine["state"][state], value), state


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *rows("tp2", names=("sparsemixer",)),
        *rows("tp2", names=("sparsemixer-v2", "remoe", "default-linear", "bias"), full=True),
    ],
)
def test_a_run_goes_on_in_another_layout(runs: dict[str, Any], name: str, variant: str) -> None:
    whole = steps(runs, name, "whole")[HALF_WAY:]
    for step, same in zip(steps(runs, name, variant), whole, strict=True):
        assert step["loss"] == pytest.approx(same["loss"], rel=1e-5)
        for number, layer in same["layers"].items():
            for state, value in layer["state"].items():
                mine = step["layers"][number]["state"][state]
                assert (mine - value).double().norm() <= 1e-5 * value.double().norm(), state


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *rows("skipped", names=("sparsemixer", "remoe")),
        *rows("skipped", names=("sparsemixer-v2", "bias", "default-linear"), full=True),
    ],
)
def test_a_skipped_step_leaves_no_trace(runs: dict[str, Any], name: str, variant: str) -> None:
    """In the third step a gradient is infinite, and the loss scaler skips it."""
    found = steps(runs, name, variant)
    assert [step["skipped"] for step in found] == [False, False, True, *[False] * 5]
    for number, layer in found[2]["layers"].items():
        before, after = (found[i]["layers"][number]["state"] for i in (1, 3))
        assert before
        for state, value in layer["state"].items():
            assert torch.equal(value, before[state]), state
        assert any(not torch.equal(value, after[state]) for state, value in before.items())
        if "draw_steps" in before:
            assert int(found[-1]["layers"][number]["state"]["draw_steps"]) == 7


@pytest.mark.full
@pytest.mark.parametrize(("name", "variant"), rows("bf16", "mtp", "shared", "capacity"))
def test_it_trains_in_bf16_with_mtp_shared_experts_and_capacity(
    runs: dict[str, Any], name: str, variant: str
) -> None:
    found = steps(runs, name, variant)
    losses = [step["loss"] for step in found]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert sorted(found[-1]["layers"]) == [1, 2, *([3] if variant == "mtp" else [])]
    for layer in found[-1]["layers"].values():
        for state, value in layer["state"].items():
            trained = state == "output_scale"
            assert trained or value.dtype in (torch.float32, torch.int64)
            assert value.isfinite().all()


def test_remoe_reaches_its_sparsity_and_logs_it(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A large lambda and factor make hundreds of steps of sixty, on two pipeline stages."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = [*TINY, *"--pipeline-model-parallel-size 2 --num-experts 8".split(), *REMOE.split()]
    argv += ["--moe-per-layer-logging", "--tensorboard-dir", str(tmp_path / "events")]
    runs = record(tmp_path, 2, {"remoe-sparse": {"argv": argv}})
    found = steps_of(runs["remoe-sparse"])
    assert len(found) == SPARSE_STEPS
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    sparsity, weight = (
        [event.value for event in events.Scalars(f"remoe {name}")]
        for name in ("sparsity", "lambda")
    )
    target = 1 - 1 / 8
    assert sparsity[0] < 0.7, "it starts dense"
    assert sum(sparsity[-20:]) / 20 == pytest.approx(target, abs=0.03)
    assert min(weight[-20:]) < weight[-1] or max(weight[-20:]) > weight[-1]
    assert found[-1]["loss"] < found[0]["loss"]
    layers = [events.Scalars(f"moe/remoe sparsity_layer_{layer}") for layer in (0, 1)]
    means = [(one.value + other.value) / 2 for one, other in zip(*layers, strict=True)]
    assert means == pytest.approx(sparsity)
    for step, now in zip(weight[1:], found, strict=False):
        for layer in now["layers"].values():
            assert float(layer["state"]["sparsity_weight"]) == pytest.approx(step)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=[] if pair == "topk-sparsemixer" else [pytest.mark.full])
        for pair in BEGUN
    ],
)
def test_state_that_a_checkpoint_lacks_starts_anew(runs: dict[str, Any], pair: str) -> None:
    """At torch_dist's default strictness; the weights are the checkpoint's."""
    saved = pair.split("-")[0]
    before = steps(runs, saved, "whole")
    after = steps(runs, "begun", pair)
    fresh = before[0]["loss"]
    assert after[0]["loss"] < fresh, "the weights were not loaded"
    first = 1 if "--finetune" in BEGUN[pair] else HALF_WAY + 1
    assert len(after) == 8 - first + 1
    for layer in after[-1]["layers"].values():
        if "draw_steps" in layer["state"]:
            assert int(layer["state"]["draw_steps"]) == len(after)
