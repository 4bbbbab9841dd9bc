"""The wheel: its help where nothing else is installed, and its examples outside of a checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "megatron_default_moe", "examples")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
"""What ``pip wheel --no-deps --no-build-isolation`` calls; not every environment has pip itself."""
SCRIPT = (
    "import sys; from importlib.metadata import entry_points;"
    "(one,) = entry_points(group='console_scripts', name='default-moe'); sys.exit(one.load()())"
)
"""The script that an installer writes for the entry point."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel of this checkout, built from a copy, beside which nothing is left."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(out)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def run(
    *command: str | pathlib.Path, cwd: pathlib.Path, path: pathlib.Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_help_works_where_nothing_else_is_installed(
    wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    (site,) = (environment / "lib").glob("python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    python = environment / "bin" / "python"
    for start in (("-c", SCRIPT), ("-m", "megatron_default_moe")):
        done = run(python, *start, "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "  plan        what a run will need of its GPUs" in done.stdout
        assert run(python, *start, "plan", "--help", cwd=tmp_path).returncode == 0
        refused = run(python, *start, "pretrain", "--num-layers", "2", cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: default-moe pretrain needs torch, which is not")
        assert refused.stderr.count("\n") == 1
    doctor = run(python, "-m", "megatron_default_moe", "doctor", cwd=tmp_path)
    assert doctor.returncode == 1
    assert "bad: megatron-core - not found" in doctor.stdout


def test_the_examples_are_found_outside_of_a_checkout(
    wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    content = tmp_path / "content"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(content)
    shipped = {path.stem for path in (content / "megatron_default_moe/examples").glob("*.yaml")}
    assert shipped == {path.stem for path in (ROOT / "examples").glob("*.yaml")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program, gpus = "-m megatron_default_moe plan".split(), "--gpus 64 --gpu h100".split()
    done = run(sys.executable, *program, "7.33b-8c1", *gpus, cwd=elsewhere, path=content)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("64 x H100 SXM 80 GB: TP 1, PP 1, EP 8")
    # A base line in a file of one's own may name the file that was shipped.
    base = content / "megatron_default_moe/examples/7.33b-8c1.yaml"
    (elsewhere / "own.yaml").write_text(f"base: {base}\nmicro-batch-size: 1\n")
    done = run(sys.executable, *program, "own.yaml", *gpus, cwd=elsewhere, path=content)
    assert done.returncode == 0, done.stderr
    assert "micro-batches of 1;" in done.stdout


def test_every_package_is_in_the_wheel(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.endswith(".py")}
    package = ROOT / "megatron_default_moe"
    assert shipped == {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}


def test_the_image_copies_what_the_wheel_is_built_from() -> None:
    docker, ignored = ((ROOT / name).read_text() for name in ("Dockerfile", ".dockerignore"))
    before_installation = docker.split("pip install --no-cache-dir --no-deps")[0]
    for name in SOURCES:
        assert f" {name} " in before_installation
        assert f"!{name}\n" in ignored
