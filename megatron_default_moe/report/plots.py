"""The report's pictures: losses, load per expert and default-vector norms, against tokens."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from megatron_default_moe.report.scalars import (
    TEST_LOSS,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    Scalars,
    Series,
)

MAX_LAYERS = 8
"""Load panels drawn; of a deeper model, layers spread evenly over the depth."""

_LOAD = re.compile(r"load/layer_(\d+)/expert_(\d+)")
_NORM = re.compile(r"moe/default-vector norm_layer_(\d+)")


def plot_loss(scalars: Scalars, path: Path) -> None:
    """Draw train and validation loss against tokens."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    train = scalars.series.get(TRAIN_LOSS, {})
    validation = scalars.series.get(VALIDATION_LOSS, {})
    scale, label = x_axis(scalars)
    if train:
        x, y = _points(scalars, train, scale)
        # The mean of a step's batch is noisy: show it, and a running mean over it.
        window = max(1, len(y) // 40)
        if window > 1:
            axes.plot(x, y, color="tab:blue", alpha=0.25, linewidth=0.8)
        name = "train" if window == 1 else f"train (mean over {window} logged steps)"
        axes.plot(x, running_mean(y, window), color="tab:blue", linewidth=1.6, label=name)
    if validation:
        x, y = _points(scalars, validation, scale)
        axes.plot(x, y, "o-", color="tab:orange", markersize=4, label="validation")
        axes.annotate(
            f"{y[-1]:.3f}", (x[-1], y[-1]), (0, 6), textcoords="offset points", ha="right"
        )
    if test := scalars.series.get(TEST_LOSS, {}):
        axes.plot(*_points(scalars, test, scale), "s", color="tab:green", label="test")
    if train or validation or test:
        axes.legend()
    else:
        absent(axes, f"no scalar '{TRAIN_LOSS}'")
    axes.set(title="Loss against training data", xlabel=label, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def plot_experts(scalars: Scalars, path: Path) -> None:
    """Draw the load of every expert, a panel per layer, above the default-vector norms.

    A TopK run has no default vectors, and no panel of them.
    """
    loads = _loads(scalars)
    layers = sorted(loads)
    if len(layers) > MAX_LAYERS:
        layers = [layers[round(i)] for i in np.linspace(0, len(layers) - 1, MAX_LAYERS)]
    columns = min(4, max(1, len(layers)))
    rows = -(-max(1, len(layers)) // columns)
    norms = _norms(scalars)
    height = 2.6 * rows + (3.6 if norms else 0.6)
    figure = Figure(figsize=(max(8.0, 3.2 * columns), height), layout="constrained")
    ratios = [1.0] * rows + ([1.3] if norms else [])
    grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
    scale, label = x_axis(scalars)

    panels: list[Axes] = []
    image: Any = None
    for index in range(max(1, len(layers))):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        panels.append(axes)
        axes.set(ylabel="expert", xlabel=label)
        if not layers:
            axes.set_title("Load per expert")
            absent(axes, "no scalars 'load/layer_L/expert_E' (see --moe-per-layer-logging)")
            continue
        axes.set_title(f"Load per expert, layer {layers[index]}")
        image = _draw_load(axes, scalars, loads[layers[index]], scale)
    if image is not None:
        bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01, extend="max")
        bar.set_label("load / fair share (1 is balanced)")

    if norms:
        axes = figure.add_subplot(grid[rows, :])
        _draw_norms(axes, scalars, norms, scale)
        axes.set(
            title="Default vectors: mean norm over the experts of each layer",
            xlabel=label,
            ylabel="mean norm",
        )
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _draw_load(axes: Axes, scalars: Scalars, load: dict[int, Series], scale: float) -> Any:
    """One layer as an image: time to the right, experts upwards, colour the share of tokens."""
    experts = sorted(load)
    steps = sorted({step for series in load.values() for step in series})
    x = np.array([_x(scalars, step) for step in steps]) / scale
    shares = np.array([[load[e].get(step, np.nan) for step in steps] for e in experts])
    # Edges between the points; a value stands for the interval around it.
    middle = (x[1:] + x[:-1]) / 2
    half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
    edges = np.concatenate([[x[0] - half], middle, [x[-1] + half]])
    image = axes.pcolormesh(
        edges,
        np.arange(len(experts) + 1) - 0.5,
        shares * len(experts),
        cmap="RdBu_r",
        norm=TwoSlopeNorm(vmin=0, vcenter=1, vmax=3),
        rasterized=True,
    )
    if len(experts) <= 16:
        axes.set_yticks(range(len(experts)), [str(e) for e in experts])
    return image


def _norms(scalars: Scalars) -> dict[str, Series]:
    """Norms of the default vectors by layer, or their mean; nothing of a run without them."""
    layers = {
        int(match[1]): series
        for tag, series in scalars.series.items()
        if (match := _NORM.fullmatch(tag))
    }
    norms = {f"layer {layer}": layers[layer] for layer in sorted(layers)}
    if not norms and (mean := scalars.series.get("default-vector norm")):
        norms = {"mean over layers": mean}
    # TopK runs of earlier versions logged zeros.
    return norms if any(any(series.values()) for series in norms.values()) else {}


def _draw_norms(axes: Axes, scalars: Scalars, norms: dict[str, Series], scale: float) -> None:
    # Imported here: pyplot is the only home of the colour map registry that is typed.
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(norms)))
    for color, (name, series) in zip(colors, norms.items(), strict=True):
        x, y = _points(scalars, series, scale)
        axes.plot(x, y, color=color, linewidth=1.6, label=name)
    axes.set_ylim(bottom=0)
    axes.legend(ncols=-(-len(norms) // 8))


def _loads(scalars: Scalars) -> dict[int, dict[int, Series]]:
    """Load series by layer and expert."""
    loads: dict[int, dict[int, Series]] = {}
    for tag, series in scalars.series.items():
        if match := _LOAD.fullmatch(tag):
            loads.setdefault(int(match[1]), {})[int(match[2])] = series
    return loads


def _x(scalars: Scalars, step: int) -> float:
    tokens = scalars.tokens(step)
    return float(step if tokens is None else tokens)


def x_axis(scalars: Scalars) -> tuple[float, str]:
    """Divisor and label of the x axis, by the size of the run."""
    if scalars.tokens_per_step is None:
        return 1.0, "step"
    return token_axis(_x(scalars, scalars.steps()[-1]))


def token_axis(largest: float) -> tuple[float, str]:
    """Divisor and label of an axis of tokens, up to so many."""
    for scale, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= scale:
            return scale, f"tokens ({name})"
    return 1.0, "tokens"


def _points(scalars: Scalars, series: Series, scale: float) -> tuple[Any, Any]:
    x = np.array([_x(scalars, step) for step in series]) / scale
    return x, np.array(list(series.values()))


def running_mean(values: Any, window: int) -> Any:
    """Mean over `window` values around each, over fewer at both ends (no lag behind the loss)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def absent(axes: Axes, why: str) -> None:
    """Say in an empty panel what it would show."""
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color="gray")
