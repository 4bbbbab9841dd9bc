"""Several runs in one picture: ``default-moe report RUN RUN``."""

import pathlib

import pytest

from megatron_default_moe.report import overlay
from megatron_default_moe.report.command import main
from megatron_default_moe.report.scalars import Scalars


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    """Two runs' folders with events, one of them of the events alone."""
    from torch.utils.tensorboard import SummaryWriter

    folders = []
    for number, name in enumerate(("first/tensorboard", "second/events")):
        writer = SummaryWriter(str(tmp_path / name))
        for step in (1, 2, 3):
            writer.add_scalar("lm loss", 5 - step / 2 + number, step)
            writer.add_scalar("iteration-time", 0.5, step)
            writer.add_scalar("moe/router entropy_layer_1", 1.0 + number, step)
        writer.add_scalar("lm loss validation", 4.25 + number, 3)
        writer.close()
        folders.append(tmp_path / name)
    return [folders[0].parent, folders[1]]


def test_several_runs_are_one_picture_each(
    runs: list[pathlib.Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run) for run in runs]) == 0
    said = capsys.readouterr().out
    assert "first          train loss 3.5000 at step 3, validation loss 4.2500 at step 3" in said
    assert "second/events  train loss 4.5000 at step 3" in said
    assert "median step 0.5 s" in said
    for name in ("loss.png", "router.png", "layers.png"):
        assert (tmp_path / "report-of-2-runs" / name).stat().st_size > 5000
    assert not list(runs[0].glob("*.png"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["A", "A"], "is given twice"),
        (["A", "gone"], "no TensorBoard scalars below"),
        (["A", "B", "--tensorboard-dir", "x"], "--tensorboard-dir is for one run"),
        (["A", "--output-dir", "x"], "--output-dir is for several runs"),
    ],
)
def test_a_mistake_is_one_sentence(
    runs: list[pathlib.Path], capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    places = {"A": str(runs[0]), "B": str(runs[1])}
    assert main([places.get(word, word) for word in words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/seed-1", "runs/b/seed-1"], ["a", "b"]),
        (["runs/a/seed-1", "runs/b/seed-2"], ["a/seed-1", "b/seed-2"]),
        (["runs/a", "runs/a/b"], ["a", "a/b"]),
    ],
)
def test_names_are_what_paths_do_not_share(paths: list[str], names: list[str]) -> None:
    found = overlay.names([pathlib.Path(path) for path in paths])
    assert [name.removeprefix("runs/") for name in found] == names


def test_runs_without_tokens_are_drawn_by_steps() -> None:
    with_tokens = Scalars(series={"lm loss": {4: 1.0}}, tokens_per_step=10.0)
    without = Scalars(series={"lm loss": {4: 1.0}}, tokens_per_step=None)
    assert overlay.Axis({"a": [with_tokens]}).places(with_tokens, [4]).tolist() == [40]
    mixed = overlay.Axis({"a": [with_tokens], "b": [without]})
    assert (mixed.label, mixed.places(with_tokens, [4]).tolist()) == ("step", [4])
