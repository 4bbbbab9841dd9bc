"""Every command of ``default-moe``, in the order of its help. A new command is a row."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    module: str
    """Imported when the command is chosen; its ``main(argv)`` returns the exit code."""
    does: str
    """For the help: one line."""


COMMANDS = (
    Command(
        "pretrain",
        "megatron_default_moe.pretrain",
        "train in one process (on several GPUs: torchrun ... -m megatron_default_moe.pretrain)",
    ),
    Command(
        "plan",
        "megatron_default_moe.plan.command",
        "what a run will need of its GPUs, without any: memory, communication, time",
    ),
    Command(
        "doctor",
        "megatron_default_moe.machine.doctor",
        "what works on this machine, what is off and why, and what to do about it",
    ),
    Command(
        "preprocess",
        "megatron_default_moe.data.preprocess",
        "turn a JSONL file into Megatron's .bin/.idx training data",
    ),
    Command(
        "report",
        "megatron_default_moe.report.command",
        "metrics.csv and the plots, from a run's TensorBoard events; or several runs in one plot",
    ),
    Command(
        "inspect",
        "megatron_default_moe.inspection.command",
        "a checkpoint's routers and default vectors, by layer: a table and one page",
    ),
    Command(
        "compare",
        "megatron_default_moe.compare.command",
        "train arms over seeds and compare them in pairs, with intervals",
    ),
    Command(
        "calibrate",
        "megatron_default_moe.loop.calibrate",
        "give a trained TopK checkpoint its default vectors, without training",
    ),
    Command(
        "planted",
        "megatron_default_moe.planted.command",
        "compare the estimators on a task in which the router's gradient matters, in minutes",
    ),
)
