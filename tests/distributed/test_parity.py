"""The same vectors, losses and router gradients in every layout.

Contract (design: exactness): from one checkpoint and data order, eight real training steps agree
with the one-rank run to 1e-5 relative, for every parallel layout and dispatcher, at a fixed number
of micro-batches; order after-use also for every split into micro-batches. What upstream makes
layout-dependent is left off or compared at a fixed number of micro-batches (``global_aux_loss``).

A row is one layout of one model; all rows of a world size run in one launch. ``make test`` runs the
rows not marked ``full``.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import pytest
import torch
from launching import TINY, record, steps_of

pytestmark = [pytest.mark.launch, pytest.mark.timeout(3600)]

TOLERANCE = 1e-5
MODELS = {
    "k1": "",
    "k2": "--moe-router-topk 2",
    "k4": "--num-experts 8 --moe-router-topk 4",
    "uniform": "--default-vector-weighting uniform --moe-router-topk 2",
    "backward-only": "--no-default-vector-in-forward",
    "fade-in": "--default-vector-fade-in 5",
    "shared": "--moe-shared-expert-intermediate-size 24",
    "dense-first": "--moe-layer-freq [0,1,1,1] --ffn-hidden-size 48",
    "seq-aux": "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01",
    "global-aux": "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.01",
    "starved": "--num-experts 16 --seq-length 8 --max-position-embeddings 8",
    "before-use": "--default-vector-order before-use --moe-router-topk 2",
    "paper": "--paper-default-moe",
    "mtp": "--mtp-num-layers 1",
    "deepseek": "--num-experts 8 --moe-router-topk 2 --moe-router-score-function sigmoid"
    " --default-vector-normalized-gate --moe-router-enable-expert-bias"
    " --moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-topk-scaling-factor 2.5",
    "linear": "--moe-router-gradient default-linear --default-linear-rank 5 --moe-router-topk 2",
    "linear-k1": "--moe-router-gradient default-linear --default-linear-rank 5"
    " --default-vector-weighting uniform",
    "dense": "--moe-router-gradient dense --moe-router-topk 2",
    "dense-k1": "--moe-router-gradient dense",
    "sparsemixer": "--moe-router-gradient sparsemixer --sparsemixer-mask-width 0.9",
    "sparsemixer-v2": "--moe-router-gradient sparsemixer-v2 --sparsemixer-mask-width 0.9"
    " --moe-router-topk 2",
    "expert-group": "--moe-router-gradient expert-group --moe-router-topk 2",
    "expert-group-forward": "--moe-router-gradient expert-group --expert-group-in-forward"
    " --expert-group-size 3",
    "remoe": "--moe-router-gradient remoe --remoe-lambda 2e-3 --num-experts 8",
    "bias": "--moe-loss-free-bias 0.003 --moe-router-topk 2",
    "bias-topk": "--moe-loss-free-bias 0.003 --moe-router-gradient topk"
    " --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 --num-experts 8",
    "sqrtsoftplus": "--moe-router-topk 2 --moe-router-score-function sqrtsoftplus"
    " --default-vector-normalized-gate",
}
"""Flags of the models, each of which has a one-rank reference."""
ESTIMATORS: dict[str, tuple[str, ...]] = {
    "linear": ("dp2 ep2", "tp2"),
    "linear-k1": (),
    "dense": ("dp2 ep2", "tp2"),
    "dense-k1": (),
    "sparsemixer": ("dp2 ep2", "tp2"),
    "sparsemixer-v2": ("tp2",),
    "expert-group": ("dp2 ep2", "tp2"),
    "expert-group-forward": (),
    "remoe": ("dp2 ep2", "tp2", "pp2 vpp"),
    "bias": ("dp2 ep2",),
    "bias-topk": (),
}
"""The other estimators, in five layouts each; the ones that ``make test`` runs."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One layout of one model."""

    model: str
    layout: str
    full: bool = False
    micro_batches: int = 2

    @property
    def flags(self) -> list[str]:
        """Megatron's flags for the layout: ``tp2 etp1 ep2 pp2 vpp allgather``, and what each
        stage holds (``Et|tttL``)."""
        words = self.layout.split()
        sizes = {name: self.size(name) for name in ("tp", "pp", "ep", "etp")}
        names = {
            "tp": "--tensor-model-parallel-size",
            "pp": "--pipeline-model-parallel-size",
            "ep": "--expert-model-parallel-size",
            "etp": "--expert-tensor-parallel-size",
        }
        flags = [word for name, size in sizes.items() if size for word in (names[name], str(size))]
        flags += ["--sequence-parallel"] if "tp2" in words else []
        flags += ["--num-layers-per-virtual-pipeline-stage", "1"] if "vpp" in words else []
        flags += ["--moe-token-dispatcher-type", "allgather"] if "allgather" in words else []
        flags += [f for w in words if "|" in w for f in ("--pipeline-model-parallel-layout", w)]
        data_parallel = self.ranks // ((sizes["tp"] or 1) * (sizes["pp"] or 1))
        micro_batch = 8 // (data_parallel * self.micro_batches)
        return [*flags, "--micro-batch-size", str(micro_batch)]

    def size(self, name: str) -> int | None:
        """The parallel size that the layout gives, if any."""
        found = [w for w in self.layout.split() if w.startswith(name) and w[len(name) :].isdigit()]
        return int(found[0][len(name) :]) if found else None

    @property
    def ranks(self) -> int:
        """World size: ``dp`` times the model-parallel sizes."""
        return (self.size("tp") or 1) * (self.size("pp") or 1) * (self.size("dp") or 1)

    @property
    def name(self) -> str:
        """A file name."""
        layout = self.layout.replace(" ", "_").replace("|", "!")
        return f"{self.model}-{layout}-m{self.micro_batches}"


