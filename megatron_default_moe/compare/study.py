"""A study: arms, seeds and what all runs share, from a YAML file, checked in one sentence.

    config: ../examples/quickstart.yaml   # what every run starts from; or an example's name
    corpus: stdlib                        # the quickstart's text; else flags name the data
    flags: {train-iters: 200}             # for every run; win over config
    seeds: [1, 2, 3]
    baseline: topk
    arms:                                 # flags of each arm; win over both
      topk: {moe-router-gradient: topk}
      default: {moe-router-gradient: default}

``ranks: N`` starts every run with torchrun. Flags mean what they mean in a ``--config`` file.
"""

import dataclasses
import difflib
import pathlib
import re
from typing import Any

from megatron_default_moe.errors import UserError
from megatron_default_moe.options import examples, flags

KEYS = ("config", "corpus", "flags", "seeds", "baseline", "arms", "ranks")
OWN = {
    "seed": "list it in seeds",
    "config": "write config beside arms, not among flags",
    "base": "write config beside arms, not among flags",
    "save": "every run has a folder of its own below --out",
    "load": "every run starts from its seed's weights",
    "tensorboard-dir": "every run has a folder of its own below --out",
    "skip-train": "there is no loss to compare without training",
}
"""Flags that the study gives to each run, and what to do instead of writing them."""
OF_CORPUS = ("tokenizer-model", "train-data-path", "valid-data-path")
ALIKE = (
    *("train-iters", "global-batch-size", "rampup-batch-size", "seq-length"),
    *("eval-interval", "eval-iters", "full-validation", "split", "mock-data"),
    *("data-path", "train-data-path", "valid-data-path", "per-split-data-args-path"),
    *("data-args-path", "tokenizer-type", "tokenizer-model", "vocab-size"),
)
"""Flags that decide which batches are trained and evaluated on; no arm may have its own."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked study."""

    path: pathlib.Path
    arms: dict[str, dict[str, Any]]
    """By name, in the file's order: the flags of its runs, all but the seed."""
    seeds: tuple[int, ...]
    baseline: str
    """The arm that the others are compared with."""
    ranks: int = 1
    """Processes of each run."""
    corpus: bool = False
    """Whether the runs train on the standard library's text."""

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Every run as arm and seed; all arms of a seed before the next seed."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    @property
    def steps(self) -> int:
        """How many steps a run has."""
        return int(self.arms[self.baseline]["train-iters"])


def read(path: pathlib.Path) -> Study:
    """Read and check a study's file; whether its flags exist is checked with Megatron's parser.

    Raises:
        UserError: with the file and the line.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the YAML file of a study (docs/compare.md)")
    where = f"study {path}"
    values = flags.load(path, "study")
    for key in values:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            way_out = f"did you mean {near[0]}?" if near else "flags of every run go below flags"
            raise UserError(f"{where}: {key} is not a line of a study; {way_out}")
    common = _base(path, values.get("config"), where)
    common |= _lines(values.get("flags"), f"{where}: flags")
    if corpus := _corpus(values.get("corpus"), common, where):
        common.setdefault("tokenizer-type", "SentencePieceTokenizer")
    arms = _arms(values.get("arms"), common, where)
    baseline = str(values.get("baseline"))
    if baseline not in arms:
        raise UserError(f"{where}: baseline must be one of the arms, {', '.join(arms)}")
    return Study(
        path=path,
        arms=arms,
        seeds=_seeds(values.get("seeds"), where),
        baseline=baseline,
        ranks=_whole(values.get("ranks") or "1", 1, f"{where}: ranks"),
        corpus=corpus,
    )


def _base(path: pathlib.Path, config: Any, where: str) -> dict[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, str):
        raise UserError(f"{where}: config takes the path of one file, or an example's name")
    beside = path.parent / config
    lines = flags.lines_of(beside if beside.is_file() else examples.file_of(config))
    for name in OWN:  # Of a file that also serves a single run.
        lines.pop(name, None)
    return lines


def _corpus(corpus: Any, common: dict[str, Any], where: str) -> bool:
    if corpus is None:
        return False
    if corpus != "stdlib":
        raise UserError(
            f"{where}: corpus can be stdlib alone; other data is named by flags (train-data-path)"
        )
    for name in (*OF_CORPUS, "data-path", "mock-data"):
        if common.get(name) is not None:
            raise UserError(f"{where}: corpus and {name} both name data; remove one of them")
    return True


def _lines(values: Any, where: str) -> dict[str, Any]:
    """Flags of the study's own, none of which is set by the study."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold lines of the form 'flag: value'")
    lines = flags.in_one_spelling(values, where)
    for name in lines:
        if name in OWN:
            raise UserError(f"{where}: {name} is set for each run; {OWN[name]}")
    return lines


def _arms(values: Any, common: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(values, dict) or len(values) < 2:
        raise UserError(f"{where}: arms must hold at least two arms, each a name with its flags")
    arms: dict[str, dict[str, Any]] = {}
    for key, own in values.items():
        name = str(key)
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{where}: an arm's name is a folder's, of letters, digits and . _ + = -, not"
                f" {name!r}"
            )
        lines = {**common, **_lines(own, f"{where}: arm {name}")}
        arms[name] = {flag: value for flag, value in lines.items() if value is not None}
        _whole(
            arms[name].get("train-iters"), 1, f"{where}: arm {name}: train-iters (steps of a run)"
        )
        for other, theirs in arms.items():
            if differs := [flag for flag in ALIKE if theirs.get(flag) != arms[name].get(flag)]:
                raise UserError(
                    f"{where}: arms {other} and {name} differ in {differs[0]}, and would not see"
                    " the same batches: write it below flags, for all arms"
                )
            if other != name and other.lower() == name.lower():
                raise UserError(f"{where}: arms {other} and {name} would share a folder")
            if other != name and theirs == arms[name]:
                raise UserError(f"{where}: arms {other} and {name} have the same flags")
    return arms


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: seeds must be a list of numbers, such as [1, 2, 3]")
    seeds = tuple(_whole(value, 0, f"{where}: a seed") for value in values)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: a seed is listed twice; it would be the same run again")
    return seeds


def _whole(value: Any, least: int, what: str) -> int:
    if not isinstance(value, str) or not value.isdecimal() or int(value) < least:
        raise UserError(f"{what} must be a whole number of at least {least}, not {value}")
    return int(value)
