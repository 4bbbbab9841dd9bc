"""Balance and sparsity of the choice of experts: the loss-free bias, and ReMoE's adaptive loss.

E experts, T tokens.
"""

import torch
from torch import Tensor


def moved_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """Return the bias of each expert after a step, moved by ``rate`` towards the mean load.

    ``b_i + rate sign(mean load - load_i)`` (arXiv 2408.15664, algorithm 1).

    Args:
        bias_E: [E] float32.
        counts_E: [E] tokens routed to each expert in the step, over all ranks.
        rate: the paper's u.
    """
    return torch.add(bias_E, torch.sign(counts_E.mean() - counts_E), alpha=rate)


def sparsity_loss(
    weight: Tensor, mean_gates_E: Tensor, open_E: Tensor, num_tokens: int, topk: int
) -> Tensor:
    """Return ``weight E sum_i f_i mean_t gate_i`` with ``f_i = open_i / (T k)`` (2412.14711): [].

    Args:
        weight: [] lambda.
        mean_gates_E: [E] mean gates over the tokens, with a graph.
        open_E: [E] how many tokens have the gate open.
        num_tokens: T.
        topk: k, the experts per token that are aimed at.
    """
    share_E = open_E / (num_tokens * topk)
    return weight * len(open_E) * (share_E * mean_gates_E).sum()


def sparsity_weight_factor(
    routed: Tensor, possible: Tensor, topk: int, num_experts: int, factor: float
) -> Tensor:
    """Return what lambda is multiplied with after a step: ``factor`` or its inverse (2412.14711).

    Args:
        routed: [] open gates of the step, over the whole model.
        possible: [] gates of the step.
        topk: k; the sparsity aimed at is ``1 - k / E``.
        num_experts: E.
        factor: above 1.
    """
    sparsity, target = 1 - routed / possible, 1 - topk / num_experts
    return torch.where(sparsity < target, factor, 1 / factor)
