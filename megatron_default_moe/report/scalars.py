"""The scalars of a run, read from its TensorBoard events.

A resumed run has several event files. For each tag the later file wins from the first step that it
holds, because what an earlier process logged beyond its last checkpoint belongs to a branch of
training that was given up.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_default_moe.errors import UserError

Series = dict[int, float]
"""Values of one tag by step, in order of steps."""

TRAIN_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
TEST_LOSS = "lm loss test"
TOKENS = "consumed tokens"
STEP_SECONDS = "iteration-time"


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """All scalars of a run, and the number of tokens that belongs to a step."""

    series: dict[str, Series]
    """By TensorBoard tag; tags whose x axis is not the step (`... vs samples`) are left out."""
    tokens_per_step: float | None
    """From `consumed tokens`, else as the user gave it, else unknown."""

    def steps(self) -> list[int]:
        """Every step with a value, in order."""
        return sorted({step for values in self.series.values() for step in values})

    def tokens(self, step: int) -> int | None:
        """Tokens seen after `step`: as logged, else in proportion between logged steps."""
        logged = self.series.get(TOKENS, {})
        if self.tokens_per_step is None:
            return None
        if step in logged:
            return round(logged[step])
        before = max((known for known in logged if known < step), default=None)
        after = min((known for known in logged if known > step), default=None)
        if after is not None:
            # A batch size that ramps up makes the line through zero wrong: stay between neighbours.
            xs = [before or 0, after]
            ys = [logged[before] if before is not None else 0.0, logged[after]]
            return round(float(np.interp(step, xs, ys)))
        start = logged[before] if before is not None else 0.0
        return round(start + (step - (before or 0)) * self.tokens_per_step)


def read_scalars(folder: Path, tokens_per_step: int | None = None) -> Scalars:
    """Read every TensorBoard event file below `folder`.

    Args:
        folder: a TensorBoard log directory.
        tokens_per_step: global batch size times sequence length, for runs that do not log tokens.

    Raises:
        UserError: there is no event file with a scalar.
    """
    series: dict[str, Series] = {}
    for events in _event_files(folder):
        for tag, values in events.items():
            first = min(values)
            kept = {step: v for step, v in series.get(tag, {}).items() if step < first}
            series[tag] = kept | dict(sorted(values.items()))
    if not series:
        raise UserError(f"no TensorBoard scalars below {folder}; see --tensorboard-dir")
    per_step: float | None
    if logged := series.get(TOKENS):
        steps = list(logged)[-2:]
        taken = logged[steps[-1]] - (logged[steps[0]] if len(steps) == 2 else 0.0)
        per_step = taken / (steps[-1] - (steps[0] if len(steps) == 2 else 0))
    else:
        per_step = float(tokens_per_step) if tokens_per_step else None
    return Scalars(series=series, tokens_per_step=per_step)


def _event_files(folder: Path) -> list[dict[str, Series]]:
    """The scalars of each file, in the order in which the files were begun."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    found = []
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        # Never purge: several tags restart at lower steps legitimately, and tags are merged above.
        reader = EventAccumulator(str(path), {"scalars": 0}, purge_orphaned_data=False).Reload()
        tags = [tag for tag in reader.Tags()["scalars"] if not tag.endswith(" vs samples")]
        scalars = {tag: _series(reader.Scalars(tag)) for tag in tags}
        if scalars:
            begun = min(reader.Scalars(tag)[0].wall_time for tag in tags)
            found.append((begun, path.name, scalars))
    return [scalars for *_, scalars in sorted(found, key=lambda item: item[:2])]


def _series(events: list[Any]) -> Series:
    """One tag of one process, by step.

    Of several values at a step the first counts: after it Megatron may have logged the loss on
    other batches, or on the test set, by the same name. What was given up and trained again (a
    restart inside the process) comes later, and counts.
    """
    series: Series = {}
    before = None
    for event in events:
        if event.step != before:
            series[event.step] = event.value
        before = event.step
    return series
