"""One page of a checkpoint's routers: heat maps of cosines by layer, and numbers against depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from megatron_default_moe.inspection.routers import Router, cosines

MAX_LAYERS = 12
"""Heat maps drawn; of a deeper model, layers spread evenly over the depth."""
COLUMNS = 4


def draw(
    routers: Sequence[Router],
    numbers: Sequence[dict[str, float]],
    load: Sequence[float | None],
    title: str,
    path: Path,
) -> None:
    """Draw the page.

    Args:
        routers: by depth.
        numbers: of each layer (``routers.measures``).
        load: of each layer, the busiest expert's share over the fair share; None where unknown.
        title: of the page.
        path: of the PNG.
    """
    shown = list(range(len(routers)))
    if len(shown) > MAX_LAYERS:
        shown = [round(i) for i in np.linspace(0, len(routers) - 1, MAX_LAYERS)]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(14, 2.9 * rows + 4.2), layout="constrained")
    figure.suptitle(title)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.9 * rows, 3.6])
    maps, depth = parts
    panels = list(maps.subplots(rows, columns, squeeze=False).flat)
    has_vectors = routers[0].vectors_ED is not None
    image: Any = None
    for axes in panels:
        axes.set_axis_off()
    for axes, index in zip(panels, shown, strict=False):
        router = routers[index]
        rows_ED = router.weight_ED if router.vectors_ED is None else router.vectors_ED
        image = _heat_map(axes, rows_ED, f"layer {router.name}")
    what = "default vectors" if has_vectors else "router rows (the run has no default vectors)"
    bar = maps.colorbar(image, ax=panels, fraction=0.03, pad=0.01)
    bar.set_label(f"cosine between {what}")

    names = [router.name for router in routers]
    similarity, norms, updates, loads = depth.subplots(1, 4)
    lines = {"router rows": "router cosine"}
    if has_vectors:
        lines = {"default vectors": "vector cosine"} | lines
    _against_depth(similarity, names, numbers, lines, "Mean cosine of two experts")
    lines = {"mean": "vector norm", "smallest": "smallest norm", "largest": "largest norm"}
    _against_depth(norms, names, numbers, lines, "Norm of the default vectors")
    lines = {"most": "most updates", "fewest": "fewest updates"}
    _against_depth(updates, names, numbers, lines, "Updates of an expert's vector")
    known = [{} if value is None else {"load": value} for value in load]
    lines = {"busiest expert / fair share": "load"}
    _against_depth(loads, names, known, lines, "Load of the last logged step")
    figure.savefig(path, dpi=130)


def _heat_map(axes: Axes, rows_ED: Tensor, title: str) -> Any:
    axes.set_axis_on()
    axes.set_title(title)
    axes.set(xlabel="expert", ylabel="expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return axes.imshow(cosines(rows_ED).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, origin="lower")


def _against_depth(
    axes: Axes,
    names: Sequence[str],
    numbers: Sequence[dict[str, float]],
    lines: dict[str, str],
    title: str,
) -> None:
    """One line a number, from the first layer to the last."""
    axes.set_title(title)
    for label, key in lines.items():
        points = [(i, found[key]) for i, found in enumerate(numbers) if key in found]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    if axes.lines:
        axes.legend()
        axes.grid(alpha=0.3)
        marked = sorted({round(i) for i in np.linspace(0, len(names) - 1, min(12, len(names)))})
        axes.set_xticks(marked, [names[i] for i in marked])
        axes.set_xlabel("layer")
    else:
        axes.text(0.5, 0.5, "not known", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
