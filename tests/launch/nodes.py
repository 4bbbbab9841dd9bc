"""torchrun.sh: one node, and two hosts made of network namespaces (root), with the loss of one.

Run by `make test-launch`; the name keeps it out of `make test`.
"""

import os
import pathlib
import shutil
import signal
import subprocess

import pytest
from running import ENVIRONMENT, TORCHRUN, loaded, losses, ranks, reached, wait_for, write_config

HOSTS = ("moe-test-1", "moe-test-2")
START = 120.0
"""Seconds until the first step, on a busy machine."""


class Process:
    """A started launcher, its log, and its end."""

    def __init__(self, command: list[str], log: pathlib.Path, **environment: str) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                env=ENVIRONMENT | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end:\n{self.log.read_text()[-3000:]}") from None


@pytest.fixture
def one_node(tmp_path):
    """Start torchrun.sh on this host with two ranks."""
    started = []

    def start(name, config, **environment):
        environment |= {"PROCESSES_PER_NODE": "2", "RUN_DIR": str(tmp_path / "run")}
        process = Process([str(TORCHRUN), str(config)], tmp_path / f"{name}.log", **environment)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.process.poll() is None:
            os.killpg(process.process.pid, signal.SIGKILL)
    for pid in ranks(tmp_path / "run"):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_one_node_replaces_a_lost_rank_and_goes_on_from_the_checkpoint(one_node, tmp_path):
    run = tmp_path / "run"
    launched = one_node("first", write_config(tmp_path, **{"train-iters": 200}))
    wait_for("a checkpoint", lambda: reached(run) >= 40, START, launched.log)
    wait_for("steps after it", lambda: max(losses(launched.log)) > 45, START, launched.log)
    before = losses(launched.log)
    os.kill(ranks(run)[0], signal.SIGKILL)
    assert launched.wait(START + 60) == 0
    assert reached(run) == 200
    (resumed_at,) = loaded(launched.log)
    assert resumed_at >= 40
    again = [i for i in before if i > resumed_at and i != resumed_at + 2]  # see `losses`
    after = losses(launched.log)
    assert sorted(after)[-1] == 200
    # The log holds both attempts; the later one won in `after`.
    assert {i: before[i] for i in again} == {i: after[i] for i in again}


@pytest.mark.timeout(600)
def test_sigusr1_to_everything_ends_a_run_with_a_checkpoint(one_node, tmp_path):
    run = tmp_path / "run"
    launched = one_node("first", write_config(tmp_path, **{"save-interval": 100_000}))
    wait_for("steps", lambda: losses(launched.log), START, launched.log)
    assert reached(run) == 0
    for pid in ranks(run):
        os.kill(pid, signal.SIGUSR1)
    os.killpg(launched.process.pid, signal.SIGUSR1)
    assert launched.wait(60) == 0
    assert reached(run) == max(losses(launched.log))


def test_mistakes_are_one_sentence(tmp_path):
    def run(*arguments, **environment):
        command = [str(TORCHRUN), *arguments]
        done = subprocess.run(
            command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=30
        )
        assert done.stdout == ""
        return done.returncode, done.stderr

    config = str(write_config(tmp_path))
    assert run()[0] == 2
    assert run("nowhere.yaml") == (
        2,
        "error: nowhere.yaml cannot be read: the first argument is a YAML file of flags\n",
    )
    code, message = run(config, NODES="2")
    assert (code, message.count("\n")) == (2, 1)
    assert "HEAD is empty" in message


def ip(*arguments, check=True):
    subprocess.run(["ip", *arguments], check=check, timeout=30, capture_output=not check)


def names(host):
    """The folder whose files `ip netns exec` shows a namespace as its own /etc."""
    return pathlib.Path("/etc/netns") / host


def kill_host(host):
    """Kill -9 every process of a host, as a power failure does."""
    pids = subprocess.run(
        ["ip", "netns", "pids", host], capture_output=True, text=True, timeout=30
    ).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    return len(pids)


def remove_hosts():
    for host in HOSTS:
        kill_host(host)
        ip("netns", "del", host, check=False)
        shutil.rmtree(names(host), ignore_errors=True)


@pytest.fixture
def on_host(tmp_path):
    """Start torchrun.sh on one of two hosts: own network, own name, one cable, shared files."""
    remove_hosts()
    table = "127.0.0.1 localhost\n"
    table += "".join(f"10.231.7.{i} {host}\n" for i, host in enumerate(HOSTS, 1))
    first, second = HOSTS
    for host in HOSTS:
        ip("netns", "add", host)
        names(host).mkdir(parents=True, exist_ok=True)
        (names(host) / "hosts").write_text(table)
    ip(*f"link add cable netns {first} type veth peer name cable netns {second}".split())
    for i, host in enumerate(HOSTS, 1):
        ip("-n", host, *f"addr add 10.231.7.{i}/24 dev cable".split())
        ip("-n", host, *"link set cable up".split())
        ip("-n", host, *"link set lo up".split())

    def start(host, name, config):
        inside = 'hostname "$0" && exec "$@"'
        command = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", inside, host]
        return Process(
            [*command, str(TORCHRUN), str(config)],
            tmp_path / f"{name}.log",
            NODES="2",
            HEAD=first,
            PROCESSES_PER_NODE="1",
            RUN_DIR=str(tmp_path / "run"),
        )

    yield start
    remove_hosts()


@pytest.mark.timeout(900)
def test_a_lost_node_comes_back_and_both_resume(on_host, tmp_path):
    run, config = tmp_path / "run", write_config(tmp_path)
    head = on_host(HOSTS[0], "head", config)
    lost = on_host(HOSTS[1], "lost", config)
    logs = (head.log, lost.log)
    wait_for("a checkpoint", lambda: reached(run) >= 40, START, *logs)
    wait_for("steps after it", lambda: max(losses(*logs)) > 45, START, *logs)

    assert kill_host(HOSTS[1]) >= 2  # torchrun and its rank
    assert lost.wait(30) == -signal.SIGKILL
    before = losses(*logs)
    marks = {log: len(log.read_text()) for log in logs}
    back = on_host(HOSTS[1], "back", config)

    rest = tmp_path / "rest.log"

    def after():
        rest.write_text(head.log.read_text()[marks[head.log] :] + back.log.read_text())
        return losses(rest)

    wait_for("the resumed run", lambda: len(after()) > 20, START + 60, head.log, back.log)
    (resumed_at,) = loaded(rest)
    assert resumed_at >= 40
    again = [i for i in before if i in after() and i != resumed_at + 2]  # see `losses`
    assert len(again) >= 3
    assert min(after()) == resumed_at + 1
    assert {i: before[i] for i in again} == {i: after()[i] for i in again}

    # A signal to one node ends the run on both, with a checkpoint.
    for pid in subprocess.run(
        ["ip", "netns", "pids", HOSTS[1]], capture_output=True, text=True, timeout=30
    ).stdout.split():
        os.kill(int(pid), signal.SIGUSR1)
    assert (head.wait(60), back.wait(60)) == (0, 0)
    assert reached(run) == max(after())
