"""Every released Megatron-Core of the supported range, and one before it.

Contract: each 0.19 wheel of the package index has the signatures this package was written for, and
the layer computes its formula with it; no 0.19 has been released that is not listed here; 0.18 is
refused at import and at the entry, with the range. Needs the package index and uv or pip.
"""

import pathlib
import subprocess
import sys

import pytest
import upstream
from test_upstream import expected_table, installed_table, run_python

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.full

RELEASED = ("0.19.0", "0.19.1", "0.19.2")
BEFORE = "0.18.2"
# Until 0.19.2 the context of low precision had another name there; nothing else differs.
_SCHEDULE = "megatron.core.models.common.model_chunk_schedule_plan.TransformerLayerSchedulePlan.run"
LOOKED_AT = {"0.19.0": (_SCHEDULE,), "0.19.1": (_SCHEDULE,)}
"""Code that differs from 0.19.2's without a consequence here, by version."""


def install(requirement: str, folder: pathlib.Path) -> None:
    """Put one wheel into a folder, without what it depends on."""
    # As tools/bootstrap.sh: uv, told of the package index that pip knows.
    script = (
        'eval "$(python3 tools/uv_env.py)"; PATH="$PATH:$PWD/.uv/packages/bin";'
        ' uv pip install --quiet --python "$0" --no-deps --target "$1" "$2"'
    )
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, str(folder), requirement],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"{requirement} cannot be installed here: {done.stderr.strip()[-300:]}")


def version_in(folder: pathlib.Path) -> str:
    (info,) = folder.glob("megatron_core-*.dist-info")
    return info.name.removeprefix("megatron_core-").removesuffix(".dist-info")


@pytest.mark.parametrize("version", RELEASED)
def test_a_released_version_is_as_expected_and_computes_the_formula(
    version: str, tmp_path: pathlib.Path
) -> None:
    install(f"megatron-core=={version}", tmp_path)
    table = installed_table(tmp_path)
    assert table["version"] == version, "the wheel in the folder is not the one in use"
    differing = upstream.differences(expected_table(), table)
    found = [line for line in differing if not line.startswith(LOOKED_AT.get(version, ()))]
    assert not found, "\n".join(found)
    assert len(differing) == len(LOOKED_AT.get(version, ())), "LOOKED_AT names too much"
    tests = ["tests/layers/test_layer.py", "-k", "formula or stock or mean_outputs"]
    done = run_python(["-m", "pytest", "-q", "-W", "ignore", *tests], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    others = [f"tests/layers/test_{name}.py" for name in ("mtp", "cuda_graphs", "overlap")]
    done = run_python(["-m", "pytest", "-q", "-W", "ignore", *others], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]


def test_no_newer_version_of_the_range_has_been_released(tmp_path: pathlib.Path) -> None:
    install("megatron-core>=0.19,<0.20", tmp_path)
    assert version_in(tmp_path) == RELEASED[-1], "add it to RELEASED and look at what it changed"


def test_the_version_before_the_range_is_refused(tmp_path: pathlib.Path) -> None:
    install(f"megatron-core=={BEFORE}", tmp_path)
    sentence = f"megatron-core {BEFORE} is not supported: install a version from 0.19"
    for statement in (
        "from megatron_default_moe import attach",
        "from megatron_default_moe import DefaultMoERouter",
    ):
        done = run_python(["-W", "ignore", "-c", statement], tmp_path)
        assert done.returncode != 0
        assert sentence in done.stderr
    done = run_python(["-m", "megatron_default_moe.pretrain", "--num-experts", "8"], tmp_path)
    assert done.returncode == 2
    assert f"error: {sentence}" in done.stderr
    assert "Traceback" not in done.stderr
