"""The options and the command line flags generated from them.

Contract: Megatron's real parser gains exactly these flags, in one group of
its own, with a help text that names the default; what is not given takes the dataclass's default,
``--paper-default-moe`` changes that default, and an explicit flag wins over it on either side of
it; values that cannot work end in a UserError that names the flag.
"""

import argparse
import dataclasses
import pathlib
import re
import runpy

import pytest

from megatron_default_moe import UserError
from megatron_default_moe.cpu import runtime
from megatron_default_moe.options import config
from megatron_default_moe.options.config import RouterGradientConfig

DESIGN_CHOICES = {
    "--moe-router-gradient": {
        "topk",
        "default",
        "default-linear",
        "dense",
        "sparsemixer",
        "sparsemixer-v2",
        "expert-group",
        "remoe",
    },
    "--default-vector-weighting": {"router", "uniform"},
    "--default-vector-order": {"after-use", "before-use"},
    "--default-vector-init": {"zeros", "gaussian"},
    "--default-linear-anchor": {"scaled", "full", "none"},
}
SWITCHES = [
    "--default-vector-in-forward",
    "--default-vector-in-eval",
    "--default-vector-bias-correction",
    "--default-vector-normalized-gate",
    "--default-vector-kernels",
    "--moe-global-aux-loss-exact",
    "--expert-group-in-forward",
]
DESIGN_FLAGS = {
    *DESIGN_CHOICES,
    *SWITCHES,
    *(switch.replace("--", "--no-", 1) for switch in SWITCHES),
    "--default-vector-beta",
    "--default-vector-from-baseline",
    "--default-vector-fade-in",
    "--paper-default-moe",
    "--moe-loss-free-bias",
    "--log-router-gradient-fidelity",
    "--default-linear-rank",
    "--default-linear-ridge",
    "--sparsemixer-mask-width",
    "--expert-group-size",
    "--remoe-lambda",
    "--remoe-factor",
    "--default-vector-override",
}
DEFAULTS = {
    "gradient": "default",
    "global_aux_loss_exact": True,
    "beta": 0.99,
    "weighting": "router",
    "order": "after-use",
    "in_forward": True,
    "fade_in": 0,
    "absent": (),
    "in_eval": True,
    "init": "zeros",
    "bias_correction": False,
    "normalized_gate": False,
    "loss_free_bias": None,
    "fidelity_interval": None,
    "linear_rank": 16,
    "linear_ridge": 0.1,
    "linear_anchor": "scaled",
    "mask_width": 0.1,
    "expert_group_size": 2,
    "expert_group_in_forward": False,
    "remoe_lambda": 1e-8,
    "remoe_factor": 1.2,
    "kernels": False,
    "from_baseline": False,
    "override": False,
}
PAPER = {**DEFAULTS, "order": "before-use", "beta": 0.9}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    runtime.install()
    from megatron.training.arguments import add_megatron_arguments

    megatron = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return config.add_router_gradient_args(megatron)


def options(parser: argparse.ArgumentParser, *argv: str) -> RouterGradientConfig:
    return config.options_from_args(parser.parse_args([*argv]))


def our_groups(parser: argparse.ArgumentParser) -> list[argparse._ArgumentGroup]:
    return [
        group
        for group in parser._action_groups
        if any(DESIGN_FLAGS & set(action.option_strings) for action in group._group_actions)
    ]


# The flags


def test_the_flags_of_the_design_are_one_group_and_nothing_else_is_in_it(
    parser: argparse.ArgumentParser,
) -> None:
    groups = our_groups(parser)
    assert len(groups) == 1
    assert "megatron_default_moe" in groups[0].title
    in_group = {flag for action in groups[0]._group_actions for flag in action.option_strings}
    assert in_group == DESIGN_FLAGS


def test_every_field_has_its_flag_and_every_flag_its_field(
    parser: argparse.ArgumentParser,
) -> None:
    dests = {action.dest for action in our_groups(parser)[0]._group_actions}
    fields = {field.metadata["argparse_meta"]["dest"] for field in config.chosen_by_flags()}
    assert dests == fields | {"paper_default_moe"}


@pytest.mark.parametrize("flag", DESIGN_CHOICES)
def test_choices_are_those_of_the_design(parser: argparse.ArgumentParser, flag: str) -> None:
    choices = set(parser._option_string_actions[flag].choices)
    if flag == "--moe-router-gradient":  # a value appears when it works
        assert {"topk", "default"} <= choices <= DESIGN_CHOICES[flag]
    else:
        assert choices == DESIGN_CHOICES[flag]


