"""slurm.sbatch on a real SLURM: munge, a controller and two nodes, all on this machine (root).

Run by `make test-launch`; the name keeps it out of `make test`. Not run: a container. pyxis, the
srun plugin behind --container-image, is not in Debian; srun's refusal of the flag shows it arrived.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from running import ENVIRONMENT, SBATCH, loaded, losses, ranks, reached, wait_for, write_config

NODES = ("n1", "n2")
START = 150.0
"""Seconds from submission to the first step, on a busy machine."""

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# The expiry is how long a job that was queued again waits before it starts (120 s by default). It
# must be longer than KillWait (and 5 s), after which the nodes end what is left of the first start.
AuthInfo=socket={folder}/munge.socket,cred_expire=12
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
KillWait=3
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeHostname={host} Port={ports[1]} CPUs={cpus} Gres=gpu:1
NodeName=n2 NodeHostname={host} Port={ports[2]} CPUs={cpus} Gres=gpu:1
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# A device file that is always there stands for the GPU of a node, which nothing here opens.
DEVICES = "NodeName=n[1-2] Name=gpu File=/dev/null\n"


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Start munge, the controller and two nodes; return the folder with their logs."""
    folder = tmp_path_factory.mktemp("slurm")
    host = run("hostname", "-s")
    text = CONFIG.format(folder=folder, host=host, ports=free_ports(3), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(DEVICES)
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    os.environ["SLURM_CONF"] = ENVIRONMENT["SLURM_CONF"] = str(folder / "slurm.conf")
    files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
    places = [f"--{name}-file={folder}/munge.{end}" for name, end in files.items()]
    places[1] = f"--socket={folder}/munge.socket"
    try:
        run("munged", "--force", *places)
        run("slurmctld", "-i")
        for node in NODES:
            run("slurmd", "-N", node)
        wait_for("idle nodes", lambda: run("sinfo", "-h", "-o", "%T %D") == "idle 2", 60)
        yield folder
    finally:
        if shutil.which("scancel"):
            subprocess.run(["scancel", "--user=root"], timeout=30, check=False)
            wait_for("an empty queue", lambda: not run("squeue", "-h"), 60)
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munge"):
            file = folder / f"{name}.pid"
            if file.exists():
                os.kill(int(file.read_text()), signal.SIGTERM)


class Job:
    """A submitted job: its number, its log and its state."""

    def __init__(self, folder: pathlib.Path, *flags: str, config: str, **environment: str) -> None:
        self.run = folder / "run"
        self.log = folder / "job.log"
        self.number = run(
            *("sbatch", "--parsable", "--gpus-per-node=1", f"--output={self.log}", *flags),
            *(str(SBATCH), config),
            env=ENVIRONMENT | {"RUN_DIR": str(self.run)} | environment,
            cwd=SBATCH.parent.parent.parent,
        )

    def shown(self, field: str) -> str:
        text = run("scontrol", "show", "job", self.number)
        return re.search(rf"\b{field}=(\S*)", text).group(1)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, what, condition, seconds=START):
        wait_for(what, condition, seconds, self.log)

    def ends(self, seconds: float = 60) -> str:
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait("the end", lambda: self.shown("JobState") in final, seconds)
        return self.shown("JobState")


@pytest.mark.timeout(900)
def test_the_time_limit_makes_a_checkpoint_and_the_job_goes_on_after_it(slurm, tmp_path):
    # SLURM counts in minutes: the signal comes one to two minutes after the start.
    flags = ("--time=3", "--signal=B:USR1@60")
    config = write_config(tmp_path, **{"save-interval": 1_000_000})
    job = Job(tmp_path, *flags, config=str(config))
    job.wait("the limit", lambda: "the time limit is near" in job.text(), 240)
    saved = reached(job.run)
    assert f"queued again; the checkpoint is at {saved}\n" in job.text()
    assert saved == max(losses(job.log)) > 0
    assert "--container" not in job.text()

    job.wait("the resumed run", lambda: loaded(job.log) == [saved])
    job.wait("steps after it", lambda: max(losses(job.log)) > saved + 5)
    assert f"> start 1, checkpoint at {saved}: srun" in job.text()
    assert job.shown("Restarts") == "1"
    # The same signal from a person: checkpoint, and the end.
    run("scancel", "--signal=USR1", job.number)
    assert job.ends() == "COMPLETED"
    assert reached(job.run) == max(losses(job.log)) > saved
    assert job.text().count("queued again") == 1


