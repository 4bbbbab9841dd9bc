"""What the Dockerfile runs, in a bare environment that stands for the image (no Docker needed).

The environment has pip and links to this one's torch with all it requires, and nothing else, as if
NVIDIA had built it. Fetches packages; run by `make test-launch`. The image itself: not built here.
"""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from running import ROOT

BRINGS = ("torch", "numpy", "setuptools", "packaging")


def link(name, target, done):
    """Link a distribution of this environment, and what it requires, into another one."""
    if name in done:
        return
    done.add(name)
    try:
        one = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # for another platform
    for top in {file.parts[0] for file in one.files if file.parts[0] not in ("..", "__pycache__")}:
        place = target / top
        if not place.exists():
            place.symlink_to(pathlib.Path(one.locate_file(top)))
    for text in one.requires or ():
        if "extra ==" not in text:
            link(re.match(r"[A-Za-z0-9._-]+", text).group(), target, done)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The environment, and the files that .dockerignore lets through."""
    folder = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=120)
    site = next((folder / "venv" / "lib").glob("python3*/site-packages"))
    done = set()
    for name in BRINGS:
        link(name, site, done)
    sources = folder / "opt"
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            place = sources / line[1:]
            place.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / line[1:]).is_dir() else shutil.copy
            copy(ROOT / line[1:], place)
    # As NVIDIA's image sets it: a file that would pin a package of the lock to another version.
    (folder / "constraint.txt").write_text("omegaconf==2.0.0\n")
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(folder / "constraint.txt"),
    }

    def run(*command, seconds=300, **extra):
        return subprocess.run(
            command,
            cwd=sources,
            env=environment | extra,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    return run


def wheel(folder, name, version):
    """Write an empty wheel."""
    folder.mkdir()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return str(folder)


def torch_of(run):
    done = run("python", "-c", "import torch; print(torch.__version__, torch.__file__)")
    return done.stdout


@pytest.mark.timeout(900)
def test_the_steps_of_the_dockerfile(image, tmp_path):
    before = torch_of(image)
    done = image("docker/install.sh", wheel(tmp_path / "wheels", "addition", "1.0"), seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d\d packages added to the \d+ of the image$", done.stdout, re.M)
    assert torch_of(image) == before
    listed = image("python", "-m", "pip", "list", "--format=freeze").stdout
    assert "megatron-core==0.19.2\n" in listed
    assert "addition==1.0\n" in listed
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", listed, re.M):
        if (entry := re.search(rf"^{name}==(\S+)", lock(), re.M)) is not None:
            assert version == entry[1]

    again = image("docker/install.sh")
    assert again.returncode == 0
    assert "\n0 packages added" in "\n" + again.stdout

    package = image(*"python -m pip install --no-deps --no-build-isolation .".split())
    assert package.returncode == 0, package.stdout + package.stderr
    checked = image("python", "tools/doctor.py", "--building-image")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    smoke = image("python", "docker/smoke.py", OMP_NUM_THREADS="1")
    assert smoke.returncode == 0, smoke.stdout[-3000:] + smoke.stderr[-3000:]
    assert len(re.findall(r"iteration +[12]/ +2 ", smoke.stdout)) == 2


def test_a_changed_package_fails_the_build(image, tmp_path):
    """A wheel that pip is asked to put in place of one of the image's packages."""
    done = image("docker/install.sh", wheel(tmp_path / "wheels", "networkx", "99.0"))
    assert done.returncode != 0
    assert "networkx" in done.stdout + done.stderr
    # The same without pip's own refusal: what was there before is compared.
    constraints = tmp_path / "image.txt"
    listed = image("python", "docker/packages.py", "constraints").stdout
    constraints.write_text(re.sub(r"(?m)^torch==.*$", "torch==1.0", listed))
    done = image("python", "docker/packages.py", "check", str(constraints))
    assert done.returncode == 1
    assert "error: a package of the image was changed: torch: 1.0 became" in done.stderr


def lock():
    return (ROOT / "requirements" / "docker.txt").read_text()