@pytest.mark.parametrize("field", config.chosen_by_flags(), ids=lambda f: f.name)
def test_help_explains_and_names_the_default(
    parser: argparse.ArgumentParser, field: dataclasses.Field
) -> None:
    flag = field.metadata["argparse_meta"]["arg_names"][0]
    action = parser._option_string_actions[flag]
    default = DEFAULTS[field.name]
    if default is None or isinstance(default, bool):
        default = "on" if default else "off"
    text = parser._get_formatter()._expand_help(action)
    explanation, _, shown = text.rpartition(" Default: ")
    assert shown == f"{default}."
    assert len(explanation.split()) >= 8
    assert "None" not in text


def test_help_of_the_preset_names_what_it_sets(parser: argparse.ArgumentParser) -> None:
    text = parser._option_string_actions["--paper-default-moe"].help
    for words in (
        "--default-vector-order before-use",
        "--default-vector-beta 0.9,",
        "--default-vector-weighting router",
        "--default-vector-in-forward",
    ):
        assert words in text


def test_our_group_prints(parser: argparse.ArgumentParser) -> None:
    formatter = parser._get_formatter()
    group = our_groups(parser)[0]
    formatter.start_section(group.title)
    formatter.add_arguments(group._group_actions)
    formatter.end_section()
    shown = formatter.format_help()
    assert all(flag in shown for flag in DESIGN_FLAGS)


def test_the_documentation_shows_these_flags() -> None:
    root = pathlib.Path(__file__).resolve().parents[2]
    page = runpy.run_path(str(root / "docs/generate_flags.py"), run_name="docs")
    shown = page["PATH"].read_text()
    assert shown == page["text"](), "run python docs/generate_flags.py"
    flags = set(re.findall(r"^\| `(--[][\w-]+)[^|]*` \|", shown, re.M))
    positive = {flag.replace("[no-]", "") for flag in flags}
    negative = {flag.replace("[no-]", "no-") for flag in flags}
    assert positive | negative == DESIGN_FLAGS


# From arguments to options


def test_nothing_given_means_the_defaults(parser: argparse.ArgumentParser) -> None:
    assert dataclasses.asdict(options(parser)) == DEFAULTS
    assert dataclasses.asdict(RouterGradientConfig()) == DEFAULTS


def test_arguments_of_a_parser_without_our_flags_mean_the_defaults() -> None:
    assert config.options_from_args(argparse.Namespace()) == RouterGradientConfig()


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--moe-router-gradient", "topk"], "gradient", "topk"),
        (["--no-moe-global-aux-loss-exact"], "global_aux_loss_exact", False),
        (["--default-vector-beta", "0"], "beta", 0.0),
        (["--default-vector-beta", "0.5"], "beta", 0.5),
        (["--default-vector-weighting", "uniform"], "weighting", "uniform"),
        (["--default-vector-order", "before-use"], "order", "before-use"),
        (["--no-default-vector-in-forward"], "in_forward", False),
        (["--default-vector-fade-in", "7"], "fade_in", 7),
        (["--no-default-vector-in-eval"], "in_eval", False),
        (["--default-vector-init", "gaussian"], "init", "gaussian"),
        (["--default-vector-bias-correction"], "bias_correction", True),
        (["--default-vector-kernels"], "kernels", True),
        (["--default-vector-from-baseline"], "from_baseline", True),
        (["--default-vector-override"], "override", True),
        (["--moe-loss-free-bias", "0.0001"], "loss_free_bias", 0.0001),
        (["--log-router-gradient-fidelity", "5"], "fidelity_interval", 5),
        (["--default-linear-rank", "4"], "linear_rank", 4),
        (["--default-linear-ridge", "0.2"], "linear_ridge", 0.2),
        (["--default-linear-anchor", "none"], "linear_anchor", "none"),
        (["--sparsemixer-mask-width", "0.3"], "mask_width", 0.3),
        (["--expert-group-size", "3"], "expert_group_size", 3),
        (["--expert-group-in-forward"], "expert_group_in_forward", True),
        (["--remoe-lambda", "1e-6"], "remoe_lambda", 1e-6),
        (["--remoe-factor", "1.1"], "remoe_factor", 1.1),
        (
            ["--no-default-vector-in-eval", "--default-vector-in-eval"],
            "in_eval",
            True,
        ),
        (
            ["--default-vector-bias-correction", "--no-default-vector-bias-correction"],
            "bias_correction",
            False,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_flag_sets_its_field_and_no_other(
    parser: argparse.ArgumentParser, argv: list[str], field: str, value: object
) -> None:
    assert dataclasses.asdict(options(parser, *argv)) == {**DEFAULTS, field: value}


def test_paper_preset(parser: argparse.ArgumentParser) -> None:
    assert dataclasses.asdict(options(parser, "--paper-default-moe")) == PAPER


@pytest.mark.parametrize("first", ["preset-first", "flag-first"])
@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        (["--default-vector-beta", "0.5"], "beta", 0.5),
        (["--default-vector-beta", "0.99"], "beta", 0.99),
        (["--default-vector-beta", "0"], "beta", 0.0),
        (["--default-vector-order", "after-use"], "order", "after-use"),
        (["--default-vector-weighting", "uniform"], "weighting", "uniform"),
        (["--no-default-vector-in-forward"], "in_forward", False),
        (["--no-default-vector-in-eval"], "in_eval", False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_explicit_flag_wins_over_the_preset(
    parser: argparse.ArgumentParser, flag: list[str], field: str, value: object, first: str
) -> None:
    """Also where its value is the default, and where it is false: given is given."""
    preset = ["--paper-default-moe"]
    argv = preset + flag if first == "preset-first" else flag + preset
    assert dataclasses.asdict(options(parser, *argv)) == {**PAPER, field: value}


# Refusals


@pytest.mark.parametrize("beta", ["1", "1.0", "-0.1", "2", "nan", "inf", "-inf"])
def test_beta_out_of_range_names_the_flag(parser: argparse.ArgumentParser, beta: str) -> None:
    with pytest.raises(UserError, match=r"^--default-vector-beta .*not ") as refusal:
        options(parser, f"--default-vector-beta={beta}")
    assert str(float(beta)) in str(refusal.value)
    with pytest.raises(UserError, match="--default-vector-beta"):
        RouterGradientConfig(beta=float(beta))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9999999])
