"""Random choices that are the same for a token in every layout and in the recomputed pass.

A layer has a random state of its own in Megatron's tracker, the same on all ranks, which gives one
key a micro-batch; activation recomputation restores the tracker's states, and with them the key. A
draw is a hash of the key, the number of steps taken and the token's place in the micro-batch of all
ranks. The state starts anew with every step: what a crash or a repeated step drew is drawn again.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_default_moe.maths import hashing

SEED = 7_919
"""Added to the layer's number: the tracker wants seeds that differ from Megatron's."""


class Draws:
    """Where one router's random numbers come from."""

    def __init__(self, layer_number: int) -> None:
        """Prepare a layer's draws; ``layer_number`` counts over the whole model."""
        self.name = f"router-draws-{layer_number}"
        self.seed = (SEED + layer_number) * 1_000_003
        self._start: Any = None

    def begin_step(self) -> None:
        """Go back to the start, with which every step begins."""
        tracker = get_cuda_rng_tracker()
        states = tracker.get_states()
        if self._start is None:
            # A checkpoint may have brought a state of this name.
            states.pop(self.name, None)
            tracker.set_states(states)
            tracker.seeds_.discard(self.seed)
            tracker.add(self.name, self.seed)
            self._start = tracker.get_states()[self.name]
        else:
            states[self.name] = self._start
            tracker.set_states(states)

    def key(self, steps: Tensor) -> Tensor:
        """Return the key of this micro-batch: [2] int64.

        Args:
            steps: [1] int64, the steps taken.
        """
        tracker = get_cuda_rng_tracker()
        if self.name not in tracker.get_states():
            self.begin_step()
        with tracker.fork(self.name):
            drawn = torch.randint(2**32, (2,), device=steps.device)
        return hashing.mix(drawn ^ hashing.mix(steps & 0xFFFFFFFF))


def places(router: Any, sequence: int, batch: int) -> Tensor:
    """Return the place of each of this rank's tokens in the micro-batch of all ranks: [S B] int64.

    With sequence parallelism a rank holds its part of the sequence; with context parallelism the
    chunks r and 2 CP - 1 - r; with data parallelism its part of the batch.

    Args:
        router: an ObservedTopKRouter; its groups are Megatron's.
        sequence: tokens of the sequence on this rank.
        batch: sequences on this rank.
    """
    device = torch.cuda.current_device()
    tp, cp = router.tp_group, router.cp_group
    tp_size = tp.size() if router.config.sequence_parallel else 1
    position_S = torch.arange(sequence, device=device)
    if tp_size > 1:
        position_S = position_S + tp.rank() * sequence
    if cp.size() > 1:
        half = sequence * tp_size // 2
        second = position_S >= half
        chunk = torch.where(second, 2 * cp.size() - 1 - cp.rank(), cp.rank())
        position_S = chunk * half + position_S - second * half
    everyone = router.tp_dp_cp_group
    model_ranks = router.tp_cp_group.size()
    dp_rank, dp_size = everyone.rank() // model_ranks, everyone.size() // model_ranks
    sequence_B = dp_rank * batch + torch.arange(batch, device=device)
    return (position_S.unsqueeze(-1) * (batch * dp_size) + sequence_B).reshape(-1)
