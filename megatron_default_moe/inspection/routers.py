"""The routers of a checkpoint, and what can be measured of them without running the model."""

import dataclasses
import pathlib
import re
from typing import Any

import torch
from torch import Tensor

from megatron_default_moe.checkpoint import on_disk, tensors
from megatron_default_moe.errors import UserError
from megatron_default_moe.maths import functional

_ROUTER = re.compile(
    r"(?P<stack>decoder|mtp)\.layers\.(?:(?P<number>\d+)\.)?(?:transformer_layer\.)?mlp\.router\."
    r"(?P<what>weight|default_vectors|default_vector_updates)"
)
"""Layers that are alike are one tensor with a leading dimension, others one tensor each."""


@dataclasses.dataclass(frozen=True)
class Router:
    """One layer's router, as the checkpoint holds it."""

    layer: int
    """Counted from 0 as the metrics do: prediction layers (MTP) follow the decoder's."""
    name: str
    """``3``, or ``mtp 0``."""
    weight_ED: Tensor
    """[E, hidden size] float32."""
    vectors_ED: Tensor | None = None
    """[E, hidden size] float32 as the model uses them, bias-corrected where the run says so; None
    without default vectors."""
    updates_E: Tensor | None = None
    """[E] int64: steps in which the expert received tokens."""


def read_routers(folder: pathlib.Path) -> list[Router]:
    """Read every MoE layer's router from a ``torch_dist`` checkpoint, by depth.

    Args:
        folder: of one iteration (``tensors.complete_folder``).

    Raises:
        UserError: the checkpoint has no MoE layer.
    """
    names = {name: match for name in tensors.shapes(folder) if (match := _ROUTER.fullmatch(name))}
    if not names:
        raise UserError(f"{folder} has no router: it is not of a model with --num-experts")
    args = vars(on_disk.common_state(folder)["args"])
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.read(folder, names).items():
        match = names[name]
        number, what = match["number"], match["what"]
        layers = [(int(number), tensor)] if number else list(enumerate(tensor))
        for index, one in layers:
            is_mtp = match["stack"] == "mtp"
            layer = int(args["num_layers"]) + index if is_mtp else index
            label = f"mtp {index}" if is_mtp else str(index)
            parts.setdefault((layer, label), {})[what] = one
    return [_router(layer, name, parts[layer, name], args) for layer, name in sorted(parts)]


def _router(layer: int, name: str, found: dict[str, Tensor], args: dict[str, Any]) -> Router:
    vectors, updates = found.get("default_vectors"), found.get("default_vector_updates")
    if vectors is not None:
        vectors = vectors.float()
        if args.get("default_vector_bias_correction"):
            assert updates is not None, f"layer {name} has vectors without counts"
            beta = float(args["default_vector_beta"])
            vectors = functional.bias_corrected(vectors, updates, beta)
    return Router(layer, name, found["weight"].float(), vectors, updates)


def cosines(rows_ED: Tensor) -> Tensor:
    """Return [E, E] cosines between rows; those of a row of zeros are 0, with itself too.

    Args:
        rows_ED: [E, hidden size].
    """
    unit_ED = torch.nn.functional.normalize(rows_ED.double(), dim=1)
    return unit_ED @ unit_ED.T


def mean_cosine(rows_ED: Tensor) -> float:
    """Return the mean cosine of two different rows (arXiv 2504.12463, figure 3).

    0 where directions have nothing in common, 1 where all are the same; NaN of a single row.
    """
    experts = len(rows_ED)
    cosines_EE = cosines(rows_ED)
    pairs = experts * (experts - 1)
    total = float(cosines_EE.sum() - cosines_EE.diagonal().sum())
    return total / pairs if pairs else float("nan")


def directions(rows_ED: Tensor) -> float:
    """Return how many directions the rows really take, between 1 and E.

    The participation ratio ``(sum of eigenvalues)^2 / sum of their squares`` of the cosines: E
    where rows are orthogonal, 1 where all are parallel, 0 where all are zero.
    """
    cosines_EE = cosines(rows_ED)
    squares = float(cosines_EE.square().sum())
    return float(cosines_EE.trace()) ** 2 / squares if squares else 0.0


def measures(router: Router) -> dict[str, float]:
    """Return a layer's numbers by name; those of default vectors only where it has them."""
    found = {
        "router norm": float(router.weight_ED.norm(dim=1).mean()),
        "router cosine": mean_cosine(router.weight_ED),
    }
    if router.vectors_ED is not None:
        norms_E = router.vectors_ED.norm(dim=1)
        found |= {
            "vector norm": float(norms_E.mean()),
            "smallest norm": float(norms_E.min()),
            "largest norm": float(norms_E.max()),
            "vector cosine": mean_cosine(router.vectors_ED),
            "directions": directions(router.vectors_ED),
        }
    if router.updates_E is not None:
        found |= {
            "fewest updates": int(router.updates_E.min()),
            "most updates": int(router.updates_E.max()),
            "never updated": int((router.updates_E == 0).sum()),
        }
    return found
