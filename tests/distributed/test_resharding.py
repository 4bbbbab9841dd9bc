"""A checkpoint saved in one layout and resumed in another.

Contract: the vectors that the resumed run starts with are the saved ones to the bit, and its losses
those of the uninterrupted run; saved by all ranks in parallel or not, in the background or not,
with either optimizer. What cannot be loaded is one sentence and a non-zero exit code, and not a
byte of the checkpoint directory changes.
"""

import hashlib
import pathlib
import shutil
from typing import Any

import pytest
import torch
from launching import TINY, record, steps_of, torchrun

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]

LAYOUTS = {
    "ep2": "--expert-model-parallel-size 2",
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "vpp": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "one": "",
}
OPTIONS = {
    "": "",
    "serial": "--no-ckpt-fully-parallel-save",
    "async": "--async-save --use-persistent-ckpt-worker --async-strategy mcore",
    "distributed": "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
}
RESUMED = [
    ("ep2", "", "tp2"),
    ("pp2", "", "ep2"),
    ("vpp", "", "pp2"),
    ("ep2", "", "one"),
    ("ep2", "serial", "tp2"),
    ("ep2", "async", "tp2"),
    ("ep2", "distributed", "tp2"),
    ("ep2", "distributed", "one"),
    ("vpp", "distributed", "ep2"),
]
HALF_WAY = 4


def flags(layout: str, option: str = "") -> list[str]:
    model = [*TINY, "--num-layers", "4", "--moe-router-topk", "2"]
    return [*model, *LAYOUTS[layout].split(), *OPTIONS[option].split()]


def name_of(saved: str, option: str, resumed: str = "") -> str:
    return "-".join(part for part in (saved, option, resumed) if part)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("resharding")


@pytest.fixture(scope="module")
def runs(out: pathlib.Path) -> dict[str, Any]:
    """Every save and every resumed run: one launch of two ranks, one of a single rank."""
    # Pipeline stages draw their first weights from seeds of their own: each has its own reference.
    cases = {f"whole-{saved}": flags(saved) for saved in dict.fromkeys(row[0] for row in RESUMED)}
    for saved, option in dict.fromkeys((saved, option) for saved, option, _ in RESUMED):
        folder = str(out / "saved" / name_of(saved, option))
        save = ["--save", folder, "--save-interval", "2", "--exit-interval", str(HALF_WAY)]
        cases[name_of(saved, option)] = [*flags(saved, option), *save]
    resumed = {
        name_of(saved, option, layout): [
            *flags(layout, "" if option in ("serial", "async") else option),
            *("--load", str(out / "saved" / name_of(saved, option))),
        ]
        for saved, option, layout in RESUMED
    }
    alone = {name: argv for name, argv in resumed.items() if name.endswith("one")}
    both = cases | {name: argv for name, argv in resumed.items() if name not in alone}
    found = record(out, 2, {name: {"argv": argv} for name, argv in both.items()})
    return found | record(out, 1, {name: {"argv": argv} for name, argv in alone.items()})


