"""The numbers that are logged of one layer and one step, made of the step's sums."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_default_moe.layers import fidelity
from megatron_default_moe.layers.step_sums import StepSums

NAMES = (
    "default-vector norm",
    "default-vector staleness",
    "default-vector share",
    "default-vector rejected",
    "router entropy",
    "load max/mean",
    "dead experts",
    "remoe sparsity",
    "remoe lambda",
    "choice-bias spread",
    *fidelity.NAMES,
)
"""The scalars, each a mean over MoE layers, except the two counts in ``SUMMED``.

- default-vector norm: mean over experts of ||Ê_i||.
- default-vector staleness: mean over this step's experts of ||Ê_i - m_i|| / ||m_i||, Ê_i before
  the step and m_i the step's own mean output.
- default-vector share: root of (sum ||default term||^2 / sum ||layer output||^2) over the tokens;
  the output of the routed experts, and with --moe-shared-expert-overlap of the shared one, too.
- default-vector rejected: expert updates rejected as not finite since the process started.
- router entropy: mean over tokens of the entropy of the routing distribution, in nats.
- load max/mean: tokens of the busiest expert over the mean.
- dead experts: experts without a token in this step.
- remoe sparsity: 1 - open gates over all gates of the step's tokens; its target is 1 - topk / E.
- remoe lambda: weight of the sparsity loss in the step.
- router-gradient cosine, router-gradient ratio: on probed steps (``fidelity.py``).
- choice-bias spread: greatest minus least bias of --moe-loss-free-bias in the step.

Which of them a run has, its options say (``RouterGradientConfig.metrics``).
"""

SUMMED = ("default-vector rejected", "dead experts")


def layer_metrics(step: StepSums, own: Mapping[str, Tensor]) -> Tensor:
    """Return the metrics of one layer and one logged step.

    Args:
        step: all-reduced sums of the step.
        own: scalars of the layer's estimator, by their names in ``NAMES``.

    Returns:
        [len(NAMES) + E] float32: the values in the order of ``NAMES`` (zero where they do not
        apply), then each expert's fraction of the routed token-expert pairs.
    """
    counts_E = step.counts
    num_tokens, entropy_sum, _, _ = step.totals.unbind()
    values = {
        "router entropy": entropy_sum / num_tokens.clamp_min(1),
        "load max/mean": counts_E.max() / counts_E.mean().clamp_min(1e-9),
        "dead experts": (counts_E == 0).sum().float(),
        **own,
    }
    zero = torch.zeros_like(num_tokens)
    load_E = counts_E / counts_E.sum().clamp_min(1)
    return torch.cat([torch.stack([values.get(name, zero) for name in NAMES]), load_E])


def vector_metrics(
    step: StepSums, before: Tensor, after: Tensor, rejected: Tensor
) -> dict[str, Tensor]:
    """Return the metrics of a layer's default vectors, by name.

    Args:
        step: all-reduced sums of the step.
        before: [E, D] default vectors that the step used.
        after: [E, D] default vectors after the commit.
        rejected: [1] count of rejected expert updates.
    """
    _, _, term_square, output_square = step.totals.unbind()
    tiny = torch.finfo(torch.float32).tiny
    return {
        "default-vector norm": after.norm(dim=-1).mean(),
        "default-vector staleness": _staleness(step, before),
        "default-vector share": (term_square / output_square.clamp_min(tiny)).sqrt(),
        "default-vector rejected": rejected[0].float(),
    }


def _staleness(step: StepSums, before: Tensor) -> Tensor:
    mean_ED = step.sums / step.mass.unsqueeze(-1)
    usable_E = (step.mass > 0) & mean_ED.isfinite().all(-1) & (mean_ED.norm(dim=-1) > 0)
    ratio_E = (before - mean_ED).norm(dim=-1) / mean_ED.norm(dim=-1)
    return torch.where(usable_E, ratio_E, 0).sum() / usable_E.sum().clamp_min(1)