def test_beta_in_range_is_accepted(beta: float) -> None:
    assert RouterGradientConfig(beta=beta).beta == beta


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--default-vector-fade-in", "-1"], "must be a number of steps"),
        (["--default-vector-fade-in", "5", "--no-default-vector-in-forward"], "nothing to fade in"),
    ],
    ids=["negative", "backward-only"],
)
def test_a_fade_in_that_cannot_be(
    parser: argparse.ArgumentParser, argv: list[str], named: str
) -> None:
    with pytest.raises(UserError, match=named) as refusal:
        options(parser, *argv)
    assert "--default-vector-fade-in" in str(refusal.value)


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
@pytest.mark.parametrize(
    "flag",
    [
        "--moe-loss-free-bias",
        "--default-linear-ridge",
        "--sparsemixer-mask-width",
        "--remoe-lambda",
        "--remoe-factor",
    ],
)
def test_a_number_out_of_range_names_its_flag(
    parser: argparse.ArgumentParser, flag: str, value: str
) -> None:
    with pytest.raises(UserError, match=rf"^{flag} must be above .*not "):
        options(parser, f"{flag}={value}")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--moe-loss-free-bias", "1"), ("--sparsemixer-mask-width", "1"), ("--remoe-factor", "1")],
)
def test_an_upper_bound_is_out_of_range(
    parser: argparse.ArgumentParser, flag: str, value: str
) -> None:
    with pytest.raises(UserError, match=rf"^{flag} must be"):
        options(parser, flag, value)


def test_an_interval_is_at_least_one_step(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(UserError, match="--log-router-gradient-fidelity must be at least 1"):
        options(parser, "--log-router-gradient-fidelity=0")


def test_a_rank_is_not_negative(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(UserError, match="--default-linear-rank must be at least 0"):
        options(parser, "--default-linear-rank=-1")


@pytest.mark.parametrize("size", ["1", "0", "-2"])
def test_a_group_of_one_has_nobody_to_learn_from(
    parser: argparse.ArgumentParser, size: str
) -> None:
    with pytest.raises(UserError, match="--expert-group-size must be at least 2"):
        options(parser, f"--expert-group-size={size}")


def test_gaussian_start_excludes_bias_correction(parser: argparse.ArgumentParser) -> None:
    argv = ["--default-vector-init", "gaussian", "--default-vector-bias-correction"]
    with pytest.raises(UserError) as refusal:
        options(parser, *argv)
    assert "--default-vector-bias-correction" in str(refusal.value)
    assert "--default-vector-init gaussian" in str(refusal.value)
    without = options(parser, *argv, "--no-default-vector-bias-correction")
    assert (without.init, without.bias_correction) == ("gaussian", False)


# The dataclass


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RouterGradientConfig().beta = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        RouterGradientConfig("topk")  # type: ignore[misc]
    with pytest.raises(UserError, match="--default-vector-beta"):
        dataclasses.replace(RouterGradientConfig(), beta=1.0)


@pytest.mark.parametrize(("gradient", "uses"), [("topk", False), ("default", True)])
def test_uses_default_vectors(gradient: str, uses: bool) -> None:
    assert RouterGradientConfig(gradient=gradient).uses_default_vectors is uses
