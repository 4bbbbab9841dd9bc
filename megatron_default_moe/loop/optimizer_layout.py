"""Optimizer state that follows a change of expert parallelism.

Megatron keeps one optimizer, or two where the experts' gradients are reduced apart from the others
(expert or expert tensor parallelism). The tensors of a checkpoint are named after the parameters,
whichever optimizer holds them; the parameter groups are not, so that Megatron can only resume a
checkpoint with as many optimizers as saved it. Here the groups follow too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys


def with_regrouped_state(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``ChainedOptimizer.load_state_dict``: accept another number of optimizers."""

    @functools.wraps(load_state_dict)
    def load(self: Any, state_dict: Any) -> None:
        load_state_dict(self, regroup(state_dict, self.chained_optimizers))

    return load


def regroup(state_dict: Any, optimizers: Sequence[Any]) -> Any:
    """Bring loaded optimizer state into the form of these optimizers.

    Megatron numbers the optimizers of a checkpoint if there are several, and leaves the number out
    if there is one. What it loads holds the tensors in the form of the current optimizers and the
    parameter groups in the form of the saved ones, so a mixture of both forms tells that they
    differ.

    Args:
        state_dict: what ``ChainedOptimizer.load_state_dict`` gets.
        optimizers: the current ones.

    Returns:
        The argument itself if the forms agree.
    """
    if not isinstance(state_dict, dict):
        return state_dict
    numbered = [state_dict[key] for key in sorted(k for k in state_dict if isinstance(k, int))]
    single = {key: value for key, value in state_dict.items() if not isinstance(key, int)}
    if not numbered or not single:
        return state_dict
    saved, current = ([single], numbered) if len(optimizers) > 1 else (numbered, [single])
    groups = [group for state in saved for group in _holder(state).get("param_groups", [])]
    states = []
    for optimizer, state in zip(optimizers, current, strict=True):
        merged = _merge(_merge({}, saved[0]), state)
        # Beside the file's groups, Megatron puts what it knows itself: the parameters' numbers.
        known = _holder(state).get("param_groups", [{} for _ in optimizer.param_groups])
        _holder(merged)["param_groups"] = [
            {**_counterpart(group, groups), **own}
            for group, own in zip(optimizer.param_groups, known, strict=True)
        ]
        states.append(merged)
    return dict(enumerate(states)) if len(optimizers) > 1 else states[0]


def _holder(state: dict[str, Any]) -> dict[str, Any]:
    """The dictionary with the parameter groups: the state itself, or one level below it."""
    holder: dict[str, Any] = state.get("optimizer", state)
    return holder


def _counterpart(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved group with the same settings, marked as this optimizer's."""
    mine = {"is_expert_parallel": group["is_expert_parallel"]}
    for candidate in saved:
        if _settings(candidate) == _settings(group):
            return {**candidate, **mine}
    return mine  # upstream says which settings were not found


def _settings(group: dict[str, Any]) -> list[Any]:
    names = [name for name in param_group_identifier_keys if name != "is_expert_parallel"]
    return [group.get(name, group.get(f"pre_{name}")) for name in names]


def _merge(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    """Merge dictionaries level by level, ``above`` wins; no dictionary of ``above`` is shared."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        if isinstance(value, dict):
            value = _merge(inner if isinstance(inner, dict) else {}, value)
        merged[key] = value
    return merged
