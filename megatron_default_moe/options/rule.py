"""One row of the support table (``support.py``), and which estimators it is about."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.options.estimators import ESTIMATORS, Estimator
from megatron_default_moe.options.settings import Settings


def with_vectors(estimator: Estimator) -> bool:
    """Those that keep default vectors."""
    return estimator.vectors


def beyond_default(estimator: Estimator) -> bool:
    """All but topk and default."""
    return estimator.name not in ("topk", "default")


def weighs_unused(estimator: Estimator) -> bool:
    """Those that need the probabilities of the experts that a token did not use."""
    return estimator.weights_unused


def chooses(estimator: Estimator) -> bool:
    """Those with a choice of their own."""
    return estimator.chooses


def named(*names: str) -> Callable[[Estimator], bool]:
    """Those with these names."""
    return lambda estimator: estimator.name in names


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the support table."""

    situation: str
    """What the user asked for, in the user's flags."""
    verdict: Literal["refused", "warned", "noted"]
    sentence: str
    """Why, and what to do instead."""
    applies: Callable[[Settings], Any]
    topk_too: bool = False
    """Whether it also concerns ``--moe-router-gradient topk``."""
    only: Callable[[Estimator], bool] = lambda estimator: True
    """Which of the estimators beyond topk it concerns."""
    own_entry_only: bool = False
    """Whether it only concerns ``megatron_default_moe.pretrain``, not Megatron's own script."""

    def concerns(self, options: RouterGradientConfig) -> bool:
        """Whether the rule is about what these options ask for."""
        if options.gradient == "topk":
            return self.topk_too
        return self.only(options.estimator)

    @property
    def estimators(self) -> str:
        """Which estimators it concerns, for the documentation."""
        beyond = [one for one in ESTIMATORS if one.name != "topk"]
        names = [one.name for one in beyond if self.only(one)]
        if len(names) == len(beyond):
            return "" if self.topk_too else " (beyond topk)"
        return f" ({', '.join(names)})"
