"""Real training steps on two gloo ranks, through the package's own entry.

Contract: the vectors after every step are the S/N of what the experts returned in it, computed
apart in float64; topk is a plain Megatron run to the last bit of every loss; recomputation changes
no bit; a skipped step leaves no trace; a resumed run continues with the identical losses and
vectors; a user's mistake is one sentence and exit code 2.
"""

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from launching import ROOT, TINY, record, steps_of, torchrun

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]

EP2 = [*TINY, "--expert-model-parallel-size", "2"]
TP2 = [*TINY, "--tensor-model-parallel-size", "2", "--sequence-parallel"]
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
BALANCE = ["--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff", "0.01"]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules", "moe"]
BEFORE_USE = ["--default-vector-order", "before-use"]
HALF_WAY = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every two-rank run of this file, in one launch."""
    out = tmp_path_factory.mktemp("runs")
    save = ["--save", str(out / "checkpoint"), "--save-interval", str(HALF_WAY)]
    compared = [*EP2, *BALANCE, "--train-iters", "20"]
    cases = {
        "ep2": EP2,
        "recomputed": [*EP2, *RECOMPUTE, "--recompute-num-layers", "1"],
        "recomputed-moe": [*EP2, *SELECTIVE],
        "before-use": [*EP2, *BEFORE_USE],
        "before-use-recomputed": [*EP2, *BEFORE_USE, *RECOMPUTE, "--recompute-num-layers", "1"],
        "before-use-recomputed-moe": [*EP2, *BEFORE_USE, *SELECTIVE],
        "uniform-k2": [*EP2, "--moe-router-topk", "2", "--default-vector-weighting", "uniform"],
        "capacity": [*EP2, "--moe-router-topk", "2", "--moe-expert-capacity-factor", "0.7"],
        "padded": [
            *(*EP2, "--moe-expert-capacity-factor", "1.3"),
            "--moe-pad-expert-input-to-capacity",
        ],
        "tp2": [*TP2, "--moe-token-dispatcher-type", "allgather"],
        "pp2": [
            *(*TINY, "--pipeline-model-parallel-size", "2", "--moe-per-layer-logging"),
            *("--tensorboard-dir", str(out / "tensorboard")),
        ],
        "fp16": [
            *EP2,
            "--fp16",
            "--initial-loss-scale",
            str(2**40),
            "--hysteresis",
            "1",
            "--train-iters",
            "30",
        ],
        "topk": [
            *(*compared, "--moe-router-gradient", "topk"),
            "--no-moe-global-aux-loss-exact",
        ],
        "stock": compared,
        "first-half": [*EP2, *save, "--exit-interval", str(HALF_WAY)],
        "second-half": [*EP2, "--load", str(out / "checkpoint")],
        "baseline": [
            *(*EP2, "--moe-router-gradient", "topk", "--train-iters", "2"),
            *("--save", str(out / "baseline"), "--save-interval", "2"),
        ],
        "from-baseline": [
            *(*EP2, "--load", str(out / "baseline"), "--finetune"),
            "--default-vector-from-baseline",
        ],
        "plain-loads-default": [
            *(*EP2, "--moe-router-gradient", "topk"),
            *("--load", str(out / "checkpoint"), "--finetune", "--no-load-optim"),
        ],
    }
    bf16 = [*EP2, "--bf16", "--use-distributed-optimizer"]
    save_bf16 = ["--save", str(out / "bf16"), "--save-interval", str(HALF_WAY)]
    cases |= {
        "bf16": bf16,
        "bf16-first-half": [*bf16, *save_bf16, "--exit-interval", str(HALF_WAY)],
        "bf16-second-half": [*bf16, "--load", str(out / "bf16")],
    }
    fading = [*EP2, "--default-vector-fade-in", "6"]
    save_fading = ["--save", str(out / "fading"), "--save-interval", str(HALF_WAY)]
    cases |= {
        "fading": fading,
        "fading-first-half": [*fading, *save_fading, "--exit-interval", str(HALF_WAY)],
        # The checkpoint knows.
        "fading-second-half": [*EP2, "--load", str(out / "fading")],
    }
    cases["evaluated"] = [
        *(*EP2, "--moe-router-gradient", "topk", "--split", "8,1,1", "--eval-iters", "1"),
        *("--eval-interval", "4", "--tensorboard-dir", str(out / "evaluated")),
    ]
    listed = {name: {"argv": argv, "stock": name == "stock"} for name, argv in cases.items()}
    folders = {"events": out / "tensorboard", "evaluations": out / "evaluated"}
    return {**record(out, 2, listed), **folders, "saved": out / "baseline"}


def losses(ranks: list[dict[str, Any]]) -> list[float]:
    assert {rank["status"] for rank in ranks} == {"ok"}, ranks[0]["status"]
    return [step["loss"] for step in steps_of(ranks)]


@pytest.mark.parametrize("name", ["ep2", "uniform-k2", "capacity", "padded", "tp2", "pp2"])
def test_the_vectors_are_the_mean_expert_outputs_of_each_step(
    runs: dict[str, Any], name: str
) -> None:
    steps = steps_of(runs[name])
    assert len(steps) == 8
    for step in steps:
        assert sorted(step["layers"]) == [1, 2]
        for layer in step["layers"].values():
            error = (layer["vectors"] - layer["expected"]).norm() / layer["expected"].norm()
            assert error < 1e-5


def test_all_ranks_hold_the_same_vectors_to_the_bit(runs: dict[str, Any]) -> None:
    for name in ("ep2", "tp2"):
        for first, second in zip(*(rank["steps"] for rank in runs[name]), strict=True):
            for number, layer in first["layers"].items():
                assert torch.equal(layer["vectors"], second["layers"][number]["vectors"])


def test_topk_is_stock_megatron_to_the_bit(runs: dict[str, Any]) -> None:
    stock = losses(runs["stock"])
    assert len(stock) == 20
    assert losses(runs["topk"]) == stock
    for ours, theirs in zip(steps_of(runs["topk"]), steps_of(runs["stock"]), strict=True):
        assert ours["grad_norm"] == theirs["grad_norm"]
        for number, layer in theirs["layers"].items():
            assert torch.equal(layer["router_weight"], ours["layers"][number]["router_weight"])


@pytest.mark.parametrize(
    ("recomputed", "plain"),
    [
        ("recomputed", "ep2"),
        ("recomputed-moe", "ep2"),
        ("before-use-recomputed", "before-use"),
        ("before-use-recomputed-moe", "before-use"),
    ],
)
def test_recomputation_changes_no_bit(runs: dict[str, Any], recomputed: str, plain: str) -> None:
    assert losses(runs[recomputed]) == losses(runs[plain])
    for one, other in zip(steps_of(runs[recomputed]), steps_of(runs[plain]), strict=True):
        for number, layer in one["layers"].items():
            assert torch.equal(layer["vectors"], other["layers"][number]["vectors"])
            assert torch.equal(layer["router_grad"], other["layers"][number]["router_grad"])


def test_a_skipped_step_leaves_no_trace_and_the_state_is_float32(runs: dict[str, Any]) -> None:
    steps = steps_of(runs["fp16"])
    skipped = [step["skipped"] for step in steps]
    assert skipped[0], "no step overflowed"
    assert not skipped[-1], "no step was taken"
    for number, step in enumerate(steps, start=1):
        taken = sum(not s for s in skipped[:number])
        for layer in step["layers"].values():
            assert layer["vectors"].dtype == torch.float32
            assert layer["updates"].max() == taken
            if not taken:
                assert (layer["vectors"] == 0).all()


def test_the_log_of_the_last_rank_holds_the_layers_of_every_stage(runs: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs["events"])).Reload()
    steps = steps_of(runs["pp2"])
    for layer in (0, 1):  # one layer a stage, and only the last stage writes
        logged = events.Scalars(f"moe/default-vector norm_layer_{layer}")
        assert [event.step for event in logged] == list(range(1, len(steps) + 1))
        for event, step in zip(logged, steps, strict=True):
            norm = step["layers"][layer + 1]["vectors"].norm(dim=-1).mean()
            assert event.value == pytest.approx(float(norm), rel=1e-5)
        loads = [events.Scalars(f"load/layer_{layer}/expert_{i}")[-1].value for i in range(4)]
        assert sum(loads) == pytest.approx(1)
    both = [events.Scalars(f"moe/router entropy_layer_{layer}")[-1].value for layer in (0, 1)]
    assert events.Scalars("router entropy")[-1].value == pytest.approx(sum(both) / 2)
    assert events.Scalars("consumed tokens")[-1].value == 8 * 8 * 32


@pytest.mark.parametrize(
    ("whole", "halves"),
    [("ep2", ""), ("bf16", "bf16-"), ("fading", "fading-")],
    ids=[
        "fp32",
        "bf16, distributed optimizer",
        "during a fade-in, whose length is not given again",
    ],
)
def test_a_resumed_run_continues_to_the_bit(runs: dict[str, Any], whole: str, halves: str) -> None:
    first, second = f"{halves}first-half", f"{halves}second-half"
    assert losses(runs[first]) == losses(runs[whole])[:HALF_WAY]
    assert losses(runs[second]) == losses(runs[whole])[HALF_WAY:]
    for name, part in ((first, slice(HALF_WAY)), (second, slice(HALF_WAY, None))):
        for step, same in zip(steps_of(runs[name]), steps_of(runs[whole])[part], strict=True):
            for number, layer in same["layers"].items():
                assert layer["vectors"].dtype == torch.float32
                assert torch.equal(layer["vectors"], step["layers"][number]["vectors"])
                assert torch.equal(layer["updates"], step["layers"][number]["updates"])


def test_a_fade_in_changes_the_loss_from_its_second_step_on(runs: dict[str, Any]) -> None:
    """Both begin with vectors of zero; then one has all of the term, the other a sixth."""
    whole, fading = losses(runs["ep2"]), losses(runs["fading"])
    assert whole[0] == fading[0]
    assert whole[1] != fading[1]


def test_every_evaluation_has_its_own_name_and_topk_no_metrics_of_vectors(
    runs: dict[str, Any],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs["evaluations"])).Reload()
    steps = {
        tag: [event.step for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "validation" in tag or "test" in tag or "default-vector" in tag
    }
    ours = {tag: found for tag, found in steps.items() if not tag.endswith("vs samples")}
    after = "lm loss validation after training"
    assert ours == {"lm loss validation": [4, 8], after: [8], "lm loss test": [8]}
    values = [events.Scalars(tag)[-1].value for tag in ours]
    assert len({*values}) == 3


def test_a_plain_checkpoint_needs_the_flag_that_says_so(runs: dict[str, Any]) -> None:
    flags = [*EP2, "--load", str(runs["saved"]), "--finetune"]
    refused = torchrun(2, ["-m", "megatron_default_moe.pretrain", *flags], timeout=300)
    assert refused.returncode != 0
    (line,) = (line for line in refused.stdout.splitlines() if line.startswith("error: "))
    assert "--default-vector-from-baseline" in line
    assert len(losses(runs["from-baseline"])) == 8
    baseline, started = steps_of(runs["baseline"])[-1], steps_of(runs["from-baseline"])[0]
    assert started["loss"] < baseline["loss"], "the weights were not loaded"


def test_a_plain_model_loads_a_default_moe_checkpoint(runs: dict[str, Any]) -> None:
    assert losses(runs["plain-loads-default"])[0] < losses(runs["ep2"])[0]


def test_a_mistake_is_one_sentence_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_default_moe.pretrain", *EP2, "--num-expert", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: --num-expert is not a flag; did you mean --num-experts?"]
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_ends_in_a_sentence_without_save(tmp_path: pathlib.Path) -> None:
    """Megatron saves a checkpoint first, and fails in that."""
    diverging = [*TINY, "--lr", "1e30", "--lr-decay-style", "constant", "--clip-grad", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_default_moe.pretrain", *diverging],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 17, "as Megatron ends when it does not save"
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "without --save" in said
    assert "Traceback" not in done.stderr + done.stdout


def test_the_entry_trains_from_a_yaml_file(tmp_path: pathlib.Path) -> None:
    lines, flags = [], iter(EP2)
    values: dict[str, list[str]] = {}
    for item in flags:
        if item.startswith("--"):
            values[item] = current = []
        else:
            current.append(item)
    for flag, given in values.items():
        lines.append(f"{flag[2:]}: {given[0] if given else 'true'}")
    config = tmp_path / "tiny.yaml"
    config.write_text("\n".join(lines))
    done = torchrun(
        2,
        ["-m", "megatron_default_moe.pretrain", "--config", str(config), "--train-iters", "3"],
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "iteration        3/       3" in done.stdout
    assert "iteration        4/" not in done.stdout
    for shown in ("consumed tokens: 768", "ETA: ", "default-vector norm: ", "load max/mean: "):
        assert shown in done.stdout
