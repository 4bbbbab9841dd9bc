"""``default-moe report RUN_DIR``: metrics.csv, loss.png and experts.png of a run.

``default-moe report RUN_DIR RUN_DIR ...`` draws several runs over one another.
"""

import argparse
import sys
from pathlib import Path

from megatron_default_moe import exits
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.flags import OneSentenceParser


def run(argv: list[str]) -> None:
    """Write the report that the flags ask for, and print its summary.

    Args:
        argv: the command line, without the program's name.

    Raises:
        UserError: there is nothing to report.
    """
    parser = OneSentenceParser(
        prog="default-moe report",
        description="Write metrics.csv, loss.png and experts.png from a run's TensorBoard events;"
        " of several runs, loss.png, router.png and layers.png with a line for each.",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="+",
        help="the run's folder, where files are written; or several runs' folders",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="for the files of several runs, default: ./report-of-N-runs",
    )
    parser.add_argument(
        "--tensorboard-dir", type=Path, help="the run's events, default: RUN_DIR/tensorboard"
    )
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        help="global batch size times sequence length, for runs that did not log tokens",
    )
    exits.add_flag(parser)
    args = parser.parse_args(argv)
    print(_report(args) if len(args.run_dir) == 1 else _overlay(args))


def _report(args: argparse.Namespace) -> str:
    from megatron_default_moe.report.report import summary, write_report

    (run_dir,) = args.run_dir
    if args.output_dir is not None:
        raise UserError("--output-dir is for several runs: one run's files go into its own folder")
    write_report(
        run_dir, tensorboard_dir=args.tensorboard_dir, tokens_per_step=args.tokens_per_step
    )
    return summary(run_dir)


def _overlay(args: argparse.Namespace) -> str:
    from megatron_default_moe.report import overlay

    if args.tensorboard_dir is not None:
        raise UserError("--tensorboard-dir is for one run: name each run's folder, or its events'")
    folder = args.output_dir or Path(f"report-of-{len(args.run_dir)}-runs")
    return overlay.write(args.run_dir, folder, args.tokens_per_step)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exits.exit_code`."""
    return exits.exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
