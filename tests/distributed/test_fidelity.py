"""The fidelity of the router's gradient in every layout, through Megatron's own loop.

Contract: what is logged of a layer is the same in EP 2, TP 2 and interleaved PP 2 as on one rank;
losses, router gradients and state are the same bits with and without the flag; dense reads 1.
"""

import pathlib

import pytest
import torch
from launching import TINY, record, steps_of

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]

MODELS = {
    "topk": "--moe-router-gradient topk --moe-router-topk 2",
    "default": "--moe-router-topk 2",
    "dense": "--moe-router-gradient dense --moe-router-topk 2",
    "linear": "--moe-router-gradient default-linear --default-linear-rank 5",
    "sparsemixer": "--moe-router-gradient sparsemixer --sparsemixer-mask-width 0.9",
}
LAYOUTS = {
    "ep2": "--expert-model-parallel-size 2",
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 4",
    "pp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    " --micro-batch-size 4",
}
BASE = [*TINY, "--num-layers", "4", "--train-iters", "3"]
ON = ["--log-router-gradient-fidelity", "1"]


def test_every_layout_logs_the_same_and_a_probe_changes_nothing(tmp_path: pathlib.Path) -> None:
    argv = {name: [*BASE, *flags.split()] for name, flags in MODELS.items()}
    # The weights that a run starts with depend on its layout: all begin at the same checkpoint.
    start = {name: str(tmp_path / f"start-{name}") for name in MODELS}
    load = {
        name: ["--load", folder, "--finetune", "--no-load-optim", "--no-load-rng"]
        for name, folder in start.items()
    }
    one = {
        f"start-{name}": {
            "argv": [*flags, "--train-iters", "1", "--save", start[name], "--save-interval", "1"]
        }
        for name, flags in argv.items()
    }
    one |= {
        name: {"argv": [*flags, *load[name], "--micro-batch-size", "4", *ON]}
        for name, flags in argv.items()
    }
    alone = record(tmp_path, 1, one)
    rows = [(name, layout, True) for name in ("default", "linear") for layout in LAYOUTS]
    rows += [(name, "ep2", True) for name in ("topk", "dense", "sparsemixer")]
    rows += [(name, "ep2", False) for name in MODELS]
    two = {
        f"{name}-{layout}{'' if on else '-off'}": {
            "argv": [*argv[name], *load[name], *LAYOUTS[layout].split(), *(ON if on else [])]
        }
        for name, layout, on in rows
    }
    found = record(tmp_path, 2, two)
    for case in two:
        name = case.split("-")[0]
        for step, same in zip(steps_of(found[case]), steps_of(alone[name]), strict=True):
            for number, layer in step["layers"].items():
                if case.endswith("off"):
                    assert layer["fidelity"] is None
                    continue
                expected = same["layers"][number]["fidelity"]
                assert layer["fidelity"] == pytest.approx(expected, rel=1e-5, abs=1e-5), case
                if name == "dense":
                    assert expected == pytest.approx(torch.ones(2), abs=1e-5)
    for name in MODELS:
        on, off = (steps_of(found[f"{name}-ep2{end}"]) for end in ("", "-off"))
        for step, same in zip(on, off, strict=True):
            assert step["loss"] == same["loss"]
            for number, layer in step["layers"].items():
                other = same["layers"][number]
                assert torch.equal(layer["router_grad"], other["router_grad"])
                assert torch.equal(layer["router_weight"], other["router_weight"])
                for key, value in layer["state"].items():
                    assert torch.equal(value, other["state"][key])
