"""The report: merging of resumed runs, tokens of a step, and files that make sense."""

import csv

import pytest

from megatron_default_moe.errors import UserError
from megatron_default_moe.report import plots
from megatron_default_moe.report.report import summary, write_report
from megatron_default_moe.report.scalars import Scalars, read_scalars


@pytest.fixture
def write_events(tmp_path):
    """Write one event file: a process of the run, begun at `start` (seconds)."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def write(start, scalars):
        folder = tmp_path / "tensorboard"
        writer = EventFileWriter(str(folder), filename_suffix=f".{start}")
        for tag, values in scalars.items():
            for step, value in values.items():
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                writer.add_event(Event(wall_time=start + step, step=step, summary=summary))
        writer.close()
        return folder

    return write


def test_a_resumed_run_replaces_what_was_given_up(write_events):
    # Written in the wrong order on purpose: the name of a file says little across machines.
    write_events(2000, {"lm loss": {30: 3.0, 40: 2.5}, "lm loss vs samples": {240: 1.0}})
    folder = write_events(
        1000, {"lm loss": {10: 5.0, 20: 4.0, 30: 9.0, 35: 9.0}, "lm loss validation": {20: 4.5}}
    )
    scalars = read_scalars(folder)
    assert scalars.series == {
        "lm loss": {10: 5.0, 20: 4.0, 30: 3.0, 40: 2.5},
        "lm loss validation": {20: 4.5},
    }


def test_an_evaluation_of_a_finished_run_keeps_its_training_curve(write_events):
    write_events(1000, {"lm loss": {10: 5.0, 20: 4.0}, "lm loss validation": {20: 4.5}})
    folder = write_events(2000, {"lm loss validation": {20: 4.25}})
    assert read_scalars(folder).series["lm loss"] == {10: 5.0, 20: 4.0}
    assert read_scalars(folder).series["lm loss validation"] == {20: 4.25}


def test_of_two_values_at_a_step_the_first_counts(write_events, tmp_path):
    """Megatron evaluates the last step again, then the test set, all by one name."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path))
    # From step 30 the process began again at 10.
    logged = [(10, 5.0), (20, 4.0), (30, 9.0), (10, 4.5), (20, 4.25), (20, 4.75), (20, 8.0)]
    for time, (step, value) in enumerate(logged):
        one = Summary(value=[Summary.Value(tag="lm loss validation", simple_value=value)])
        writer.add_event(Event(wall_time=1000 + time, step=step, summary=one))
    writer.close()
    assert read_scalars(tmp_path).series["lm loss validation"] == {10: 4.5, 20: 4.25, 30: 9.0}


def test_more_steps_than_tensorboard_keeps_by_default(write_events):
    folder = write_events(1000, {"lm loss": {step: float(step % 7) for step in range(1, 20_002)}})
    assert len(read_scalars(folder).series["lm loss"]) == 20_001


def test_tokens_come_from_the_log_else_from_the_user_else_are_unknown():
    series = {"lm loss": {5: 1.0, 10: 1.0, 15: 1.0, 20: 1.0, 25: 1.0}}
    # The batch doubles after step 10.
    logged = {**series, "consumed tokens": {10: 1000.0, 20: 3000.0}}
    scalars = Scalars(series=logged, tokens_per_step=200.0)
    assert [scalars.tokens(s) for s in scalars.steps()] == [500, 1000, 2000, 3000, 4000]
    assert Scalars(series=series, tokens_per_step=64.0).tokens(5) == 320
    assert Scalars(series=series, tokens_per_step=None).tokens(5) is None


def test_no_events_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no TensorBoard scalars"):
        read_scalars(tmp_path)


def test_report_of_a_run(tmp_path, write_events):
    steps = range(1, 101)
    logged = range(10, 101, 10)
    scalars = {
        "lm loss": {s: 8 - s / 20 for s in steps},
        "lm loss validation": {50: 5.5, 100: 3.25},
        "lm loss test": {100: 3.5},
        "consumed tokens": {s: 2048.0 * s for s in logged},
        "iteration-time": dict.fromkeys(logged, 0.5),
    }
    for layer in range(2):
        scalars[f"moe/default-vector norm_layer_{layer}"] = {s: s / 10 for s in logged}
        for expert in range(4):
            scalars[f"load/layer_{layer}/expert_{expert}"] = dict.fromkeys(logged, 0.25)
    write_events(1000, scalars)
    files = write_report(tmp_path)
    assert [file.name for file in files] == ["metrics.csv", "loss.png", "experts.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])

    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    assert (rows[4]["step"], rows[4]["tokens"], rows[4]["lm loss"]) == ("5", "10240", "7.75")
    assert rows[4]["lm loss validation"] == ""
    assert rows[49]["load/layer_1/expert_3"] == "0.25"

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("100")
    text = summary(tmp_path)
    assert "at step 100" in text
    assert "Train loss 7.950 at step 1, 3.225 at step 100" in text
    assert "Tokens: 204,800." in text
    assert "Validation loss 3.250 at step 100." in text
    assert "Test loss 3.500 at step 100." in text
    assert "4,096 tokens per second" in text


@pytest.mark.parametrize(
    "series",
    [
        {"learning-rate": {1: 0.1}},
        {"lm loss": {1: 8.0}, "load/layer_3/expert_0": {1: 1.0}},
        {"lm loss": {1: float("nan"), 2: 3.0}, "default-vector norm": {2: 1.0}},
        {f"load/layer_{i}/expert_{e}": {1: 0.5, 2: 0.5} for i in range(20) for e in range(2)},
    ],
    ids=["nothing to draw", "one point", "not per layer", "deep"],
)
def test_whatever_is_absent_does_not_stop_the_plots(tmp_path, series):
    scalars = Scalars(series=series, tokens_per_step=None)
    plots.plot_loss(scalars, tmp_path / "loss.png")
    plots.plot_experts(scalars, tmp_path / "experts.png")
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "experts.png"}


@pytest.mark.parametrize("norm", [None, 0.0, 1.5])
def test_a_run_without_default_vectors_has_no_panel_of_them(tmp_path, monkeypatch, norm):
    drawn = []
    monkeypatch.setattr(plots, "_draw_norms", lambda *_: drawn.append(True))
    series = {"lm loss": {1: 8.0, 2: 7.0}, "load/layer_0/expert_0": {1: 1.0, 2: 1.0}}
    if norm is not None:
        series["moe/default-vector norm_layer_0"] = {1: 0.0, 2: norm}
    plots.plot_experts(Scalars(series=series, tokens_per_step=None), tmp_path / "experts.png")
    assert bool(drawn) == bool(norm)


def test_running_mean_keeps_the_ends_and_does_not_lag():
    values = [float(i) for i in range(20)]
    assert plots.running_mean(values, 5).tolist() == values