ROWS = [
    Row("k1", "dp2"),
    Row("k1", "dp2 ep2"),
    Row("k1", "dp2 ep2 allgather"),
    Row("k1", "tp2"),
    Row("k1", "tp2 etp1", full=True),
    Row("k1", "tp2 etp1 ep2", full=True),
    Row("k1", "tp2 allgather", full=True),
    Row("k1", "pp2", full=True),
    Row("k1", "pp2 vpp"),
    Row("k1", "pp2 Et|tttL"),
    Row("before-use", "pp2 Ettt|tL", full=True),
    Row("k2", "pp2 E|ttttL", full=True),
    Row("k2", "pp2 Ett|t||tL", full=True),
    Row("mtp", "pp2 Ettt|tmL", full=True),
    Row("linear", "pp2 Et|tttL"),
    Row("k1", "pp2 dp2 ep2 Et|tttL", full=True),
    Row("k1", "dp2 ep2", micro_batches=1),
    Row("k1", "dp2 ep2", micro_batches=4),
    Row("k1", "tp2", full=True, micro_batches=4),
    Row("k2", "dp2 ep2"),
    Row("k2", "tp2", full=True),
    Row("k2", "pp2", full=True),
    Row("k2", "dp2 ep2 allgather", full=True),
    Row("k4", "dp2 ep2", full=True),
    Row("k4", "tp2", full=True),
    Row("uniform", "dp2 ep2", full=True),
    Row("uniform", "tp2", full=True),
    Row("backward-only", "dp2 ep2", full=True),
    Row("backward-only", "tp2", full=True),
    Row("fade-in", "dp2 ep2"),
    Row("fade-in", "tp2", full=True),
    Row("fade-in", "pp2 vpp", full=True),
    Row("shared", "dp2 ep2", full=True),
    Row("shared", "tp2", full=True),
    Row("dense-first", "dp2 ep2", full=True),
    Row("dense-first", "pp2", full=True),
    Row("seq-aux", "dp2 ep2", full=True, micro_batches=4),
    Row("seq-aux", "dp2", full=True),
    Row("global-aux", "dp2"),
    Row("global-aux", "dp2 ep2"),
    Row("global-aux", "dp4", full=True),
    Row("global-aux", "tp2", full=True),
    Row("global-aux", "pp2", full=True),
    Row("starved", "dp2 ep2"),
    Row("starved", "tp2", full=True),
    Row("before-use", "dp2 ep2"),
    Row("before-use", "tp2"),
    Row("before-use", "pp2 vpp", full=True),
    Row("before-use", "tp2 etp1", full=True),
    Row("before-use", "dp2", full=True),
    Row("paper", "dp2 ep2 allgather", full=True, micro_batches=1),
    Row("mtp", "dp2 ep2"),
    Row("mtp", "tp2", full=True),
    Row("mtp", "pp2", full=True),
    Row("deepseek", "dp2 ep2"),
    Row("deepseek", "tp2", full=True),
    Row("deepseek", "pp2", full=True),
    Row("sqrtsoftplus", "dp2 ep2", full=True),
    *(
        Row(model, layout, full=layout not in always)
        for model, always in ESTIMATORS.items()
        for layout in ("dp2 ep2", "tp2", "pp2 vpp", "dp2 ep2 allgather", "tp2 etp1 ep2")
    ),
    Row("dense", "pp2 tp2 dp2 ep2", full=True),
    Row("remoe", "pp2 tp2 dp2 ep2", full=True),
    Row("sparsemixer-v2", "pp2 tp2 dp2 ep2", full=True),
    Row("expert-group", "tp2 dp2 ep2", full=True),
    Row("k1", "dp4 ep4", full=True),
    Row("k1", "tp2 dp2 ep2"),
    Row("k1", "tp2 dp2 ep2 etp1", full=True),
    Row("k1", "pp2 dp2 ep2", full=True),
    Row("k2", "tp2 dp2 ep2 allgather", full=True),
    Row("before-use", "tp2 dp2 ep2", full=True),
    Row("before-use", "pp2 dp2 ep2", full=True),
    Row("global-aux", "pp2 tp2", full=True),
    Row("starved", "dp4 ep4", full=True),
    Row("k2", "pp2 tp2 dp2 ep2", full=True),
    Row("before-use", "pp2 tp2 dp2 ep2", full=True),
]


