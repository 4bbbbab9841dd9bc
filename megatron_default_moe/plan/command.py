"""``default-moe plan CONFIG --gpus N --gpu KIND``: print a plan, or what stands in its way."""

import argparse
import os
import sys

from megatron_default_moe import exits
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.flags import OneSentenceParser
from megatron_default_moe.plan.cards import CARDS


def run(argv: list[str]) -> None:
    """Print the plan that the flags ask for.

    Args:
        argv: the command line, without the program's name.

    Raises:
        UserError: what stands in the way of such a run.
    """
    parser = OneSentenceParser(
        prog="default-moe plan",
        description="Say what a training run will need of its GPUs, without any: memory,"
        " communication, time.",
        epilog="All other flags are Megatron's and this package's, and win over the file.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config",
        help="a YAML file of flags, as for training with --config; or the name of an example",
    )
    parser.add_argument("--gpus", type=int, required=True, help="how many GPUs")
    parser.add_argument("--gpu", choices=CARDS, required=True, help="which GPU, 8 to a host")
    exits.add_flag(parser)
    args, flags = parser.parse_known_args(argv)
    print(_plan(args, flags))


def _plan(args: argparse.Namespace, flags: list[str]) -> str:
    if args.gpus < 1:
        raise UserError(f"--gpus must be at least 1, not {args.gpus}")
    # Planning is done on the CPU also where there is a GPU: hide it before anything asks for it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_default_moe.cpu import runtime
    from megatron_default_moe.loop.command_line import quiet_expected_warnings

    quiet_expected_warnings()
    runtime.install()
    from megatron_default_moe.plan import page, planner

    plan = planner.make(["--config", args.config, *flags], args.gpus, CARDS[args.gpu])
    return page.text(plan)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exits.exit_code`."""
    return exits.exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
