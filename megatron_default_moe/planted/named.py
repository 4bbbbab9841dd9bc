"""The arms of the study by name, and arms made of flags."""

import argparse
import shlex

from megatron_default_moe.errors import UserError
from megatron_default_moe.options.config import RouterGradientConfig as Options
from megatron_default_moe.planted.settings import Setting

ARMS = {
    "topk": Options(gradient="topk"),
    "dense": Options(gradient="dense"),
    "default": Options(),
    "default-backward": Options(in_forward=False, beta=0.9, weighting="uniform"),
    "default-linear": Options(gradient="default-linear"),
    "sparsemixer": Options(gradient="sparsemixer"),
    "sparsemixer-v2": Options(gradient="sparsemixer-v2"),
    "expert-group": Options(gradient="expert-group"),
    "remoe": Options(gradient="remoe"),
    "topk-bias": Options(gradient="topk", loss_free_bias=1e-3),
}
"""Every estimator with its defaults, but ``default-backward``: beta 0.9 and plain means."""

SHOWN = ("topk", "dense", "default", "default-backward", "default-linear", "sparsemixer")
"""The arms that are trained unless others are asked for."""


def parse(text: str) -> tuple[str, Options]:
    """Return the name and the options of ``NAME: FLAGS``.

    Raises:
        UserError: it has another form, the flags are not this package's, or they are not in this
            task.
    """
    name, colon, flags = text.partition(":")
    if not colon or not name.strip():
        raise UserError(
            f'--arm "{text}" must be a name, a colon and flags of the router gradient, such as'
            ' --arm "fast: --moe-router-gradient default --default-vector-beta 0.9"'
        )
    # Megatron makes flags of the dataclass, so that they are those of training.
    from megatron_default_moe.cpu import runtime
    from megatron_default_moe.loop.command_line import quiet_expected_warnings
    from megatron_default_moe.options.config import add_router_gradient_args, options_from_args

    quiet_expected_warnings()
    runtime.install()
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    try:
        args, others = add_router_gradient_args(parser).parse_known_args(shlex.split(flags))
    except (argparse.ArgumentError, ValueError) as error:
        raise UserError(f"--arm {name.strip()}: {error}") from error
    if others:
        raise UserError(
            f"--arm {name.strip()}: {others[0]} is no flag of the router gradient; docs/flags.md"
            " lists them"
        )
    options = options_from_args(args)
    _check(name.strip(), options)
    return name.strip(), options


def _check(name: str, options: Options) -> None:
    """Refuse flags that would change nothing here, and estimators beside a foreign bias."""
    default = Options()
    for field, flag in (
        ("init", "--default-vector-init"),
        ("normalized_gate", "--default-vector-normalized-gate"),
        ("kernels", "--default-vector-kernels"),
        ("from_baseline", "--default-vector-from-baseline"),
        ("override", "--default-vector-override"),
        ("global_aux_loss_exact", "--moe-global-aux-loss-exact"),
    ):
        if getattr(options, field) != getattr(default, field):
            raise UserError(f"--arm {name}: {flag} has no part in the planted task: drop it")
    if options.loss_free_bias is not None and options.estimator.chooses:
        raise UserError(
            f"--arm {name}: --moe-loss-free-bias moves a top-k, and {options.gradient} has none:"
            " drop one of the two"
        )
    before = options.order == "before-use" or options.fade_in
    if options.gradient == "default-linear" and before:
        raise UserError(
            f"--arm {name}: --moe-router-gradient default-linear works in the backward pass alone,"
            " with vectors of the step before: drop --default-vector-order before-use and"
            " --default-vector-fade-in"
        )


def why_not(options: Options, setting: Setting) -> str | None:
    """Say why an arm cannot be trained in a setting, or None if it can."""
    most = options.estimator.most_experts
    if most is not None and setting.topk > most:
        return f"{options.gradient} is for at most {most} experts a token, not {setting.topk}"
    if options.gradient == "expert-group" and options.expert_group_size > setting.experts:
        return f"--expert-group-size {options.expert_group_size} is more than all experts"
    return None
