"""What is checked of a checkpoint before Megatron loads it, on real torch_dist folders.

Contract: the checkpoint that is looked at is the one Megatron will load; one without default
vectors is refused by a sentence that names the way out, or accepted with one warning if the user
said so; a damaged one, and one of another model, is refused with what can be loaded instead.
"""

import argparse
import dataclasses
import logging
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch

from megatron_default_moe import RouterGradientConfig, UserError
from megatron_default_moe.checkpoint import checks, on_disk, states
from megatron_default_moe.cpu import runtime
from megatron_default_moe.options import config

PLAIN = ("decoder.layers.mlp.router.weight", "decoder.layers.mlp.experts.linear_fc1.weight")
ROUTER = "decoder.layers.mlp.router"
VECTORS = f"{ROUTER}.default_vectors"
WITH_VECTORS = (*PLAIN, VECTORS, f"{ROUTER}.default_vector_updates")

Arguments = Callable[..., argparse.Namespace]


@pytest.fixture(scope="module")
def arguments() -> Arguments:
    """Return a function: Megatron's own arguments for this command line."""
    runtime.install()
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return lambda *argv: parser.parse_args([str(word) for word in argv])


def save(
    directory: pathlib.Path, names: Iterable[str], iteration: int | str = 7, latest: bool = True
) -> pathlib.Path:
    """Write a real torch_dist checkpoint with these tensors, and name it the latest."""
    from torch.distributed import checkpoint as torch_checkpoint

    folder = directory / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")
    folder.mkdir(parents=True)
    state = {name: torch.ones(2, 3) for name in names}
    torch_checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    # Megatron's own part: the format, and the arguments of the run (none here).
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    if latest:
        (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    names = (checks.__name__, states.__name__)
    records = [record for record in caplog.records if record.name in names]
    assert all(record.levelno == logging.WARNING for record in records)
    return [record.getMessage() for record in records]


def untouched(
    args: argparse.Namespace, options: RouterGradientConfig, caplog: pytest.LogCaptureFixture
) -> bool:
    """Whether prepare_load neither raises, nor warns, nor changes an argument.

    What it returns expects no baseline: none will be loaded.
    """
    before = dict(vars(args))
    returned = checks.prepare_load(args, options)
    expected = dataclasses.replace(options, from_baseline=False)
    assert dataclasses.replace(returned, from_baseline=False) == expected
    assert not returned.from_baseline or not options.uses_default_vectors
    return vars(args) == before and not warnings(caplog)


# Which checkpoint


@pytest.mark.parametrize("content", ["1200", "1200\n", " 1200 "])
def test_latest_follows_the_tracker(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    assert on_disk.folder_of(tmp_path) == tmp_path / "iter_0001200"
    assert on_disk.folder_of(str(tmp_path)) == tmp_path / "iter_0001200"


def test_latest_of_a_release(tmp_path: pathlib.Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert on_disk.folder_of(tmp_path) == tmp_path / "release"


def test_latest_is_where_megatron_looks(tmp_path: pathlib.Path) -> None:
    runtime.install()
    from megatron.training.checkpointing import (
        get_checkpoint_name,
        get_checkpoint_tracker_filename,
    )

    for iteration in (7, 12345678):
        tracker = pathlib.Path(get_checkpoint_tracker_filename(str(tmp_path)))
        tracker.write_text(str(iteration))
        folder = get_checkpoint_name(str(tmp_path), iteration, release=False, return_base_dir=True)
        assert on_disk.folder_of(tmp_path) == pathlib.Path(folder)


def test_no_tracker_no_checkpoint(tmp_path: pathlib.Path) -> None:
    assert on_disk.folder_of(tmp_path) is None
    assert on_disk.folder_of(tmp_path / "absent") is None
    save(tmp_path, PLAIN, latest=False)  # not complete before the tracker says so
    assert on_disk.folder_of(tmp_path) is None


def test_a_broken_tracker_is_the_users_to_mend(tmp_path: pathlib.Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt"):
        on_disk.folder_of(tmp_path)


def test_keys_of_a_torch_dist_checkpoint(tmp_path: pathlib.Path) -> None:
    assert on_disk.keys(save(tmp_path, WITH_VECTORS)) == set(WITH_VECTORS)


def test_keys_of_other_formats_are_unknown(tmp_path: pathlib.Path) -> None:
    assert on_disk.keys(tmp_path) is None
    assert on_disk.keys(tmp_path / "absent") is None
    (tmp_path / "mp_rank_00").mkdir()
    assert on_disk.keys(tmp_path) is None


# What is done about it


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
@pytest.mark.parametrize("iteration", [7, "release"])
def test_a_checkpoint_without_vectors_is_refused_by_name(
    arguments: Arguments, tmp_path: pathlib.Path, flag: str, iteration: int | str
) -> None:
    folder = save(tmp_path, PLAIN, iteration)
    args = arguments(flag, tmp_path)
    with pytest.raises(UserError) as refusal:
        checks.prepare_load(args, RouterGradientConfig())
    message = str(refusal.value)
    assert "--default-vector-from-baseline" in message
    assert "--moe-router-gradient topk" in message
    assert str(folder) in message
    assert message.startswith(f"{flag} {tmp_path}: ")
    assert "\n" not in message


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
@pytest.mark.parametrize("init", ["zeros", "gaussian"])
def test_the_option_accepts_it_with_one_warning(
    arguments: Arguments,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    flag: str,
    init: str,
) -> None:
    folder = save(tmp_path, PLAIN)
    args = arguments(flag, tmp_path)
    before = dict(vars(args))
    options = RouterGradientConfig(from_baseline=True, init=init)
    absent = ("default_vectors", "default_vector_updates", "default_vector_steps")
    assert checks.prepare_load(args, options) == dataclasses.replace(
        options, fade_in=config.FADE_IN, absent=absent
    )
    assert vars(args) == before, "the strictness is the user's"
    (warning,) = warnings(caplog)
    assert str(folder) in warning
    assert init in warning


@pytest.mark.parametrize("from_baseline", [False, True])
def test_a_checkpoint_with_vectors_is_left_alone(
    arguments: Arguments,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    from_baseline: bool,
) -> None:
    save(tmp_path, WITH_VECTORS)
    options = RouterGradientConfig(from_baseline=from_baseline)
    assert untouched(arguments("--load", tmp_path), options, caplog)


def test_other_names_are_not_taken_for_vectors(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    save(tmp_path, (*PLAIN, f"{VECTORS}_of_another_kind", "default_vectors"))
    with pytest.raises(UserError, match="--default-vector-from-baseline"):
        checks.prepare_load(arguments("--load", tmp_path), RouterGradientConfig())


@pytest.mark.parametrize("from_baseline", [False, True])
def test_topk_loads_a_plain_checkpoint(
    arguments: Arguments,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    from_baseline: bool,
) -> None:
    save(tmp_path, PLAIN)
    options = RouterGradientConfig(gradient="topk", from_baseline=from_baseline)
    assert untouched(arguments("--load", tmp_path), options, caplog)


def test_topk_says_that_it_leaves_out_the_vectors(
    arguments: Arguments, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, WITH_VECTORS)
    options = RouterGradientConfig(gradient="topk")
    assert checks.prepare_load(arguments("--load", tmp_path), options) == options
    (warning,) = warnings(caplog)
    assert str(folder) in warning


@pytest.mark.parametrize("from_baseline", [False, True])
def test_a_new_run_is_left_alone(
    arguments: Arguments,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    from_baseline: bool,
) -> None:
    options = RouterGradientConfig(from_baseline=from_baseline)
    assert untouched(arguments(), options, caplog)
    for name in (tmp_path, tmp_path / "absent"):
        assert untouched(arguments("--load", name, "--save", name), options, caplog)


@pytest.mark.parametrize(
    "flags", [(), ("--save", "elsewhere"), ("--finetune",), ("--skip-train",), ("both",)]
)
def test_a_name_without_a_checkpoint_is_refused(
    arguments: Arguments, tmp_path: pathlib.Path, flags: tuple[str, ...]
) -> None:
    typo = tmp_path / "typo"
    if flags == ("both",):
        flags = ("--finetune", "--save", str(typo))
    with pytest.raises(UserError, match=f"^--load {typo} holds no checkpoint .*: name the folder"):
        checks.prepare_load(arguments("--load", typo, *flags), RouterGradientConfig())
    given = arguments("--load", tmp_path / "run", "--pretrained-checkpoint", typo)
    with pytest.raises(UserError, match=f"^--pretrained-checkpoint {typo} holds no checkpoint"):
        checks.prepare_load(given, RouterGradientConfig())


def test_a_name_without_a_checkpoint_is_corrected_where_one_is_near(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    folder = save(tmp_path, WITH_VECTORS, latest=False)
    with pytest.raises(UserError, match=f"name the folder above, {tmp_path}$"):
        checks.prepare_load(arguments("--load", folder), RouterGradientConfig())
    with pytest.raises(UserError, match=r"add --ckpt-step 7"):
        checks.prepare_load(arguments("--load", tmp_path), RouterGradientConfig())


def test_an_unknown_format_is_left_to_megatron(
    arguments: Arguments, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert untouched(arguments("--load", tmp_path), RouterGradientConfig(), caplog)


STEPS = "decoder.layers.mlp.router.default_vector_steps"


def fading(tmp_path: pathlib.Path, names: Iterable[str], saved: int | None = None) -> pathlib.Path:
    """Write a checkpoint of a run with this fade-in, none if it had none."""
    folder = save(tmp_path, names)
    fade_in = {} if saved is None else {"default_vector_fade_in": saved}
    torch.save({"args": argparse.Namespace(**fade_in)}, folder / "common.pt")
    return tmp_path


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("names", "saved", "flag", "expected"),
    [
        (WITH_VECTORS, None, None, 0),
        ((*WITH_VECTORS, STEPS), 30, None, 30),
        ((*WITH_VECTORS, STEPS), 30, 0, 0),
        ((*WITH_VECTORS, STEPS), 30, 50, 50),
        (PLAIN, None, None, config.FADE_IN),
        (PLAIN, None, 0, 0),
        (PLAIN, None, 50, 50),
    ],
)
def test_the_fade_in_is_the_flags_or_the_checkpoints_or_gentle(
    arguments: Arguments,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rank: str,
    names: Iterable[str],
    saved: int | None,
    flag: int | None,
    expected: int,
) -> None:
    monkeypatch.setenv("RANK", rank)
    args = arguments("--load", fading(tmp_path, names, saved))
    args.default_vector_fade_in = flag
    options = RouterGradientConfig(from_baseline=True, fade_in=flag or 0)
    found = checks.prepare_load(args, options)
    assert found.fade_in == expected
    assert (checks.STEPS in found.absent) == (names is PLAIN and expected > 0)
    said = [line for line in warnings(caplog) if f" over {expected} steps" in line]
    assert bool(said) == (names is PLAIN and expected > 0 and rank == "0")


def test_a_fade_in_begins_with_a_checkpoint_that_counts_none(
    arguments: Arguments, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments("--load", fading(tmp_path, WITH_VECTORS))
    args.default_vector_fade_in = 30
    found = checks.prepare_load(args, RouterGradientConfig(fade_in=30))
    assert (found.fade_in, found.absent) == (30, (checks.STEPS,))
    (warning,) = warnings(caplog)
    assert "counts no steps of a fade-in" in warning


def test_a_fade_in_of_unknown_length_is_asked_for(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    args = arguments("--load", fading(tmp_path, (*WITH_VECTORS, STEPS)))
    with pytest.raises(UserError, match="give --default-vector-fade-in"):
        checks.prepare_load(args, RouterGradientConfig())


# Megatron takes --pretrained-checkpoint only where --load has nothing yet


def test_a_run_started_from_a_baseline_resumes_from_its_own_checkpoint(
    arguments: Arguments, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "baseline", PLAIN)
    save(tmp_path / "run", WITH_VECTORS)
    args = arguments("--load", tmp_path / "run", "--pretrained-checkpoint", tmp_path / "baseline")
    for from_baseline in (True, False):
        options = RouterGradientConfig(from_baseline=from_baseline)
        assert untouched(args, options, caplog)


def test_a_baseline_is_looked_at_while_the_run_has_no_checkpoint(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    folder = save(tmp_path / "baseline", PLAIN)
    args = arguments("--load", tmp_path / "run", "--pretrained-checkpoint", tmp_path / "baseline")
    with pytest.raises(UserError, match=re.escape(str(folder))):
        checks.prepare_load(args, RouterGradientConfig())


# --ckpt-step chooses another iteration than the latest


def test_the_iteration_that_ckpt_step_chooses_is_looked_at(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    plain = save(tmp_path, PLAIN, 3)
    save(tmp_path, WITH_VECTORS, 7)
    args = arguments("--load", tmp_path, "--ckpt-step", 3)
    with pytest.raises(UserError, match=re.escape(str(plain))):
        checks.prepare_load(args, RouterGradientConfig())


def test_the_latest_is_not_looked_at_where_ckpt_step_chooses_another(
    arguments: Arguments, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, WITH_VECTORS, 3)
    save(tmp_path, PLAIN, 7)
    args = arguments("--load", tmp_path, "--ckpt-step", 3)
    assert untouched(args, RouterGradientConfig(), caplog)


# Damage, and another model


def damaged(tmp_path: pathlib.Path, arguments: Arguments) -> str:
    """The sentence about the checkpoint of step 7, beside a whole one of step 3."""
    with pytest.raises(UserError) as refusal:
        checks.prepare_load(arguments("--load", tmp_path), RouterGradientConfig())
    message = str(refusal.value)
    assert message.startswith(f"--load {tmp_path}: ")
    assert "\n" not in message
    assert message.endswith("add --ckpt-step 3")
    return message


@pytest.fixture
def two(tmp_path: pathlib.Path) -> pathlib.Path:
    """The folder of the latest checkpoint, of step 7, beside one of step 3."""
    save(tmp_path, WITH_VECTORS, 3)
    return save(tmp_path, WITH_VECTORS, 7)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp"])
def test_a_missing_file_is_named(
    arguments: Arguments, tmp_path: pathlib.Path, two: pathlib.Path, name: str
) -> None:
    (two / name).unlink()
    assert f"the file {two / name} is missing" in damaged(tmp_path, arguments)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_truncated_file_is_named(
    arguments: Arguments, tmp_path: pathlib.Path, two: pathlib.Path, name: str, kept: float
) -> None:
    data = (two / name).read_bytes()
    (two / name).write_bytes(data[: int(len(data) * kept)])
    assert f"the file {two / name} is " in damaged(tmp_path, arguments)


def test_damaged_arguments_are_named(
    arguments: Arguments, tmp_path: pathlib.Path, two: pathlib.Path
) -> None:
    (two / "common.pt").write_bytes(b"no zip file")
    assert f"the arguments in {two} cannot be read" in damaged(tmp_path, arguments)


def test_a_missing_folder_is_named(
    arguments: Arguments, tmp_path: pathlib.Path, two: pathlib.Path
) -> None:
    two.rename(tmp_path / "elsewhere")
    assert f"the folder {two} is missing" in damaged(tmp_path, arguments)


def test_an_unfinished_checkpoint_is_not_offered(
    arguments: Arguments, tmp_path: pathlib.Path, two: pathlib.Path
) -> None:
    for step in (4, 5):
        save(tmp_path, WITH_VECTORS, step, latest=False)
    (tmp_path / "iter_0000005" / "metadata.json").unlink()
    (tmp_path / "iter_0000004" / "__0_0.distcp").write_bytes(b"")
    (two / "metadata.json").unlink()
    damaged(tmp_path, arguments)


def test_without_another_checkpoint_none_is_offered(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    (save(tmp_path, WITH_VECTORS) / ".metadata").unlink()
    with pytest.raises(UserError, match="no other complete checkpoint"):
        checks.prepare_load(arguments("--load", tmp_path), RouterGradientConfig())


def test_other_ranks_leave_the_files_to_rank_0(
    arguments: Arguments, two: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (two / "__0_0.distcp").unlink()
    monkeypatch.setenv("RANK", "1")
    options = RouterGradientConfig()
    assert checks.prepare_load(arguments("--load", two.parent), options) == options


@pytest.mark.parametrize(
    ("flag", "name"), [("--num-experts", "num_experts"), ("--hidden-size", "hidden_size")]
)
def test_another_model_is_refused_by_flag(
    arguments: Arguments, tmp_path: pathlib.Path, flag: str, name: str
) -> None:
    folder = save(tmp_path, WITH_VECTORS)
    flags = ["--load", tmp_path, "--num-experts", 8, "--hidden-size", 32]
    torch.save({"args": arguments(*flags)}, folder / "common.pt")
    args = arguments(*flags)
    checks.prepare_load(args, RouterGradientConfig())
    setattr(args, name, 16)
    with pytest.raises(UserError, match=f"^{flag} is 16, .* with (8|32): give that value"):
        checks.prepare_load(args, RouterGradientConfig())


# What Megatron loads is not refused

SIZES = ("--num-experts", 8, "--hidden-size", 32, "--lr", 1e-3, "--min-lr", 0)


def resumes(
    arguments: Arguments,
    tmp_path: pathlib.Path,
    saved: tuple[Any, ...],
    now: tuple[Any, ...],
    schedule: dict[str, Any] | None = None,
) -> str:
    """Save under some flags, load under others; return the refusal, or nothing."""
    folder = save(tmp_path, WITH_VECTORS)
    common: dict[str, Any] = {"args": arguments(*SIZES, *saved)}
    if schedule:
        common["opt_param_scheduler"] = schedule
    torch.save(common, folder / "common.pt")
    args = arguments(*SIZES, *now)
    args.load = args.load or (None if args.pretrained_checkpoint else str(tmp_path))
    args.start_weight_decay = args.end_weight_decay = 0.01  # as validate_args leaves them
    try:
        checks.prepare_load(args, RouterGradientConfig())
    except UserError as error:
        return str(error)
    return ""


def schedule_of(arguments: Arguments, *flags: Any) -> dict[str, Any]:
    """What Megatron's own scheduler saves under these flags."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import global_vars
    from megatron.training.training import get_optimizer_param_scheduler

    class NoOptimizer:
        param_groups: ClassVar[list[Any]] = []

    args = arguments(*SIZES, *flags)
    args.start_weight_decay = args.end_weight_decay = 0.01
    before, global_vars._GLOBAL_ARGS = global_vars._GLOBAL_ARGS, args
    try:
        scheduler = get_optimizer_param_scheduler(NoOptimizer())
    finally:
        global_vars._GLOBAL_ARGS = before
    assert isinstance(scheduler, OptimizerParamScheduler)
    return scheduler.state_dict()


ITERS = ("--train-iters", 100, "--global-batch-size", 8, "--lr-warmup-iters", 10)
SAMPLES = ("--train-samples", 800, "--global-batch-size", 8, "--lr-warmup-samples", 80)


@pytest.mark.parametrize("flags", [ITERS, SAMPLES, (*ITERS[:4], "--lr-warmup-fraction", 0.1)])
def test_the_same_schedule_resumes(
    arguments: Arguments, tmp_path: pathlib.Path, flags: tuple[Any, ...]
) -> None:
    assert not resumes(arguments, tmp_path, flags, flags, schedule_of(arguments, *flags))


def test_another_batch_size_is_the_same_schedule_in_samples(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    now = tuple(16 if word == 8 else word for word in SAMPLES)
    assert not resumes(arguments, tmp_path, SAMPLES, now, schedule_of(arguments, *SAMPLES))


@pytest.mark.parametrize(
    ("changed", "flag", "way"),
    [
        (("--train-iters", 200), "--train-iters", "--override-opt_param-scheduler"),
        (("--global-batch-size", 16), "--global-batch-size", "--override-opt_param-scheduler"),
        (
            ("--global-batch-size", 16, "--lr-warmup-iters", 4),
            "The warm-up",
            "--override-opt_param-scheduler",
        ),
        (("--lr-warmup-fraction", 0.3), "The warm-up", "--override-opt_param-scheduler"),
        (("--lr-warmup-iters", 20), "The warm-up", "--override-opt_param-scheduler"),
        (("--lr-decay-style", "cosine"), "--lr-decay-style", "--override-opt_param-scheduler"),
        (("--lr", 2e-3), "--lr", "--no-load-optim"),
    ],
)
def test_another_schedule_is_refused(
    arguments: Arguments, tmp_path: pathlib.Path, changed: tuple[Any, ...], flag: str, way: str
) -> None:
    saved = schedule_of(arguments, *ITERS)
    message = resumes(arguments, tmp_path, ITERS, (*ITERS, *changed), saved)
    assert message.startswith(f"{flag} ")
    assert way in message


def test_the_way_out_of_another_schedule_is_one(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    now = (*ITERS, "--train-iters", 200, "--override-opt_param-scheduler")
    assert not resumes(arguments, tmp_path, ITERS, now, schedule_of(arguments, *ITERS))


@pytest.mark.parametrize("how", ["--finetune", "--no-load-optim", "--skip-train", "pretrained"])
def test_weights_alone_have_no_schedule(
    arguments: Arguments, tmp_path: pathlib.Path, how: str
) -> None:
    flag = ("--pretrained-checkpoint", tmp_path) if how == "pretrained" else (how,)
    saved = schedule_of(arguments, *ITERS)
    now = (*ITERS, "--train-iters", 7, "--use-distributed-optimizer", *flag)
    assert not resumes(arguments, tmp_path, ITERS, now, saved)


def test_arguments_that_older_checkpoints_lack_are_not_compared(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    folder = save(tmp_path, WITH_VECTORS)
    torch.save({"args": argparse.Namespace(num_layers=None)}, folder / "common.pt")
    args = arguments("--load", tmp_path, *SIZES, "--use-distributed-optimizer")
    checks.prepare_load(args, RouterGradientConfig())


def test_other_formats_of_torch_name_no_format(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    folder = save(tmp_path, WITH_VECTORS)
    (folder / "metadata.json").unlink()
    (folder / "common.pt").unlink()
    args = arguments("--load", tmp_path, "--ckpt-format", "torch_dcp")
    checks.prepare_load(args, RouterGradientConfig(gradient="topk"))


def test_a_newer_checkpoint_that_does_not_persist_is_the_one(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    save(tmp_path, PLAIN, 3)
    save(tmp_path / "non_persistent", WITH_VECTORS, 7)
    args = arguments("--load", tmp_path, "--non-persistent-ckpt-type", "global")
    returned = checks.prepare_load(args, RouterGradientConfig(from_baseline=True))
    assert not returned.from_baseline, "the vectors would be lost"


def test_object_storage_is_taken_at_the_users_word_once(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    options = RouterGradientConfig(from_baseline=True)
    flags = ("--save", tmp_path / "run", "--load", tmp_path / "run")
    begin = arguments(*flags, "--pretrained-checkpoint", "msc://bucket/run")
    gently = dataclasses.replace(options, fade_in=config.FADE_IN)
    assert checks.prepare_load(begin, options) == gently
    save(tmp_path / "run", WITH_VECTORS)
    assert not checks.prepare_load(begin, options).from_baseline
    with pytest.raises(UserError, match=r"start them again at every restart: save into a folder"):
        checks.prepare_load(arguments("--load", "msc://bucket/run"), options)
    checks.prepare_load(arguments("--load", "msc://bucket/run"), RouterGradientConfig())


# --ckpt-format torch: files that name no format


def older(tmp_path: pathlib.Path, names: Iterable[str], saved: Any = None) -> pathlib.Path:
    """Write a checkpoint as Megatron's --ckpt-format torch does on two pipeline stages."""
    folder = tmp_path / "iter_0000007"
    for stage, part in enumerate(([], list(names))):
        (folder / f"mp_rank_00_{stage:03d}").mkdir(parents=True)
        state = {
            "args": saved or argparse.Namespace(num_experts=8, hidden_size=32),
            "iteration": 7,
            "model": {name: torch.ones(2, 3) for name in part},
            "optimizer": {"state": {0: torch.ones(6)}},
        }
        torch.save(state, folder / f"mp_rank_00_{stage:03d}" / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def test_the_older_format_is_looked_into(arguments: Arguments, tmp_path: pathlib.Path) -> None:
    folder = older(tmp_path, PLAIN)
    args = arguments("--load", tmp_path, *SIZES, "--ckpt-format", "torch")
    with pytest.raises(UserError, match=r"has no default vectors.*--default-vector-from-baseline"):
        checks.prepare_load(args, RouterGradientConfig())
    assert checks.prepare_load(args, RouterGradientConfig(from_baseline=True)).from_baseline
    args.hidden_size = 16
    with pytest.raises(UserError, match=r"^--hidden-size is 16, .* with 32: give that value"):
        checks.prepare_load(args, RouterGradientConfig(from_baseline=True))
    file = folder / "mp_rank_00_001" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"the file {file} is damaged"):
        checks.prepare_load(args, RouterGradientConfig(from_baseline=True))


def test_the_older_format_keeps_its_vectors_and_its_layout(
    arguments: Arguments, tmp_path: pathlib.Path
) -> None:
    older(tmp_path, WITH_VECTORS, arguments(*SIZES))
    args = arguments("--load", tmp_path, *SIZES, "--ckpt-format", "torch")
    options = RouterGradientConfig(from_baseline=True)
    assert not checks.prepare_load(args, options).from_baseline
    args.tensor_model_parallel_size = 2
    with pytest.raises(UserError, match=r"^--tensor-model-parallel-size is 2, .* in the layout"):
        checks.prepare_load(args, options)


# Before anything is saved


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(
    tmp_path: pathlib.Path, arguments: Arguments
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"^--save {file}/run: no checkpoint can be written there"):
        checks.prepare_save(arguments("--save", file / "run"))
    checks.prepare_save(arguments("--save", tmp_path / "new" / "run"))
    assert list((tmp_path / "new" / "run").iterdir()) == []
    checks.prepare_save(arguments())


def test_a_release_is_not_saved_over_with_an_interval_to_retain(
    tmp_path: pathlib.Path, arguments: Arguments
) -> None:
    flags = ("--save", tmp_path, "--save-retain-interval", 4)
    save(tmp_path, WITH_VECTORS, "release")
    with pytest.raises(UserError, match=r"^--save-retain-interval: .* says 'release'"):
        checks.prepare_save(arguments(*flags))
    checks.prepare_save(arguments(*flags[:2]))
    save(tmp_path, WITH_VECTORS, 7)
    checks.prepare_save(arguments(*flags))