@pytest.mark.timeout(900)
def test_a_failed_job_is_queued_again_only_if_it_got_further(slurm, tmp_path):
    config = str(write_config(tmp_path, **{"save-interval": 300}))
    job = Job(tmp_path, config=config, MAX_RESTARTS="0")
    job.wait("a checkpoint", lambda: reached(job.run) == 300, 2 * START)
    os.kill(ranks(job.run)[0], signal.SIGKILL)
    job.wait("the queue", lambda: "queued again" in job.text())
    assert re.search(
        r"failed with exit code \d+: queued again; the checkpoint is at 300\n", job.text()
    )

    # Lost again before the next checkpoint: no use in repeating it.
    job.wait("the resumed run", lambda: loaded(job.log) == [300])
    os.kill(ranks(job.run)[0], signal.SIGKILL)
    assert job.ends(START) == "FAILED"
    assert "before a new checkpoint; not queued again" in job.text()
    assert reached(job.run) == 300


@pytest.mark.timeout(300)
def test_a_mistake_is_not_queued_again(slurm, tmp_path):
    job = Job(tmp_path, config=str(tmp_path / "nowhere.yaml"))
    assert job.ends(90) == "FAILED"
    assert "nowhere.yaml cannot be read" in job.text()
    assert "before a new checkpoint; not queued again" in job.text()


@pytest.mark.timeout(300)
def test_the_container_line_reaches_srun(slurm, tmp_path):
    config = str(write_config(tmp_path))
    job = Job(tmp_path, config=config, CONTAINER_IMAGE="image.sqsh", CONTAINER_MOUNTS="/a:/b")
    assert job.ends(90) == "FAILED"
    composed = next(line for line in job.text().splitlines() if line.startswith("> start 0"))
    assert " --container-image=image.sqsh --container-mounts=/a:/b " in composed
    assert "unrecognized option '--container-image=image.sqsh'" in job.text()
    assert "not queued again" in job.text()


@pytest.mark.timeout(300)
def test_a_study_is_an_array_of_its_runs(slurm, tmp_path):
    import studies

    file, out = tmp_path / "study.yaml", tmp_path / "out"
    arms = {"topk": "moe-router-gradient: topk", "dense": "moe-router-gradient: dense"}
    studies.write(file, arms, seeds="[1]")
    command = [sys.executable, "-m", "megatron_default_moe", "compare", str(file), "--out", out]
    run(*command, "--slurm", "--parallel", "2", env=ENVIRONMENT, cwd=tmp_path)
    # The GPUs of these nodes are none: a run that is given one says so, and trains on nothing else.
    submit = ("sbatch", "--parsable", "--gpus-per-node=0", str(out / "study.sbatch"))
    number = run(*submit, env=ENVIRONMENT, cwd=tmp_path)
    done = [out / "runs" / arm / "seed-1" / "done.json" for arm in arms]
    logs = [out / f"slurm-run-{task}.log" for task in range(2)]
    wait_for("both runs", lambda: all(mark.is_file() for mark in done), START, *logs)
    wait_for("the end", lambda: not run("squeue", "-h", "--job", number), 60, *logs)
    run(*command, "--report", env=ENVIRONMENT, cwd=tmp_path)
    assert [row.split(",")[1] for row in (out / "table.csv").read_text().split()[-2:]] == ["1"] * 2
    for log in logs:
        assert "1 runs, 0 of them finished before" in log.read_text()
