"""Routing with a choice of one's own: Megatron's ``routing`` around another top-k.

Megatron's router names its top-k itself, so an estimator that chooses otherwise gets the steps of
``TopKRouter.routing`` here, each by Megatron's own function: z-loss, choice, capacity, balance.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from torch import Tensor


def routing(
    router: Any, logits: Tensor, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Route with ``router.choose``; arguments and results as ``TopKRouter.routing``.

    Args:
        router: an ObservedTopKRouter.
        logits: [sequence, batch, E].
        padding_mask: [sequence, batch] bool, True for padding, or None.

    Returns:
        [T, E] the multipliers, zero where unused, and [T, E] bool the map.
    """
    shape = logits.shape[0], logits.shape[1]
    config = router.config
    padding_T = None if padding_mask is None else padding_mask.reshape(-1)
    logits_TE = router.apply_z_loss(logits.view(-1, config.num_moe_experts), padding_mask=padding_T)
    probs_TE, chosen_TE = router.choose(logits_TE)
    map_TE = chosen_TE
    if config.moe_expert_capacity_factor is not None:
        probs_TE, map_TE = apply_router_token_dropping(
            probs_TE,
            chosen_TE,
            router_topk=router.topk,
            capacity_factor=config.moe_expert_capacity_factor,
            drop_policy=config.moe_token_drop_policy,
            pad_to_capacity=config.moe_pad_expert_input_to_capacity,
        )
    if router.training and torch.is_grad_enabled():
        probs_TE = router.balance(probs_TE, logits_TE, chosen_TE, shape, padding_T)
    return probs_TE, map_TE


def balance(
    router: Any,
    probs_TE: Tensor,
    logits_TE: Tensor,
    chosen_TE: Tensor,
    shape: tuple[int, int],
    padding_T: Tensor | None,
) -> Tensor:
    """Attach Megatron's three balance losses (``ObservedTopKRouter.balance``).

    Megatron counts the top-k of the scores; here what was chosen counts, which is another thing
    where experts are drawn or a bias takes part.
    """
    if not router.is_aux_loss_enabled():
        return probs_TE
    _, scores_TE = compute_routing_scores_for_aux_loss(
        logits_TE, router.topk, router.score_function, padding_mask=padding_T
    )
    masked = padding_T is not None
    if padding_T is not None:
        chosen_TE = chosen_TE & ~padding_T.unsqueeze(-1)
    probs_TE = router._apply_aux_loss(probs_TE, scores_TE, chosen_TE, with_padding_mask=masked)
    probs_TE = router._apply_seq_aux_loss(
        probs_TE, scores_TE, chosen_TE, *shape, with_padding_mask=masked
    )
    with_losses: Tensor = router._apply_global_aux_loss(
        probs_TE, scores_TE, chosen_TE, with_padding_mask=masked
    )
    return with_losses


def biased_topk(router: Any, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the top-k of ``softmax(logits) + bias``, weight with the softmax alone.

    Loss-free balancing (arXiv 2408.15664, equation 3) beside a softmax gate over all experts.

    Args:
        router: has ``choice_bias`` [E] float32.
        logits_TE: [T, E].

    Returns:
        [T, E] probabilities of the chosen, zero elsewhere, and [T, E] bool the choice.
    """
    scores_TE = torch.softmax(logits_TE.detach(), dim=-1, dtype=torch.float32)
    chosen_TK = (scores_TE + router.choice_bias).topk(router.topk, dim=-1).indices
    probs_TE, map_TE = topk_routing_with_score_function(
        logits_TE,
        router.topk,
        use_pre_softmax=True,
        scaling_factor=router.config.moe_router_topk_scaling_factor,
        score_function="softmax",
        precomputed_indices=chosen_TK,
    )
    return probs_TE, map_TE
