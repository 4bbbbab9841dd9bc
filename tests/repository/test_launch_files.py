"""Launchers, manifest and Dockerfile as far as they can be checked without running them.

`make test-launch` runs them (tests/launch).
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"

# Kubeflow training operator 1.9: manifests/base/crds/kubeflow.org_pytorchjobs.yaml, the part that
# the manifest uses. A leaf is a type; "!" marks a required field, "*" any name.
QUANTITY = (int, str)
CONTAINER = {
    "name!": str,
    "image!": str,
    "command": [str],
    "env": [{"name!": str, "value": str}],
    "resources": {"limits": {"*": QUANTITY}},
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
VOLUME = {
    "name!": str,
    "persistentVolumeClaim": {"claimName!": str},
    "emptyDir": {"medium": str, "sizeLimit": QUANTITY},
}
POD = {
    "securityContext": {"fsGroup": int, "fsGroupChangePolicy": str},
    "containers!": [CONTAINER],
    "volumes": [VOLUME],
}
REPLICAS = {"replicas": int, "restartPolicy": str, "template": {"spec": POD}}
SCHEMA = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str, "annotations": {"*": str}},
    "spec!": {
        "nprocPerNode": str,
        "elasticPolicy": {
            "minReplicas": int,
            "maxReplicas": int,
            "rdzvBackend": str,
            "rdzvId": str,
            "rdzvConf": [{"key": str, "value": str}],
            "maxRestarts": int,
        },
        "runPolicy": {"cleanPodPolicy": str, "backoffLimit": int},
        "pytorchReplicaSpecs!": {"Worker": REPLICAS, "Master": REPLICAS},
    },
}


def violations(value, schema, path=""):
    """Every way in which a value does not fit a schema."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: not a mapping"]
        known = {name.rstrip("!"): below for name, below in schema.items()}
        lacking = [n for n in schema if n.endswith("!") and n.rstrip("!") not in value]
        found = [f"{path}.{name.rstrip('!')}: missing" for name in lacking]
        for name, below in value.items():
            if name not in known and "*" not in known:
                found.append(f"{path}.{name}: unknown")
            else:
                found += violations(below, known.get(name, known.get("*")), f"{path}.{name}")
        return found
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [
            v for i, one in enumerate(value) for v in violations(one, schema[0], f"{path}[{i}]")
        ]
    return (
        [] if isinstance(value, schema) and not isinstance(value, bool) else [f"{path}: wrong type"]
    )


@pytest.fixture
def manifest():
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def test_the_manifest_fits_the_operators_schema(manifest):
    assert violations(manifest, SCHEMA) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    # The schema can refuse.
    del manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0][
        "name"
    ]
    manifest["spec"]["elasticPolicy"]["minReplicas"] = "2"
    manifest["spec"]["nprocPerNod"] = "8"
    assert sorted(violations(manifest, SCHEMA)) == [
        ".spec.elasticPolicy.minReplicas: wrong type",
        ".spec.nprocPerNod: unknown",
        ".spec.pytorchReplicaSpecs.Worker.template.spec.containers[0].name: missing",
    ]