def model_flags(model: str) -> list[str]:
    return [*TINY, "--num-layers", "4", *MODELS[model].split()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """Every row that is asked for, and the one-rank references they need."""
    out = tmp_path_factory.mktemp("parity")
    items = [item for item in request.session.items if item.path == request.path]
    rows = {item.callspec.params["row"] for item in items if hasattr(item, "callspec")}
    references = {(row.model, row.micro_batches) for row in rows}
    cases: dict[str, dict[str, Any]] = {}
    for model in sorted({model for model, _ in references}):
        save = ["--save", str(out / f"start-{model}"), "--train-iters", "2", "--save-interval", "2"]
        cases[f"start-{model}"] = {"argv": [*model_flags(model), *save]}
    for model, count in sorted(references):
        argv = [*model_flags(model), *start(out, model), "--micro-batch-size", str(8 // count)]
        cases[f"{model}-m{count}"] = {"argv": argv}
    found = record(out, 1, cases, timeout=300 + 40 * len(cases))
    for ranks in sorted({row.ranks for row in rows}):
        listed = {
            row.name: {"argv": [*model_flags(row.model), *start(out, row.model), *row.flags]}
            for row in rows
            if row.ranks == ranks
        }
        found |= record(out, ranks, listed, timeout=300 + 30 * ranks * len(listed))
    return found


def start(out: pathlib.Path, model: str) -> list[str]:
    """Begin at the common weights and vectors, with a new optimizer."""
    return [
        *("--load", str(out / f"start-{model}"), "--finetune"),
        *("--no-load-optim", "--no-load-rng"),
    ]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name, marks=[pytest.mark.full] if r.full else []) for r in ROWS]
)
def test_a_layout_changes_nothing(runs: Any, row: Row) -> None:
    reference = steps_of(runs[f"{row.model}-m{row.micro_batches}"])
    steps = steps_of(runs[row.name])
    assert len(steps) == len(reference) == 8
    for number, (step, same) in enumerate(zip(steps, reference, strict=True), start=1):
        assert step["loss"] == pytest.approx(same["loss"], rel=TOLERANCE), f"step {number}"
        assert step["layers"].keys() == same["layers"].keys()
        for layer, values in same["layers"].items():
            mine = step["layers"][layer]
            assert mine["state"].keys() == values["state"].keys()
            pairs = {"router_grad": (mine["router_grad"], values["router_grad"])}
            pairs |= {name: (mine["state"][name], state) for name, state in values["state"].items()}
            for what, (own, same_there) in pairs.items():
                if not same_there.is_floating_point():
                    assert torch.equal(own, same_there), f"step {number}, layer {layer}: {what}"
                    continue
                error = relative(own, same_there)
                assert error < TOLERANCE, f"step {number}, layer {layer}: {what} {error:.1e}"


@pytest.mark.parametrize("row", [Row("starved", "dp2 ep2")], ids=["starved"])
def test_an_expert_without_tokens_keeps_its_vector(runs: Any, row: Row) -> None:
    steps = steps_of(runs[row.name])
    idle = 0
    for before, after in itertools.pairwise(steps):
        for layer, values in after["layers"].items():
            unused = values["updates"] == before["layers"][layer]["updates"]
            idle += int(unused.sum())
            same = values["vectors"] == before["layers"][layer]["vectors"]
            assert same[unused].all()
    assert idle > 8, "every expert got tokens all the time"


@pytest.mark.parametrize("row", [Row("k1", "dp2 ep2", micro_batches=4)], ids=["k1"])
def test_the_split_into_micro_batches_changes_nothing(runs: Any, row: Row) -> None:
    whole, split = steps_of(runs["k1-m1"]), steps_of(runs[row.name])
    for one, other in zip(whole, split, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        for layer, values in one["layers"].items():
            assert relative(other["layers"][layer]["vectors"], values["vectors"]) < TOLERANCE
