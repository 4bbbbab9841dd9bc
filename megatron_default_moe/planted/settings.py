"""The settings of the planted task, by name."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A task, a student and how it is trained."""

    kind: Literal["cells", "words"] = "cells"
    """What decides on a token's expert: the largest of N linear scores, or which word it is."""
    mean_share: float = 0.5
    """Share of the target's signal that the means of the experts carry (rho)."""
    width: int = 32
    """Of a token."""
    spectrum: bool = False
    """Whether the variances of a token's directions fall as 1/i (in a random basis)."""
    teachers: int = 8
    """Hidden experts."""
    words: int = 16
    output: int = 32
    hidden: int = 32
    """Of a student's expert."""
    experts: int = 8
    topk: int = 1
    balance: float = 0.01
    """Coefficient of the load-balancing loss."""
    rate: float = 1e-2
    """Adam's learning rate at its greatest."""
    tokens: int = 256
    """Of a step."""
    steps: int = 1000

    @property
    def threshold(self) -> float:
        """The FVU that counts as having found the experts."""
        return 0.1 if self.kind == "words" else 0.2


SETTINGS = {
    "cells": Setting(),
    "cells-no-means": Setting(mean_share=0.0),
    "cells-all-means": Setting(mean_share=0.9),
    "words": Setting(kind="words"),
    "no-balance": Setting(balance=0.0),
    "16-experts": Setting(experts=16),
    "16-top2": Setting(experts=16, teachers=16, topk=2),
    "slow": Setting(rate=3e-3),
    "fast": Setting(rate=3e-2),
    "wide": Setting(width=128),
    "wide-no-means": Setting(width=128, mean_share=0.0),
    "wide-spectrum": Setting(width=128, spectrum=True),
    "wide-spectrum-no-means": Setting(width=128, spectrum=True, mean_share=0.0),
}
"""``cells`` separates the estimators best; ``cells-no-means`` is its control, in which the means of
the experts' outputs say nothing, so that default vectors cannot help."""
