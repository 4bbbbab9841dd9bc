"""The results of a study on disk: a JSON file for each setting, to which arms are added."""

import dataclasses
import json
import pathlib
from typing import Any

from megatron_default_moe.errors import UserError
from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.planted.settings import Setting
from megatron_default_moe.planted.training import Outcome

Fidelity = list[tuple[list[float], list[float]]]


@dataclasses.dataclass
class Results:
    """What is known of one setting."""

    setting: Setting
    seeds: list[int]
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """What each arm was, by its name."""
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    probed: list[int] = dataclasses.field(default_factory=list)
    """The steps at which gradients were compared."""
    fidelity: dict[str, Fidelity] = dataclasses.field(default_factory=dict)

    def missing(self, arms: dict[str, RouterGradientConfig]) -> dict[str, RouterGradientConfig]:
        """Return the arms that are still to be trained."""
        return {name: one for name, one in arms.items() if name not in self.outcomes}


def read(
    file: pathlib.Path,
    setting: Setting,
    seeds: list[int],
    arms: dict[str, RouterGradientConfig],
) -> Results:
    """Read what is there of a setting; nothing of it may be of another study.

    Raises:
        UserError: the file is of other seeds or settings, or one of the arms was another one.
    """
    results = Results(setting, seeds)
    if not file.is_file():
        return results
    try:
        known = json.loads(file.read_text())
        same = known["setting"] == dataclasses.asdict(setting) and known["seeds"] == seeds
        if same:
            results.options = known["options"]
            results.outcomes = {name: Outcome(**one) for name, one in known["outcomes"].items()}
            results.probed, results.fidelity = known["probed"], known["fidelity"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a result of default-moe planted: give another folder with --out"
        ) from error
    changed = [
        name for name in arms if results.options.get(name, flags(arms[name])) != flags(arms[name])
    ]
    if not same or changed:
        what = f"arm {changed[0]} with other flags" if changed else "other seeds or steps"
        raise UserError(f"{file} is of {what}: give another folder with --out")
    return results


def flags(options: RouterGradientConfig) -> dict[str, Any]:
    """Return what an arm is made of, where it differs from the defaults; always the estimator."""
    default = RouterGradientConfig()
    values = dataclasses.asdict(options)
    changed = {name: one for name, one in values.items() if one != getattr(default, name)}
    return {"gradient": options.gradient, **changed}


def write(file: pathlib.Path, results: Results) -> None:
    """Write the file as a whole, or leave it as it is."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(results)))
    part.replace(file)
