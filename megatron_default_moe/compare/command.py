"""``default-moe compare STUDY.yaml``: arms over seeds, paired, with intervals."""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

from megatron_default_moe import exits
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.flags import OneSentenceParser

if TYPE_CHECKING:
    from megatron_default_moe.compare.results import Result
    from megatron_default_moe.compare.study import Study


def run(argv: list[str]) -> int:
    """Run the study that the flags name; 1 where a run failed, the others having gone on.

    Args:
        argv: the command line, without the program's name.

    Raises:
        UserError: a mistake in the flags or in the study's file.
    """
    parser = OneSentenceParser(
        prog="default-moe compare",
        description="Train every arm of a study with every seed, and compare them in pairs.",
        epilog="Started again, it goes on where it stopped, and repeats no finished run.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=pathlib.Path, help="a YAML file (docs/compare.md)")
    parser.add_argument("--out", type=pathlib.Path, help="default: runs/NAME of the study's file")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, default: 1")
    parser.add_argument(
        "--report", action="store_true", help="train nothing, compare what is finished"
    )
    parser.add_argument(
        "--slurm", action="store_true", help="train nothing, write a job array: a task a run"
    )
    parser.add_argument("--run", type=int, help="train this run alone, counted from 0; for --slurm")
    exits.add_flag(parser)
    return _compare(parser.parse_args(argv))


def _compare(args: argparse.Namespace) -> int:
    from megatron_default_moe.compare import checks, runs, study

    if args.parallel < 1:
        raise UserError(f"--parallel must be at least 1, not {args.parallel}")
    chosen = [flag for flag in ("report", "slurm") if getattr(args, flag)]
    chosen += ["run"] if args.run is not None else []
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} are two commands: give one of them")
    found = study.read(args.study)
    out = args.out or pathlib.Path("runs") / args.study.stem
    planned = runs.runs_of(found, out)
    if args.run is not None and not 0 <= args.run < len(planned):
        raise UserError(f"--run must be from 0 to {len(planned) - 1}, not {args.run}")
    asked = planned if args.run is None else planned[args.run : args.run + 1]
    if not args.report and not all(run.done for run in asked):
        checks.check(found, here=not args.slurm)
        runs.prepare(found, out, _say)
    if args.slurm:
        from megatron_default_moe.compare import slurm

        file = slurm.write(args.study, out, len(planned), args.parallel, found.ranks)
        print(f"Written: submit it with sbatch {file}")
        return 0
    failed = {} if args.report else runs.run_all(asked, args.parallel, _say)
    for name, reason in failed.items():
        print(f"FAILED: {name}: {reason}", file=sys.stderr)
    if args.run is None:
        measured = [run.result() for run in planned if run.done]
        if measured:
            _report(found, measured, failed, out)
        elif not failed:
            raise UserError(
                f"no run below {out} is finished: without --report, the runs are trained"
            )
    return 1 if failed else 0


def _report(
    found: "Study", measured: "list[Result]", failed: dict[str, str], out: pathlib.Path
) -> None:
    from megatron_default_moe.compare import page, results

    table = results.rows(list(found.arms), found.baseline, measured)
    results.write_table(table, found.seeds, out / "table.csv")
    results.write_metrics(measured, out / "metrics.csv")
    print(f"\n{results.text(table)}\n\nDifferences are to {found.baseline}, in pairs of a seed.")
    page.write(found, table, failed, out / "report.html")
    print(f"Written to {out}: report.html, table.csv, metrics.csv")


def _say(line: str) -> None:
    print(f"> {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exits.exit_code`."""
    return exits.exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
