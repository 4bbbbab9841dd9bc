"""``default-moe inspect CHECKPOINT``: default vectors and routers, as a table and one page."""

import csv
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_default_moe import exits
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.flags import OneSentenceParser

_LOAD = "moe/load max/mean_layer_{}"


def run(argv: list[str]) -> None:
    """Inspect the checkpoint that the command line names.

    Args:
        argv: the command line, without the program's name.

    Raises:
        UserError: there is no such checkpoint, or it has no MoE layer.
    """
    parser = OneSentenceParser(
        prog="default-moe inspect",
        description="Write layers.csv and inspect.png of a checkpoint's routers and vectors:"
        " norms, cosines between experts, diversity by depth, updates, load; print the table.",
    )
    parser.add_argument("checkpoint", type=Path, help="what --save named, or one of its iter_*")
    parser.add_argument(
        "--ckpt-step", type=int, help="the step to read, default: the latest complete one"
    )
    parser.add_argument(
        "--output-dir", type=Path, help="for the two files, default: ./inspect-iter_NNNNNNN"
    )
    parser.add_argument(
        "--tensorboard-dir",
        type=Path,
        help="the run's events, for the load; default: what the run itself named, if it is there",
    )
    exits.add_flag(parser)
    args = parser.parse_args(argv)
    print(inspect(args.checkpoint, args.ckpt_step, args.output_dir, args.tensorboard_dir))


def inspect(
    checkpoint: Path, step: int | None, output_dir: Path | None, tensorboard_dir: Path | None
) -> str:
    """Write the files of one checkpoint and return the table.

    Args:
        checkpoint: what ``--save`` named, or one of its iterations.
        step: the iteration; None is the latest complete one.
        output_dir: None is a folder of the iteration's name in the current one.
        tensorboard_dir: None is the folder that the checkpoint's arguments name.

    Raises:
        UserError: there is no such checkpoint, it has no MoE layer, or events are asked for and
            not there.
    """
    from megatron_default_moe.checkpoint import on_disk, tensors
    from megatron_default_moe.inspection import picture, routers

    folder = tensors.complete_folder(checkpoint, step)
    found = routers.read_routers(folder)
    numbers = [routers.measures(router) for router in found]
    args = vars(on_disk.common_state(folder)["args"])
    iteration = int(re.sub(r"\D", "", folder.name) or 0)
    loads = _loads(tensorboard_dir, args.get("tensorboard_dir"), iteration)
    load = [loads.get(router.layer) for router in found]
    for one, value in zip(numbers, load, strict=True):
        one |= {} if value is None else {"load max/mean": value}

    output_dir = output_dir or Path(f"inspect-{folder.name}")
    output_dir.mkdir(parents=True, exist_ok=True)
    names = [router.name for router in found]
    _write_csv(names, numbers, output_dir / "layers.csv")
    title = f"{folder.name}: {len(found)} MoE layers of {len(found[0].weight_ED)} experts"
    picture.draw(found, numbers, load, title, output_dir / "inspect.png")
    return f"{title}\n{_table(names, numbers)}\nWritten: {output_dir}/layers.csv, inspect.png"


def _loads(asked: Path | None, named: str | None, iteration: int) -> dict[int, float]:
    """The last load logged up to the iteration, by layer; empty where nothing was logged."""
    from megatron_default_moe.report.scalars import read_scalars

    if asked is None and (named is None or not Path(named).is_dir()):
        return {}
    try:
        series = read_scalars(asked or Path(str(named))).series
    except UserError:
        if asked is not None:
            raise
        return {}
    pattern = re.compile(_LOAD.format(r"(\d+)"))
    found = {}
    for tag, values in series.items():
        until = [value for step, value in values.items() if step <= iteration]
        if (match := pattern.fullmatch(tag)) and until:
            found[int(match[1])] = until[-1]
    return found


def _columns(numbers: Sequence[dict[str, float]]) -> list[str]:
    """Every number that any layer has, in order."""
    return list(dict.fromkeys(name for one in numbers for name in one))


def _write_csv(names: Sequence[str], numbers: Sequence[dict[str, float]], path: Path) -> None:
    """Write a row per layer."""
    columns = _columns(numbers)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", *columns])
        for name, one in zip(names, numbers, strict=True):
            writer.writerow([name, *(f"{one[c]:.7g}" if c in one else "" for c in columns)])


def _table(names: Sequence[str], numbers: Sequence[dict[str, float]]) -> str:
    """The same for a person, columns as wide as they need."""
    columns = _columns(numbers)
    rows = [["layer", *columns]]
    for name, one in zip(names, numbers, strict=True):
        rows.append([name, *(_short(one.get(column)) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
    )


def _short(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exits.exit_code`."""
    return exits.exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
