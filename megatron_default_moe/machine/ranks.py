"""One of several ranks: what a launcher says of this process, and which device it should have.

Three ways in which a run of many processes becomes another one without a word: a launcher that
started them gave no ranks, and each takes itself for the only one; a GPU is there and its driver is
broken, and a run on the CPU begins; some ranks have a GPU and others have none. Each is refused.
"""

import contextlib
import datetime
import shutil
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from megatron_default_moe.errors import UserError

TASKS = (
    # A step's own number first: the steps of one job may differ.
    ("SLURM", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_SIZE",)),
    ("MPI", "PMI_SIZE", ("PMI_SIZE",)),
    ("MVAPICH2", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_SIZE",)),
    ("Flux", "FLUX_JOB_SIZE", ("FLUX_JOB_SIZE",)),
    ("IBM's jsrun", "JSM_NAMESPACE_SIZE", ("JSM_NAMESPACE_SIZE",)),
)
"""Launchers, the variable that only their tasks have, and where the number of tasks is."""

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PLACE = ("MASTER_ADDR", "MASTER_PORT")
"""What torchrun gives each rank, and what a run of several cannot do without: which rank it is,
and where they meet."""

_WAY_OUT = (
    "start them with torchrun (examples/launch has it for SLURM, Kubernetes and by hand), or export"
    " RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each"
)


def one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher made this process a rank; if not, it is a run of its own.

    Raises:
        UserError: it is one of several tasks and nobody said which rank it is, or only a part of
            that.
    """
    if "RANK" not in environment:
        for launcher, mark, counts in TASKS:
            count = next((environment[name] for name in counts if name in environment), "1")
            if mark in environment and count.isdigit() and int(count) > 1:
                raise UserError(
                    f"this is one of {count} tasks of {launcher}, and RANK is not set: each would"
                    f" train a model of its own and write the same --save; {_WAY_OUT} (RANK=0"
                    " WORLD_SIZE=1 makes it a run of its own)"
                )
    if environment.get("RANK", "0") == "0" and environment.get("WORLD_SIZE", "1") == "1":
        return False
    _refuse_missing(environment, NUMBERS)
    numbers = [environment[name] for name in NUMBERS]
    if not all(number.isdigit() for number in numbers) or int(numbers[0]) >= int(numbers[1]):
        given = ", ".join(f"{name}={environment[name]}" for name in NUMBERS)
        raise UserError(f"{given} is no rank of a run (RANK counts from 0): {_WAY_OUT}")
    return True


def refuse_no_meeting_place(environment: Mapping[str, str]) -> None:
    """Refuse ranks that nobody told where to meet.

    Raises:
        UserError: with the variable.
    """
    _refuse_missing(environment, PLACE)


def _refuse_missing(environment: Mapping[str, str], names: Sequence[str]) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        given = {name: environment[name] for name in NUMBERS if environment.get(name)}
        text = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{text} is set and {', '.join(missing)} is not: {_WAY_OUT}")


def prepare(environment: MutableMapping[str, str]) -> None:
    """Make this process a rank: the one it was started as, or the only one of its run.

    Args:
        environment: of this process; completed (the system chooses the port).

    Raises:
        UserError: see `one_of_several`.
    """
    if one_of_several(environment):
        return
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # A launcher of one rank has told it where its store is.
    told = {name: environment[name] for name in alone if environment.get(name)}
    environment.update(alone | told if "RANK" in environment else alone)


def refuse_broken_gpu(environment: Mapping[str, str], devices: Path = Path("/dev")) -> None:
    """Refuse to train on the CPU where a GPU should be; called if torch can use none.

    Args:
        environment: of this process; ``CUDA_VISIBLE_DEVICES`` set to nothing chooses the CPU.
        devices: where the kernel lists its devices.

    Raises:
        UserError: with what says that a GPU is there, and why torch cannot use it.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "none", "NoDevFiles"):
        return
    sign = _sign_of_a_gpu(visible, environment, devices)
    if sign:
        raise UserError(
            f"a GPU should be here ({sign}) and torch cannot use it ({_why_not()}): default-moe"
            " doctor says what to do about it; to train on the CPU, set CUDA_VISIBLE_DEVICES="
            " (to nothing)"
        )


def _sign_of_a_gpu(visible: str | None, environment: Mapping[str, str], devices: Path) -> str:
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible}"
    for file in sorted(devices.glob("nvidia[0-9]*")):
        return str(file)
    # With the driver's kernel module gone, its programs are still there.
    return shutil.which("nvidia-smi", path=environment.get("PATH")) or ""


def _why_not() -> str:
    """The first sentence of what torch says."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # AssertionError of a build without CUDA, RuntimeError of the driver
        return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
    return "it finds none"


def agree_on_device(store: Any, rank: int, ranks: int, on_cpu: bool) -> None:
    """Make sure that all ranks have the same kind of device, before they build process groups.

    Two messages a rank, over the store they meet at: rank 0 reads all, and tells all.

    Args:
        store: a ``torch.distributed`` store that all ranks share.
        rank: this one's number.
        ranks: how many there are.
        on_cpu: whether this one runs on the CPU.

    Raises:
        UserError: they differ; on every rank, with one of each kind.
    """
    # Not by the number of the restart, which nodes may count differently: what an attempt before
    # left says the same.
    at = "megatron_default_moe/device"
    store.set(f"{at}/{rank}", f"{'the CPU' if on_cpu else 'a GPU'} ({socket.gethostname()})")
    if rank == 0:
        said = [value.decode() for value in store.multi_get([f"{at}/{n}" for n in range(ranks)])]
        kinds = {one.split(" (")[0]: number for number, one in reversed(list(enumerate(said)))}
        differ = [f"rank {number} has {said[number]}" for number in sorted(kinds.values())]
        store.set(f"{at}/verdict", " and ".join(differ) if len(differ) > 1 else "")
    verdict = store.get(f"{at}/verdict").decode()
    if verdict:
        # The store may end with rank 0, which therefore leaves last.
        if rank:
            store.set(f"{at}/heard/{rank}", "")
        else:
            with contextlib.suppress(RuntimeError):
                heard = [f"{at}/heard/{number}" for number in range(1, ranks)]
                store.wait(heard, datetime.timedelta(seconds=10))
        raise UserError(
            f"{verdict}: the ranks of a run need the same kind of device; default-moe doctor on"
            " each node says what is off, and CUDA_VISIBLE_DEVICES= (to nothing) on all of them"
            " trains on the CPU"
        )
