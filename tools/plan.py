"""Say what a training run will need of its GPUs, without any: memory, communication, time.

python tools/plan.py examples/7.33b-8c1.yaml --gpus 64 --gpu h100 [Megatron flags]
"""

import argparse
import os
import sys


def main() -> int:
    """Run the command line."""
    # Planning is done on the CPU also where there is a GPU: hide it before anything asks for it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_default_moe.cpu import runtime
    from megatron_default_moe.errors import UserError
    from megatron_default_moe.plan.cards import CARDS
    from megatron_default_moe.pretrain import quiet_expected_warnings

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other flags are Megatron's and this package's, and win over the file.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="a YAML file of flags, as for training with --config")
    parser.add_argument("--gpus", type=int, required=True, help="how many GPUs")
    parser.add_argument("--gpu", choices=CARDS, required=True, help="which GPU, 8 to a host")
    args, flags = parser.parse_known_args()
    try:
        if args.gpus < 1:
            raise UserError(f"--gpus must be at least 1, not {args.gpus}")
        quiet_expected_warnings()
        runtime.install()
        from megatron_default_moe.plan import page, planner

        plan = planner.make(["--config", args.config, *flags], args.gpus, CARDS[args.gpu])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page.text(plan))
    return 0


if __name__ == "__main__":
    sys.exit(main())
