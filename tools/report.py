"""Write metrics.csv, loss.png and experts.png from a run's TensorBoard events.

python tools/report.py runs/quickstart
"""

import argparse
import sys
from pathlib import Path

from megatron_default_moe.errors import UserError
from megatron_default_moe.report.report import summary, write_report


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="the run's folder; files are written here")
    parser.add_argument(
        "--tensorboard-dir", type=Path, help="the run's events, default: RUN_DIR/tensorboard"
    )
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        help="global batch size times sequence length, for runs that did not log tokens",
    )
    args = parser.parse_args()
    try:
        write_report(
            args.run_dir,
            tensorboard_dir=args.tensorboard_dir,
            tokens_per_step=args.tokens_per_step,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(args.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
