"""Short runs of the entry point: a way of running may change the speed, and nothing else.

Contract: losses, the norm of the default vectors and that of the gradient are those of the plain
run, step by step, within a tolerance. One row runs on the CPU, so that the test's own logic is
known to work; another test shows that a router gradient lost in a graph would be seen.
"""

import argparse
import functools
from collections.abc import Callable

import pytest
from implementations import skip_without_kernels
from training import MODEL, TE, relative, train

from megatron_default_moe.options import support
from megatron_default_moe.options.config import add_router_gradient_args, options_from_args

# Outputs of the experts, and so default vectors, that matter to the router from the first steps on.
LARGE = "--init-method-std 0.1"
GRAPHS = f"{TE} --cuda-graph-impl transformer_engine --te-rng-tracker --cuda-graph-warmup-steps 2"
GRAPHS_TOLERANCE = 5e-3
RUNS = {
    "cpu-full-recompute": (
        "",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        1e-6,
    ),
    "full-recompute": (
        TE,
        f"{TE} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        2e-3,
    ),
    "graphs-of-attention": (
        f"{TE} {LARGE}",
        f"{GRAPHS} {LARGE} --cuda-graph-modules attn",
        GRAPHS_TOLERANCE,
    ),
    "graphs-of-attention-and-mlp": (
        f"{TE} {LARGE} --moe-layer-freq ([0,1])",
        f"{GRAPHS} {LARGE} --cuda-graph-modules attn mlp --moe-layer-freq ([0,1])",
        GRAPHS_TOLERANCE,
    ),
    "graphs-of-attention-and-routing": (
        f"{TE} {LARGE}",
        f"{GRAPHS} {LARGE} --cuda-graph-modules attn moe_router moe_preprocess",
        GRAPHS_TOLERANCE,
    ),
    "graphs-of-routing-with-kernels": (
        f"{TE} {LARGE} --default-vector-kernels",
        f"{GRAPHS} {LARGE} --cuda-graph-modules moe_router moe_preprocess --default-vector-kernels",
        GRAPHS_TOLERANCE,
    ),
    "fused-permute-and-router": (TE, f"{TE} --moe-permute-fusion --moe-router-fusion", 2e-3),
    "overlapped-wgrad": (TE, f"{TE} --overlap-dispatch-backward-with-experts-wgrad", 2e-3),
    "triton-kernels": (TE, f"{TE} --default-vector-kernels", 2e-3),
    "fp8-delayed": (TE, f"{TE} --fp8-format hybrid --fp8-recipe delayed", 5e-2),
    "fp8-router-padding": (
        f"{TE} --fp8-format hybrid --fp8-recipe delayed",
        f"{TE} --fp8-format hybrid --fp8-recipe delayed --moe-router-padding-for-quantization",
        5e-2,
    ),
}
"""Flags of the plain run, flags of the other, and the relative tolerance (chosen, not measured)."""


WITHOUT_GRADIENT = (
    "-c",
    """
import runpy
from megatron_default_moe.maths import functional
whole = functional.inactive_probs
functional.inactive_probs = lambda probs, active: whole(probs.detach(), active)
runpy.run_module("megatron_default_moe.pretrain", run_name="__main__")
""",
)
"""The entry, its default vectors without a way back to the router."""


@pytest.fixture(scope="module")
def trained() -> Callable[[str], list[tuple[float, ...]]]:
    """:func:`train`, once for the same flags: most rows are compared with the same plain run."""
    return functools.cache(train)


@pytest.mark.parametrize("name", RUNS)
def test_the_flags_exist_and_are_accepted(name: str) -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_router_gradient_args(add_megatron_arguments(argparse.ArgumentParser()))
    for flags in RUNS[name][:2]:
        args = parser.parse_args([*MODEL.split(), *flags.split()])
        support.check(args, options_from_args(args))


@pytest.mark.launch
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.startswith("cpu") else [pytest.mark.gpu])
        for name in RUNS
    ],
)
def test_losses_and_vectors_stay(
    name: str,
    trained: Callable[[str], list[tuple[float, ...]]],
    within: Callable[[float, float], None],
) -> None:
    plain, other, tolerance = RUNS[name]
    if not name.startswith("cpu"):
        pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    if "kernels" in name:
        skip_without_kernels()
    expected = trained(plain)
    assert expected[0][1] < expected[-1][1], "the vectors stood still"
    for actual_step, expected_step in zip(trained(other), expected, strict=True):
        for actual, value in zip(actual_step, expected_step, strict=True):
            within(relative(actual, value), tolerance)


@pytest.mark.launch
def test_a_gradient_that_is_lost_would_show() -> None:
    """Else the rows of graphs, where it travels through the graph, could not fail."""
    whole, lost = train(LARGE), train(LARGE, WITHOUT_GRADIENT)
    assert whole[0] == lost[0], "the first step has no default vectors yet"
    steps = zip(lost, whole, strict=True)
    assert max(max(map(relative, *step)) for step in steps) > 3 * GRAPHS_TOLERANCE
