"""``default-moe report RUN_DIR``: metrics.csv, loss.png and experts.png of a run."""

import argparse
import sys
from pathlib import Path

from megatron_default_moe import errors
from megatron_default_moe.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="default-moe report",
        description="Write metrics.csv, loss.png and experts.png from a run's TensorBoard events.",
    )
    parser.add_argument("run_dir", type=Path, help="the run's folder; files are written here")
    parser.add_argument(
        "--tensorboard-dir", type=Path, help="the run's events, default: RUN_DIR/tensorboard"
    )
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        help="global batch size times sequence length, for runs that did not log tokens",
    )
    args = parser.parse_args(argv)
    from megatron_default_moe.report.report import summary, write_report

    try:
        write_report(
            args.run_dir,
            tensorboard_dir=args.tensorboard_dir,
            tokens_per_step=args.tokens_per_step,
        )
    except UserError as error:
        return errors.report(error)
    print(summary(args.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