@pytest.mark.parametrize(
    ("saved", "option", "layout"), RESUMED, ids=[name_of(*row) for row in RESUMED]
)
def test_the_run_goes_on_in_another_layout(
    runs: dict[str, Any], saved: str, option: str, layout: str
) -> None:
    ranks = runs[name_of(saved, option, layout)]
    assert {rank["status"] for rank in ranks} == {"ok"}
    steps, last = steps_of(ranks), steps_of(runs[name_of(saved, option)])[-1]
    whole = steps_of(runs[f"whole-{saved}"])[HALF_WAY:]
    assert steps[0]["layers"].keys() == last["layers"].keys()
    for number, layer in steps[0]["layers"].items():
        assert torch.equal(layer["before"], last["layers"][number]["vectors"])
        assert layer["before"].any()
    losses = [step["loss"] for step in steps]
    assert losses == pytest.approx([step["loss"] for step in whole], rel=1e-5)
    for step, same in zip(steps, whole, strict=True):
        for number, layer in step["layers"].items():
            expected = same["layers"][number]["vectors"]
            assert (layer["vectors"] - expected).norm() < 1e-5 * expected.norm()
            assert torch.equal(layer["updates"], same["layers"][number]["updates"])


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(folder: pathlib.Path, *extra: str) -> tuple[int, str]:
    """Resume from, and save to, this directory with two ranks; return the code and our line."""
    before = contents(folder)
    argv = [
        *flags("ep2"),
        "--load",
        str(folder),
        "--save",
        str(folder),
        "--save-interval",
        "2",
        *extra,
    ]
    done = torchrun(2, ["-m", "megatron_default_moe.pretrain", *argv], timeout=300)
    assert contents(folder) == before, "the directory changed"
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert lines, done.stdout[-4000:]
    assert "[rank" not in done.stdout, "a traceback of a rank (torchrun prints its own)"
    return done.returncode, lines[0]


@pytest.fixture
def saved(runs: dict[str, Any], out: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a checkpoint directory with steps 2 and 4."""
    assert runs["ep2"]
    return pathlib.Path(shutil.copytree(out / "saved" / "ep2", tmp_path / "saved"))


def test_a_truncated_file_is_refused_and_the_step_before_offered(saved: pathlib.Path) -> None:
    shard = saved / "iter_0000004" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    code, line = refused(saved)
    assert code != 0
    assert f"the file {shard} is truncated" in line
    assert line.endswith("add --ckpt-step 2")


@pytest.mark.full
def test_a_missing_shard_is_refused(saved: pathlib.Path) -> None:
    shard = saved / "iter_0000004" / "__1_0.distcp"
    shard.unlink()
    code, line = refused(saved)
    assert code != 0
    assert f"the file {shard} is missing" in line


def test_damage_that_only_reading_finds_is_one_line_a_rank(saved: pathlib.Path) -> None:
    shard = saved / "iter_0000004" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[1000:-1000] = bytes(len(data) - 2000)
    shard.write_bytes(data)
    code, line = refused(saved)
    assert code != 0
    assert "a checkpoint could not be read or written" in line


@pytest.mark.full
def test_the_distributed_optimizer_says_which_format_can_change_its_layout(
    runs: dict[str, Any], out: pathlib.Path
) -> None:
    argv = [*flags("ep2"), "--use-distributed-optimizer", "--train-iters", "2"]
    folder = str(out / "dp-reshardable")
    record(out, 2, {"dp": {"argv": [*argv, "--save", folder, "--save-interval", "2"]}})
    moved = [*flags("tp2"), "--use-distributed-optimizer"]
    done = torchrun(2, ["-m", "megatron_default_moe.pretrain", *moved, "--load", folder], 300)
    line = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert "--dist-ckpt-optim-fully-reshardable" in line
    done = torchrun(
        2, ["-m", "megatron_default_moe.pretrain", *flags("ep2"), "--load", folder], 300
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert "was saved with --use-distributed-optimizer: add it" in line


@pytest.mark.full
@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        (["--num-experts", "8"], "--num-experts is 8"),
        (["--hidden-size", "64"], "--hidden-size is 64"),
        (["--train-iters", "9"], "--train-iters makes lr_decay_steps of the schedule 72"),
    ],
)
def test_another_model_is_refused(saved: pathlib.Path, changed: list[str], flag: str) -> None:
    code, line = refused(saved, *changed)
    assert code != 0
    assert line.startswith(f"error: {flag}, but the checkpoint ")


def test_the_offered_step_loads(saved: pathlib.Path) -> None:
    (saved / "iter_0000004" / "__1_0.distcp").unlink()
    argv = [*flags("ep2"), "--load", str(saved), "--ckpt-step", "2", "--exit-interval", "3"]
    done = torchrun(2, ["-m", "megatron_default_moe.pretrain", *argv], timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "iteration        3/       8" in done.stdout
