"""The way from a bare checkout to an environment: interpreter, index settings, lock."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIND_PYTHON = ROOT / "tools" / "find_python.sh"


def load_uv_env():
    spec = importlib.util.spec_from_file_location("uv_env", ROOT / "tools" / "uv_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interpreter(path, version="3.12", works=True):
    """A stand-in that answers like `python -c` in find_python.sh, or fails like a pyenv shim."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shim = "echo 'not activated' >&2; exit 127"
    answer = f'[ "$3" = {version} ] && echo {path}' if works else shim
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def find(tmp_path):
    """Run find_python.sh on a machine whose PATH and HOME are below tmp_path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "sh", "grep", "sort", "ls"):
        (tools / name).symlink_to(shutil.which(name))

    def run(*version, **extra):
        path = f"{tmp_path / 'bin'}:{tools}"
        env = {"PATH": path, "HOME": str(tmp_path / "home"), **extra}
        done = subprocess.run(
            [str(FIND_PYTHON), *version], env=env, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout.strip()

    return run


def test_a_python312_that_answers_is_taken(find, tmp_path):
    path = interpreter(tmp_path / "bin" / "python3.12")
    interpreter(tmp_path / "home/.pyenv/versions/3.12.9/bin/python3.12")
    assert find() == (0, str(path))


def test_a_shim_that_fails_is_passed_over_for_the_newest_below_pyenv_root(find, tmp_path):
    interpreter(tmp_path / "bin" / "python3.12", works=False)
    interpreter(tmp_path / "bin" / "python3", version="3.11")
    versions = tmp_path / "pyenv" / "versions"
    for version in ("3.12.1", "3.12.10", "3.12.9", "3.12-dev", "3.13.0"):
        interpreter(versions / version / "bin" / "python3.12")
    pyenv = tmp_path / "bin" / "pyenv"
    pyenv.write_text(f"#!/bin/sh\necho {tmp_path / 'pyenv'}\n")
    pyenv.chmod(0o755)
    assert find() == (0, str(versions / "3.12.10" / "bin" / "python3.12"))


def test_pyenv_in_the_home_folder_without_its_command(find, tmp_path):
    versions = tmp_path / "home" / ".pyenv" / "versions"
    interpreter(versions / "3.12.4" / "bin" / "python3.12", works=False)
    path = interpreter(versions / "3.12.3" / "bin" / "python3.12")
    assert find() == (0, str(path))


def test_none_at_all_is_said_by_the_exit_code(find):
    assert find() == (1, "")


def test_313_is_taken_where_it_is_asked_for_or_the_only_one(find, tmp_path):
    path = interpreter(tmp_path / "home/.pyenv/versions/3.13.0/bin/python3.13", version="3.13")
    assert find() == (0, str(path))
    older = interpreter(tmp_path / "bin" / "python3.12")
    assert find() == (0, str(older))
    assert find("3.13") == (0, str(path))
    assert find("3.12") == (0, str(older))
    assert find("3.12", PYTHON=str(path)) == (0, str(older))
    assert find("3.13", PYTHON=str(path)) == (0, str(path))


def test_314_is_not_looked_for(find, tmp_path):
    interpreter(tmp_path / "bin" / "python3", version="3.14")
    assert find() == (1, "")


def test_the_users_choice_wins_and_a_wrong_one_is_refused(find, tmp_path):
    interpreter(tmp_path / "bin" / "python3.12")
    path = interpreter(tmp_path / "own" / "python")
    assert find(PYTHON=str(path)) == (0, str(path))
    assert find(PYTHON="/nowhere")[0] == 1


def test_pips_index_reaches_uv_and_uvs_own_settings_win(tmp_path):
    uv_env = load_uv_env()
    listing = (
        "global.index-url='https://global.invalid/simple'\n"
        "install.index-url='https://install.invalid/simple'\n"
        "global.extra-index-url='\\nhttps://a.invalid/simple\\nhttps://b.invalid/simple'\n"
        f"global.find-links='/nowhere {tmp_path}'\n"
        ":env:.cert='/certs.pem'\n"
        "global.no-color='yes'\n"
    )
    settings = uv_env.pip_settings(listing)
    assert uv_env.exports(settings, {}) == [
        "export UV_INDEX_URL=https://install.invalid/simple",
        "export UV_EXTRA_INDEX_URL='https://a.invalid/simple https://b.invalid/simple'",
        f"export UV_FIND_LINKS={tmp_path}",
        "export SSL_CERT_FILE=/certs.pem",
        "export UV_INDEX_STRATEGY=unsafe-best-match",
    ]
    own = {"UV_DEFAULT_INDEX": "x", "UV_INDEX": "x", "SSL_CERT_FILE": "x", "UV_FIND_LINKS": "x"}
    assert uv_env.exports(settings, own) == []
    assert uv_env.exports(uv_env.pip_settings(""), {}) == []


def test_the_lock_has_hashes_for_every_package_and_names_no_index():
    for name in ("dev", "uv", "docker"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        assert not re.search(r"://|--(extra-)?index-url|--find-links", text)
        entries = re.findall(r"^([A-Za-z0-9_.-]+(?:\[[^]]*])?==\S+)((?: \\\n    \S+)*)", text, re.M)
        assert entries
        assert all("--hash=sha256:" in hashes for _, hashes in entries)
        # Every line belongs to an entry or is a comment: nothing unpinned slips through.
        heads = [line for line in text.splitlines() if line and line[0] not in " #"]
        assert len(heads) == len(entries)


def test_scripts_are_valid_bash_and_executable():
    for script in (FIND_PYTHON, ROOT / "tools" / "bootstrap.sh", ROOT / ".ci" / "run"):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


def test_make_alone_lists_the_rules():
    env = {**os.environ, "MAKEFLAGS": ""}
    done = subprocess.run(
        ["make", "-C", str(ROOT)], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    for rule in ("quickstart", "test", "lint", "bench", "gpu", "lock", "clean"):
        assert f"make {rule} " in done.stdout