def test_the_manifest_fits_the_operators_webhook_and_itself(manifest):
    spec = manifest["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", manifest["metadata"]["name"])
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    elastic = spec["elasticPolicy"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"] >= 1
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert f"--uid {pod['securityContext']['fsGroup']} " in (ROOT / "Dockerfile").read_text()
    assert container["resources"]["limits"]["nvidia.com/gpu"] == spec["nprocPerNode"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
    assert container["command"][:3] == ["torchrun", "-m", "megatron_default_moe.pretrain"]


def test_the_flags_of_the_launchers_exist(manifest):
    from megatron_default_moe.pretrain import build_parser

    pod = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    flags = [word for word in pod["containers"][0]["command"] if word.startswith("--")]
    composed = (LAUNCH / "torchrun.sh").read_text().split("-m megatron_default_moe.pretrain")[1]
    flags += re.findall(r"--[a-z-]+", composed.split('"$@"')[0])
    assert "--exit-signal" in flags
    assert set(flags) <= set(build_parser()._option_string_actions)


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "kubernetes.yaml"])
def test_what_is_to_be_edited_stands_in_one_block(name):
    text = (LAUNCH / name).read_text()
    _, block, rest = re.split(r"(?m)^ *# -{3,}.*-{3,}$", text)
    assert not re.search(
        r"(?m)^#SBATCH|\$\{\w+:?-[^}]+\}|&\w+ ", rest.replace("RESTART_COUNT:-0", "")
    )
    assert block.count("\n") >= 5


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        ((), {}, "error: no CONFIG.yaml"),
        (("nowhere.yaml",), {}, "error: nowhere.yaml cannot be read"),
        (("examples",), {}, "error: examples cannot be read"),
        (("examples/quickstart.yaml",), {"NODES": "two"}, "error: NODES is 'two'"),
        (("examples/quickstart.yaml",), {"NODES": "0"}, "error: NODES is '0'"),
        (("examples/quickstart.yaml",), {"NODES": "2"}, "error: NODES is 2 but HEAD is empty"),
        (("examples/quickstart.yaml",), {"PATH": "/usr/bin:/bin"}, "error: no torchrun"),
    ],
)
def test_a_mistake_with_torchrun_sh_is_one_sentence(words, environment, says):
    done = subprocess.run(
        [LAUNCH / "torchrun.sh", *words],
        cwd=ROOT,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(says)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_a_launcher_prints_its_usage(name):
    """The head of the file and, for torchrun.sh, every variable that can be set."""
    command = ["bash", LAUNCH / name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"examples/launch/{name} CONFIG.yaml [flags]" in done.stdout
    if name == "torchrun.sh":
        variables = re.findall(r"^([A-Z_]+)=\$\{", (LAUNCH / name).read_text(), re.MULTILINE)
        assert len(variables) == 8
        assert all(f"\n  {variable}=" in done.stdout for variable in variables)


@pytest.fixture
def sbatch(tmp_path):
    """Run slurm.sbatch as SLURM would start it, with these shell lines for srun."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "examples" / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "torchrun.sh", tmp_path / "examples" / "launch")

    def run(srun, *words, **environment):
        for name, lines in (
            ("srun", srun),
            ("scontrol", f"echo scontrol $* >>{tmp_path}/said"),
            ("scancel", "kill -USR1 $(cat $RUN_DIR/step)"),
        ):
            file = tmp_path / "bin" / name
            file.write_text(f"#!/usr/bin/env bash\n{lines}\n")
            file.chmod(0o755)
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "default-moe",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_SUBMIT_DIR": str(tmp_path),
        }
        done = subprocess.run(
            ["bash", str(LAUNCH / "slurm.sbatch"), *words],
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"} | slurm | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said = tmp_path / "said"
        return done, said.read_text() if said.exists() else ""

    return run


def test_a_slurm_job_has_a_folder_of_its_configs_name(sbatch, tmp_path):
    """Two models in one folder would load each other's checkpoints."""
    report = 'echo "run $RUN_DIR" "$@"'
    for name in ("1.96b-32c1", "1.96b-32c2"):
        done, _ = sbatch(report, f"some where/{name}.yaml")
        assert done.returncode == 0, done.stderr
        assert f"run {tmp_path}/runs/{name} " in done.stdout
        assert f" {tmp_path}/examples/launch/torchrun.sh some where/{name}.yaml\n" in done.stdout
        assert "--cpu-bind=none" in done.stdout
    done, _ = sbatch(report, "a.yaml", RUN_DIR=str(tmp_path / "other"))
    assert f"run {tmp_path}/other " in done.stdout


@pytest.mark.parametrize(
    ("ending", "code", "queued"),
    [
        ("exit 0", 0, True),
        ("exit 1", 1, False),
        ("echo 5 >$RUN_DIR/checkpoint/latest_checkpointed_iteration.txt; exit 1", 0, True),
    ],
)
def test_near_its_time_limit_a_job_is_queued_again_only_if_that_helps(sbatch, ending, code, queued):
    step = (
        "mkdir -p $RUN_DIR/checkpoint; echo $$ >$RUN_DIR/step\n"
        f"trap '{ending}' USR1\n"
        "kill -USR1 $PPID\n"
        "for i in $(seq 100); do sleep 0.1; done; exit 3"
    )
    done, said = sbatch(step, "a.yaml")
    assert done.returncode == code, done.stdout + done.stderr
    assert said == ("scontrol requeue 7\n" if queued else "")


def test_what_slurm_sbatch_says_outside_slurm_and_elsewhere(sbatch, tmp_path):
    done, _ = sbatch("", "a.yaml", SLURM_JOB_ID="")
    assert (done.returncode, done.stderr.startswith("error: submit it: sbatch")) == (2, True)
    done, _ = sbatch("", "a.yaml", SLURM_SUBMIT_DIR=str(tmp_path / "elsewhere"))
    assert done.returncode == 2
    assert "submit from the repository's root" in done.stderr


def test_no_launcher_has_a_static_port_on_one_node():
    text = (LAUNCH / "torchrun.sh").read_text()
    assert "--standalone" in text
    assert not re.search(r"master.port|MASTER_PORT", text)


def test_the_dockerfile_copies_what_is_there_and_the_context_holds_it():
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"(?m)^COPY (.*)", text) for word in line.split()[:-1]]
    assert "megatron_default_moe" in copied
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    for name in copied:
        assert (ROOT / name).exists()
        assert any(name == place or name.startswith(f"{place}/") for place in allowed)
    assert re.search(r"(?m)^ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3$", text)
    assert re.search(r"(?m)^USER 10001$", text)


