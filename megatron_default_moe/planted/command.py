"""``default-moe planted``: the estimators on a task in which the router's gradient matters."""

import argparse
import pathlib
import sys
import time
from typing import TYPE_CHECKING

from megatron_default_moe import exits
from megatron_default_moe.errors import UserError
from megatron_default_moe.options.flags import OneSentenceParser

if TYPE_CHECKING:
    from megatron_default_moe.options.config import RouterGradientConfig
    from megatron_default_moe.planted.settings import Setting
    from megatron_default_moe.planted.store import Results


def run(argv: list[str]) -> None:
    """Train what is missing of the study that the flags ask for, and compare.

    Args:
        argv: the command line, without the program's name.

    Raises:
        UserError: a mistake in the flags, or a folder of another study.
    """
    from megatron_default_moe.planted.named import ARMS, SHOWN
    from megatron_default_moe.planted.settings import SETTINGS

    parser = OneSentenceParser(
        prog="default-moe planted",
        description="Train small mixtures on a teacher mixture with a hidden partition of the"
        " tokens, one with each estimator of the router's gradient, and compare them seed by seed.",
        epilog="What was trained is not trained again: a folder takes more arms and settings.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--settings", nargs="+", default=["cells"], metavar="SETTING",
        help=f"of the task and the students (cells); all, or some of: {', '.join(SETTINGS)}",
    )  # fmt: skip
    parser.add_argument(
        "--arms", nargs="+", default=list(SHOWN), choices=ARMS, metavar="ARM",
        help=f"what is compared ({' '.join(SHOWN)}); some of: {', '.join(ARMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--arm", action="append", default=[], metavar='"NAME: FLAGS"',
        help="one more arm, of the flags that training has for the router's gradient",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=8, help="how many (8)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--steps", type=int, help="of a training (1000)")
    parser.add_argument(
        "--no-fidelity", action="store_true",
        help="do not compare the router's gradients with the dense mixture's",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/planted"),
        help="folder for results.csv, planted.md, planted.png and a JSON file for each setting"
        " (runs/planted)",
    )  # fmt: skip
    exits.add_flag(parser)
    _study(parser.parse_args(argv))


def _study(args: argparse.Namespace) -> None:
    from megatron_default_moe.planted import report, store

    settings, arms = _settings(args), _arms(args)
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    files = {name: args.out / f"{name}.json" for name in settings}
    # All of them before the first training: a mistake is found at once.
    studies = {name: store.read(files[name], settings[name], seeds, arms) for name in settings}
    pages = []
    for name, results in studies.items():
        _complete(name, results, _fitting(name, results.setting, arms), files[name], args)
        names = [one for one in arms if one in results.outcomes]
        page = f"{name}, {len(seeds)} seeds\n\n{report.table(results, names)}\n"
        print(page, flush=True)
        pages.append(f"## {page}")
    print(report.legend(results))
    (args.out / "planted.md").write_text("\n".join([*pages, report.legend(results), ""]))
    report.write_csv(args.out / "results.csv", studies)
    report.draw(args.out / "planted.png", studies, list(arms))
    print(f"{args.out}/planted.md, results.csv, planted.png")


def _settings(args: argparse.Namespace) -> dict[str, "Setting"]:
    """The settings that were asked for.

    Raises:
        UserError: one is not known, or a number is too small.
    """
    import dataclasses

    from megatron_default_moe.planted.settings import SETTINGS
    from megatron_default_moe.planted.training import EVERY

    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {args.seeds}")
    if args.first_seed < 0:
        raise UserError(f"--first-seed must be at least 0, not {args.first_seed}")
    if args.steps is not None and args.steps < EVERY:
        raise UserError(f"--steps must be at least {EVERY}, not {args.steps}")
    names = list(SETTINGS) if args.settings == ["all"] else args.settings
    for name in names:
        if name not in SETTINGS:
            raise UserError(
                f"--settings {name} is not known: it is all, or some of {', '.join(SETTINGS)}"
            )
    changed = {} if args.steps is None else {"steps": args.steps}
    return {name: dataclasses.replace(SETTINGS[name], **changed) for name in names}


def _arms(args: argparse.Namespace) -> dict[str, "RouterGradientConfig"]:
    """The arms; TopK always is one, and the first."""
    from megatron_default_moe.planted import named, report

    names = dict.fromkeys([report.BASELINE, *args.arms])
    arms = {name: named.ARMS[name] for name in names}
    for text in args.arm:
        name, options = named.parse(text)
        if name in named.ARMS or name in arms:
            raise UserError(f"--arm {name} is the name of another arm: take another name")
        arms[name] = options
    return arms


def _fitting(
    name: str, setting: "Setting", arms: dict[str, "RouterGradientConfig"]
) -> dict[str, "RouterGradientConfig"]:
    """The arms that a setting can have; the others are said."""
    from megatron_default_moe.planted import named

    fitting = {}
    for arm, options in arms.items():
        reason = named.why_not(options, setting)
        if reason is None:
            fitting[arm] = options
        else:
            print(f"{name} without {arm}: {reason}", file=sys.stderr)
    return fitting


def _complete(
    name: str,
    results: "Results",
    arms: dict[str, "RouterGradientConfig"],
    file: pathlib.Path,
    args: argparse.Namespace,
) -> None:
    """Train what is missing of a setting, and keep it."""
    from megatron_default_moe.planted import fidelity, store, training

    setting, seeds, missing = results.setting, results.seeds, results.missing(arms)
    if missing:
        begun = time.monotonic()

        def progress(step: int) -> None:
            left = (time.monotonic() - begun) / step * (setting.steps - step)
            line = f"\r{name}: {len(missing)} arms, step {step}/{setting.steps}, {left:.0f} s left "
            print(line, end="", file=sys.stderr, flush=True)

        results.outcomes |= training.train(setting, missing, seeds, progress)
        results.options |= {arm: store.flags(one) for arm, one in missing.items()}
        print(file=sys.stderr)
        store.write(file, results)
    unprobed = {arm: one for arm, one in arms.items() if arm not in results.fidelity}
    if not args.no_fidelity and fidelity.comparable(unprobed):
        results.probed = [max(1, round(share * setting.steps)) for share in fidelity.SHARES]
        print(f"{name}: gradients", file=sys.stderr)
        results.fidelity |= fidelity.measure(setting, unprobed, seeds, results.probed)
        store.write(file, results)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see :func:`exits.exit_code`."""
    return exits.exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
