"""The pictures of a comparison, each with the sentence that says how to read it."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megatron_default_moe.compare.results import Result, Row
from megatron_default_moe.compare.statistics import t_quantile
from megatron_default_moe.report import overlay
from megatron_default_moe.report.plots import absent
from megatron_default_moe.report.scalars import VALIDATION_LOSS


def pictures(table: Sequence[Row], baseline: str) -> list[tuple[str, str, Figure]]:
    """Title, how to read it, and figure of each.

    Args:
        table: every arm, with its finished runs.
        baseline: one of the arms.
    """
    groups = {row.arm: [one.scalars for one in row.results.values()] for row in table}
    found = [
        (
            "Loss against tokens",
            "A line is the mean over seeds, its band reaches from the least to the greatest seed.",
            overlay.losses(groups),
        ),
        (
            f"Difference to {baseline} against tokens",
            f"Validation loss less {baseline}'s of the same seed: below zero is better. The band is"
            " the 95 % t-interval of the mean; with one seed there is none.",
            differences(table, baseline),
        ),
        (
            "Load balance and router",
            "Means over the MoE layers; experts without a token are counted over all of them.",
            overlay.balance(groups),
        ),
    ]
    if (layers := overlay.by_layer(groups)) is not None:
        reading = "Mean over seeds and the last tenth of the logged steps."
        found.append(("By layer", reading, layers))
    return found


def differences(table: Sequence[Row], baseline: str) -> Figure:
    """Paired differences of the validation loss against tokens, with intervals."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    base = next(row.results for row in table if row.arm == baseline)
    groups = {row.arm: [one.scalars for one in row.results.values()] for row in table}
    axis = overlay.Axis(groups)
    for place, row in enumerate(table):
        seeds = [seed for seed in row.results if seed in base]
        if row.arm == baseline or not seeds:
            continue
        steps, apart = paired([row.results[s] for s in seeds], [base[s] for s in seeds])
        x = axis.places(row.results[seeds[0]].scalars, steps)
        look = overlay.color(place)
        mean = apart.mean(0)
        dashes = overlay.style(place)
        label = f"{row.arm} ({len(seeds)} pairs)"
        axes.plot(x, mean, f"o{dashes}", color=look, markersize=3, label=label)
        if len(seeds) > 1:
            reach = t_quantile(len(seeds) - 1) * apart.std(0, ddof=1) / np.sqrt(len(seeds))
            axes.fill_between(x, mean - reach, mean + reach, color=look, alpha=0.18, linewidth=0)
    if axes.lines:
        axes.legend()
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(xlabel=axis.label, ylabel=f"loss less {baseline}'s (nats)")
    else:
        absent(axes, "no pair of runs is finished")
    return figure


def paired(own: Sequence[Result], base: Sequence[Result]) -> tuple[list[int], np.ndarray]:
    """Validation loss less the baseline's at the steps that all of the runs share.

    Args:
        own: runs of an arm.
        base: the baseline's of the same seeds, in the same order.

    Returns:
        Steps, and [seeds, steps] float64.
    """
    steps, values = overlay.common([one.scalars for one in (*own, *base)], VALIDATION_LOSS)
    return steps, values[: len(own)] - values[len(own) :]


def embedded(figure: Figure) -> str:
    """A figure as the address of a picture that lies in the page itself."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