@pytest.fixture
def packages():
    spec = importlib.util.spec_from_file_location("packages", ROOT / "docker" / "packages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_the_image_lacks_is_taken_from_the_lock(packages):
    lock = (ROOT / "requirements" / "docker.txt").read_text()
    taken = packages.missing(lock, {"pyyaml", "flask-restful"})
    assert "megatron-core==0.19.2 \\\n    --hash=sha256:" in taken
    assert not re.search(
        r"(?mi)^(pyyaml|flask-restful|torch|triton|numpy|nvidia[a-z0-9-]*)==", taken
    )
    assert re.search(r"(?m)^flask==", taken)
    names = [m[1] for line in lock.splitlines() if (m := packages.ENTRY.match(line))]
    assert packages.missing(lock, set(names)) == ""


def test_a_change_in_the_image_is_found(packages):
    before = {"torch": "2.10.0a0+nv", "triton": "3.6", "numpy": "2.1"}
    assert packages.changed(before, before | {"flask": "3"}) == []
    after = {"torch": "2.13.0", "numpy": "2.1"}
    assert packages.changed(before, after) == [
        "torch: 2.10.0a0+nv became 2.13.0",
        "triton: 3.6 became nothing",
    ]


def test_what_is_missing_or_of_another_version_is_told(packages):
    present = packages.installed()
    root = "megatron-core[training]"
    assert packages.unmet(root, present, ()) == ([], [])
    fewer = {name: version for name, version in present.items() if name != "omegaconf"}
    lacking, _ = packages.unmet(root, fewer, ())
    assert lacking == ["megatron-core needs omegaconf, which is missing"]
    # A torch that NVIDIA built before the release counts as that release.
    assert packages.unmet(root, present | {"torch": "2.10.0a0+b558c98.nv25.11"}, {"torch"})[1] == []
    _, other = packages.unmet(root, present | {"torch": "2.5.0"}, {"torch"})
    assert "megatron-core needs torch>=2.6.0, the image has 2.5.0" in other


def test_the_scripts_are_bash_and_those_that_are_started_are_executable():
    scripts = [
        *(LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch", ROOT / "tests" / "launch" / "run.sh"),
        *(ROOT / "docker").glob("*.sh"),
    ]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
        assert script.suffix == ".sbatch" or script.stat().st_mode & 0o111
