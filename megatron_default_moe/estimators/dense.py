"""``dense``: the sparse forward pass with the dense mixture's router gradient.

What DenseMixer does (estimators.md): all experts run on all tokens in training, those that a token
did not use without a graph. A measuring instrument and an upper bound: N/K times the expert work.
"""

import torch
from torch import Tensor

from megatron_default_moe.layers import all_experts
from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.maths import functional


class DenseRouter(ObservedTopKRouter):
    """Router whose logits get ``pi_j (g_j - sum_i pi_i g_i)``, ``g_i = <dy, E_i(x)>``, i over all.

    Forward pass and expert gradients are TopK's, bit for bit. No state; no collective of its own,
    but one more dispatch and combine a layer and micro-batch, for N - K experts a token.
    """

    gives_scores_gradient = True
    needs_tokens = True

    def finish_output(self, output: Tensor) -> Tensor:
        """Let the other experts run, for the gradient of their probabilities alone.

        Args:
            output: [..., D] of this rank's tokens, in the order the router saw them.

        Returns:
            The same numbers.
        """
        if not (self.training and torch.is_grad_enabled()):
            return super().finish_output(output)
        assert self.tokens is not None
        active_TE = self._active()
        unused_TE = functional.inactive_probs(self._dense(), active_TE)
        result = all_experts.attach_gradients(
            self.dispatcher, self.tokens, ~active_TE, unused_TE, output
        )
        self._forget_routing()
        return result
