"""What the launch tests share: a config file, the log of a run, and waiting with a limit."""

import os
import pathlib
import re
import sys
import time
from collections.abc import Callable

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TORCHRUN = ROOT / "examples" / "launch" / "torchrun.sh"
SBATCH = ROOT / "examples" / "launch" / "slurm.sbatch"

ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


def write_config(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """The small model of the launched tests as a YAML file, on two ranks."""
    sys.path.insert(0, str(ROOT / "tests" / "distributed"))
    from launching import TINY

    flags: dict[str, object] = {}
    name = ""
    for word in TINY:
        if word.startswith("--"):
            name = word.removeprefix("--")
            flags[name] = True
        else:
            flags[name] = word if "," in word else yaml.safe_load(word)
    flags |= {"expert-model-parallel-size": 2, "train-iters": 100_000, "save-interval": 40}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(flags | changes))
    return file


def losses(*logs: pathlib.Path) -> dict[int, str]:
    """Loss as printed, by iteration, of the last attempt in the logs (one rank prints it).

    For the second iteration after a start Megatron prints the mean with the first.
    """
    found: dict[int, str] = {}
    for log in logs:
        if log.exists():
            pattern = r"iteration +(\d+)/ *\d+ .*?lm loss: (\S+)"
            found |= {int(i): loss for i, loss in re.findall(pattern, log.read_text())}
    return found


def loaded(*logs: pathlib.Path) -> list[int]:
    """The iterations at which checkpoints were loaded."""
    text = "".join(log.read_text() for log in logs if log.exists())
    return [
        int(i) for i in re.findall(r"successfully loaded checkpoint .* at iteration (\d+)", text)
    ]


def reached(run: pathlib.Path) -> int:
    """The iteration of the last complete checkpoint, 0 if there is none."""
    file = run / "checkpoint" / "latest_checkpointed_iteration.txt"
    text = file.read_text().strip() if file.exists() else ""
    return int(text or 0)


def ranks(run: pathlib.Path) -> list[int]:
    """Process ids of the ranks that train into a folder, without torchrun and shells."""
    found = []
    for process in pathlib.Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().decode().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if words[1:4] == ["-u", "-m", "megatron_default_moe.pretrain"] and str(run) in str(
                words
            ):
                found.append(int(process.name))
    return found


def wait_for(
    what: str, condition: Callable[[], object], seconds: float, *logs: pathlib.Path
) -> None:
    """Wait until the condition holds; fail with the end of the logs if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            ends = "\n".join(log.read_text()[-3000:] for log in logs if log.exists())
            raise AssertionError(f"{what}: not within {seconds} s\n{ends}")
        time.sleep(0.2)
