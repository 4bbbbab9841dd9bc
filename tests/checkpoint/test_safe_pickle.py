"""A checkpoint of a stranger's executes nothing and reads nothing outside of its folder.

Contract: the checks before training, and torch's own reading once the patches are in place, refuse
an index or a common state whose pickle names a function, and an index that leaves the folder; what
Megatron writes is read back as it was. Each file here does execute something in torch's plain
reader, which is shown first.
"""

import argparse
import enum
import io
import json
import pathlib
import pickle
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_default_moe import RouterGradientConfig, UserError
from megatron_default_moe.checkpoint import checks, on_disk, safe_pickle
from megatron_default_moe.loop import patches

KEY = on_disk.COMMON_KEY


class Planted:
    """Pickles as a call that makes a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return pathlib.Path.touch, (self.path,)


def save(directory: pathlib.Path, common: Any) -> pathlib.Path:
    """Write a real torch_dist checkpoint with this common state."""
    folder = directory / "iter_0000007"
    folder.mkdir(parents=True)
    state = {"decoder.layers.mlp.router.default_vectors": torch.ones(2, 3), KEY: [common]}
    planner = DefaultSavePlanner(flatten_state_dict=False)  # As Megatron's: one item of bytes.
    torch_checkpoint.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / on_disk.FORMAT).write_text(json.dumps(form))
    (directory / on_disk.TRACKER).write_text("7")
    return folder


@pytest.fixture
def patched() -> Iterator[None]:
    before = patches.installed()
    patches.install()
    yield
    if not before:
        patches.uninstall()


def load(folder: pathlib.Path) -> Any:
    """What torch loads of the common state, as Megatron asks for it."""
    state: dict[str, Any] = {KEY: io.BytesIO()}
    torch_checkpoint.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state[KEY]


def plant_in_index(folder: pathlib.Path, planted: Any) -> None:
    index = pickle.loads((folder / on_disk.INDEX).read_bytes())
    index.planner_data = planted
    (folder / on_disk.INDEX).write_bytes(pickle.dumps(index))


def arguments(directory: pathlib.Path) -> argparse.Namespace:
    names = ("ckpt_step", "pretrained_checkpoint", "non_persistent_ckpt_type", "finetune")
    return argparse.Namespace(load=str(directory), ckpt_format="torch_dist", **dict.fromkeys(names))


def refusal(directory: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        checks.prepare_load(arguments(directory), RouterGradientConfig())
    return str(error.value)


def test_an_index_that_would_run_something(tmp_path: pathlib.Path, patched: None) -> None:
    made = tmp_path / "made"
    folder = save(tmp_path / "run", {"args": argparse.Namespace()})
    plant_in_index(folder, Planted(made))
    FileSystemReader.read_metadata.__wrapped__(FileSystemReader(folder))  # type: ignore[attr-defined]
    assert made.exists(), "torch's own reader does not run it: this test shows nothing"
    made.unlink()
    message = refusal(tmp_path / "run")
    assert "touch" in message
    assert str(folder / on_disk.INDEX) in message
    with pytest.raises(CheckpointException, match="touch"):
        load(folder)
    assert not made.exists()


def test_a_common_state_that_would_run_something(tmp_path: pathlib.Path) -> None:
    made = tmp_path / "made"
    folder = save(tmp_path / "run", {"args": Planted(made)})
    patches.uninstall()
    load(folder)
    assert made.exists(), "torch's own reader does not run it: this test shows nothing"
    made.unlink()
    assert "cannot be read (it names " in refusal(tmp_path / "run")
    patches.install()
    with pytest.raises(CheckpointException, match="it names"):
        load(folder)
    patches.uninstall()
    assert not made.exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "inside/../../outside"])
def test_an_index_that_leaves_the_folder(tmp_path: pathlib.Path, patched: None, name: str) -> None:
    folder = save(tmp_path / "run", {"args": argparse.Namespace()})
    index = pickle.loads((folder / on_disk.INDEX).read_bytes())
    next(iter(index.storage_data.values())).relative_path = name
    (folder / on_disk.INDEX).write_bytes(pickle.dumps(index))
    assert f"places data in {name}" in refusal(tmp_path / "run")
    with pytest.raises(CheckpointException, match="outside"):
        load(folder)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "subprocess.Popen"])
def test_no_other_name_is_found(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    unpickler = safe_pickle.IndexUnpickler(io.BytesIO())
    with pytest.raises(pickle.UnpicklingError, match=name):
        unpickler.find_class(module, attribute)
    assert safe_pickle._harmless(name) is None


def test_a_state_imports_no_module(tmp_path: pathlib.Path) -> None:
    (tmp_path / "strangers_module.py").write_text("import enum\nclass Kind(enum.Enum): A = 1\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert safe_pickle._harmless("strangers_module.Kind") is None
        assert "strangers_module" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


def test_what_megatron_writes_is_read_as_it_was(tmp_path: pathlib.Path, patched: None) -> None:
    import numpy
    from megatron.core.transformer.enums import AttnBackend

    common = {
        "args": argparse.Namespace(
            lr=0.1, backend=AttnBackend.unfused, exit_signal=signal.SIGTERM, dtype=torch.bfloat16
        ),
        "numbers": numpy.random.default_rng(1).integers(9, size=5),
        "scalar": numpy.float64(0.5),
        "tensor": torch.arange(3),
    }
    folder = save(tmp_path / "run", common)
    for read in (on_disk.common_state(folder), load(folder)[0]):
        assert vars(read["args"]) == vars(common["args"])
        assert isinstance(read["args"].backend, enum.Enum)
        assert (read["numbers"] == common["numbers"]).all()
        assert read["scalar"] == 0.5
        assert torch.equal(read["tensor"], common["tensor"])
    assert on_disk.keys(folder) is not None
    assert on_disk.damage(folder) is None


def test_without_megatron_its_values_are_unknown_and_the_arguments_are_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that imports no Megatron has none of its enums; nothing else is let through."""
    for module, known in (("megatron.core.of_tomorrow", True), ("somewhere_else", False)):
        mode = enum.Enum("Mode", {"ON": 1}, module=module)
        with monkeypatch.context() as there:
            there.setitem(sys.modules, module, argparse.Namespace(Mode=mode))
            common = {"args": argparse.Namespace(seed=7), "mode": mode.ON}
            folder = save(tmp_path / module, common)
        if known:
            state = on_disk.common_state(folder)
            assert vars(state["args"]) == {"seed": 7}
            assert isinstance(state["mode"], safe_pickle.Unknown)
        else:
            with pytest.raises(pickle.UnpicklingError, match=r"names somewhere_else\.Mode"):
                on_disk.common_state(folder)
