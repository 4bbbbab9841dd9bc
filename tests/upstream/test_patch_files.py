"""The diffs under patches/, applied to a copy of the installed Megatron and run.

Contract: every diff applies to the installed version; each one's check (``patch_checks/``) fails
without it in the way README says and passes with it; all of them apply together; README names
every diff. The diff for a source checkout changes a file the wheel does not hold: see the last
tests.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import megatron.core
import pytest

from megatron_default_moe.loop import entry

ROOT = pathlib.Path(__file__).parents[2]
WHEEL_PATCHES = sorted((ROOT / "patches" / "megatron-core").glob("*.patch"))
CHECKOUT_PATCHES = sorted((ROOT / "patches" / "megatron-lm").glob("*.patch"))
INSTALLED = pathlib.Path(next(iter(megatron.core.__path__))).parent

SYMPTOMS = {
    "balance-loss-names": "the log names ['global_load_balancing_loss', 'load_balancing_loss']",
    "dataset-helpers-without-makefile": "No targets specified and no makefile found",
    "distributed-optimizer-fp32-load": "a view of a leaf Variable that requires grad",
    "distributed-optimizer-torch-adam-resume": "assert len(steps) == 1",
    "enum-flag-unknown-name": "KeyError: 'no-such-backend'",
    "expert-bias-padding-mask": "must match the size of tensor",
    "global-aux-loss-gradient": "ratio 0.5",
    "help-text-percent": "unsupported format character",
    "local-expert-bias": "is a view and is being modified inplace",
}
"""What the check of each diff prints without it."""


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the installed ``megatron`` package that a diff can change."""
    ignored = shutil.ignore_patterns("Makefile")
    # With the compiled files, which stay valid because the copies keep their times.
    shutil.copytree(INSTALLED, tmp_path / "megatron", ignore=ignored)
    return tmp_path


def apply(patch: pathlib.Path, folder: pathlib.Path) -> None:
    """``git apply`` as the README says."""
    done = subprocess.run(
        ["git", "apply", "--whitespace=error", str(patch)],
        cwd=folder,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def run_check(patch: pathlib.Path, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run the diff's check with ``megatron`` from this folder."""
    check = ROOT / "tests/upstream/patch_checks" / f"{patch.stem.replace('-', '_')}.py"
    return subprocess.run(
        [sys.executable, str(check)],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_diff_has_a_symptom() -> None:
    assert set(SYMPTOMS) == {patch.stem for patch in WHEEL_PATCHES}


@pytest.mark.parametrize("patch", WHEEL_PATCHES, ids=lambda patch: patch.stem)
def test_a_diff_cures_its_bug(copy: pathlib.Path, patch: pathlib.Path) -> None:
    before = run_check(patch, copy)
    assert before.returncode != 0
    output = before.stdout + before.stderr
    assert SYMPTOMS[patch.stem] in output, output[-4000:]
    apply(patch, copy)
    after = run_check(patch, copy)
    assert after.returncode == 0, after.stdout + after.stderr


def test_all_diffs_apply_together(copy: pathlib.Path) -> None:
    for patch in WHEEL_PATCHES:
        apply(patch, copy)


def test_the_readme_names_every_diff() -> None:
    text = (ROOT / "patches" / "README.md").read_text()
    named = set(re.findall(r"`([\w.-]+/[\w.-]+\.patch)`", text))
    found = {f"{path.parent.name}/{path.name}" for path in WHEEL_PATCHES + CHECKOUT_PATCHES}
    assert named == found


# The diff for a source checkout


@pytest.mark.parametrize("patch", CHECKOUT_PATCHES, ids=lambda patch: patch.stem)
def test_what_the_checkout_diff_calls_exists(patch: pathlib.Path) -> None:
    added = [line for line in patch.read_text().splitlines() if re.match(r"\+(?!\+)", line)]
    assert "+from megatron_default_moe import entry as router_gradient" in added
    called = set(re.findall(r"router_gradient\.(\w+)\(", "\n".join(added)))
    assert called == {"with_flags", "prepare"}
    for name in called:
        assert callable(getattr(entry, name))


@pytest.mark.full
@pytest.mark.parametrize("patch", CHECKOUT_PATCHES, ids=lambda patch: patch.stem)
def test_the_checkout_diff_applies(patch: pathlib.Path, tmp_path: pathlib.Path) -> None:
    checkout = os.environ.get("MEGATRON_LM_CHECKOUT")
    if not checkout:
        pytest.skip("MEGATRON_LM_CHECKOUT names no Megatron-LM source checkout")
    shutil.copy(pathlib.Path(checkout) / "pretrain_gpt.py", tmp_path)
    apply(patch, tmp_path)
    compile((tmp_path / "pretrain_gpt.py").read_text(), "pretrain_gpt.py", "exec")
