"""What the package takes for granted of Megatron-Core is still so.

Contract: every upstream name that the package imports, overrides, replaces or mirrors is as in
``upstream_signatures.json``; a change is named, with the version the package was written for; a
version outside the supported range is refused before anything else, with the range.
"""

import copy
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import upstream

from megatron_default_moe import UserError
from megatron_default_moe.loop import patches

ROOT = pathlib.Path(__file__).parents[2]
TRAIN_STEP = "megatron.training.training.train_step"


def installed_table(*overlay: pathlib.Path) -> dict[str, Any]:
    """The table of a Megatron-Core, of the environment's or of a folder before it."""
    done = run_python(["-W", "ignore", "tests/helpers/upstream.py"], *overlay)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def run_python(arguments: list[str], *overlay: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository, with folders that come before the environment's packages."""
    path = os.pathsep.join(str(folder) for folder in (*overlay, ROOT))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def expected_table() -> dict[str, Any]:
    return json.loads(upstream.EXPECTED.read_text())


def test_megatron_is_what_this_package_was_written_for() -> None:
    found = upstream.differences(expected_table(), installed_table())
    assert not found, "\n".join(found)


def test_the_table_covers_what_the_package_builds_on() -> None:
    expected = expected_table()
    assert expected["version"] == "0.19.2"
    rows = expected["signatures"]
    assert "missing" not in rows.values()
    for name in (
        "core.transformer.moe.router.TopKRouter.routing",
        "core.transformer.moe.moe_layer.MoELayer.__init__",
        "core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher.combine_postprocess",
        "core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        "core.transformer.moe.moe_logging.MoEMetricsTracker.report",
        "core.distributed.finalize_model_grads",
        "training.argument_utils.gpt_config_from_args",
        "training.models.gpt.GPTModelBuilder.build_model",
        "training.models.gpt.mtp_block_spec",
        "training.training.train_step",
    ):
        assert rows[f"megatron.{name}"].startswith("(")
    for returned in rows[f"{TRAIN_STEP} returns"].split(" | "):
        assert len(returned.split(", ")) == 8, "worker.py and training.py read it by position"


def test_a_change_is_named_with_the_version() -> None:
    expected = expected_table()
    changed = copy.deepcopy(expected)
    changed["version"] = "0.19.9"
    changed["signatures"][TRAIN_STEP] = "(model)"
    del changed["signatures"][f"{TRAIN_STEP} returns"]
    changed_row, gone_row = upstream.differences(expected, changed)
    assert TRAIN_STEP in changed_row
    for words in ("(model)", "0.19.9", "written for 0.19.2", expected["signatures"][TRAIN_STEP]):
        assert words in changed_row
    assert gone_row.startswith(f"{TRAIN_STEP} returns is no longer used")


@pytest.mark.parametrize("version", [(0, 18, 2), (0, 20, 0), (1, 0, 0)], ids=str)
def test_a_version_outside_the_range_is_refused(
    version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import package_info

    import megatron_default_moe

    name = ".".join(map(str, version))
    monkeypatch.setattr(package_info, "VERSION", (*version, ""))
    monkeypatch.setattr(package_info, "__shortversion__", name)
    monkeypatch.delitem(vars(megatron_default_moe), "attach", raising=False)
    for entry in (patches.check_version, patches.install, lambda: megatron_default_moe.attach):
        with pytest.raises(UserError, match=f"{name} is not supported") as refusal:
            entry()
        assert "0.19 up to, not including, 0.20" in str(refusal.value)


def test_patches_are_applied_once_and_taken_back() -> None:
    from megatron.training import training

    original = training.train_step
    try:
        patches.install()
        assert patches.installed()
        replacement = training.train_step
        assert replacement is not original
        assert replacement.__wrapped__ is original
        patches.install()
        assert training.train_step is replacement
    finally:
        patches.uninstall()
    assert training.train_step is original
    assert not patches.installed()
