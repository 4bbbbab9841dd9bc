"""The layout of what one MoE layer sums up during an optimizer step."""

from typing import NamedTuple

import torch
from torch import Tensor


class StepSums(NamedTuple):
    """What one layer knows of one optimizer step, as parts of one flat float32 buffer.

    The local instance adds up over the micro-batches of a rank; all-reduced over the pipeline
    stage's ranks it is the whole global batch. E experts, D width (0 for a plain TopK router).
    """

    sums: Tensor
    """[E, D] weighted sum of each expert's outputs."""
    mass: Tensor
    """[E] the weights that went into ``sums``."""
    counts: Tensor
    """[E] tokens routed to each expert."""
    totals: Tensor
    """[4] tokens, sum of routing entropies, squared norm of the default terms and of the outputs.

    The last three are taken on logging steps only.
    """

    @staticmethod
    def numel(num_experts: int, width: int) -> int:
        """Length of the flat buffer."""
        return num_experts * (width + 2) + 4

    @classmethod
    def view(cls, flat: Tensor, num_experts: int, width: int) -> "StepSums":
        """Name the parts of a flat buffer, as views."""
        sizes = [num_experts * width, num_experts, num_experts, 4]
        sums, mass, counts, totals = flat.split(sizes)
        return cls(sums.view(num_experts, width), mass, counts, totals)

    def load(self) -> Tensor:
        """[2] token-expert pairs that were routed, and all that there could be."""
        return torch.stack([self.counts.sum(), self.totals[0] * self.counts.numel()])
