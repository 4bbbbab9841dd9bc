"""How near an estimator's router gradient is to that of the dense mixture, on one micro-batch.

``--log-router-gradient-fidelity``. In the first micro-batch of a probed step a layer notes what its
backward pass brings to two places: the multipliers of the used experts, and the scores (where
unused experts have a part). A second dispatch asks the unused experts, too (``all_experts.py``).
The losses that balance the experts are in neither gradient. What is noted changes no number of the
run: taps are identities, and the second dispatch's output is zero and goes nowhere.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_default_moe.layers import all_experts

NAMES = ("router-gradient cosine", "router-gradient ratio")
"""Of the estimator's gradient of the router's weight and the dense mixture's: the cosine between
them, and the norm of the first over that of the second."""


class _Tap(torch.autograd.Function):
    """Identity that notes its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, probe: "Probe", name: str) -> Tensor:
        ctx.probe, ctx.name = probe, name
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        setattr(ctx.probe, ctx.name, grads[0].detach().float())
        return grads[0], None, None


class Probe:
    """What one layer notes of one micro-batch: T tokens, E experts, H the router's input width."""

    probs_grad_TE: Tensor | None = None
    """<dy, E_a(x)> at used experts."""
    scores_grad_TE: Tensor | None = None
    """What goes to the logits without the multipliers; None where nothing does."""
    unused_TE: Tensor | None = None
    """A leaf whose gradient is <dy, E_j(x)> at unused experts."""

    def __init__(self, tokens: Tensor) -> None:
        """Begin with the router's input [..., H]."""
        self.tokens_TH = tokens.detach().reshape(-1, tokens.shape[-1])
        self.logits_TE: Tensor | None = None
        self.active_TE: Tensor | None = None
        # The estimator's own notes of its choice (``ObservedTopKRouter.multipliers_again``).
        self.choice: Any = None

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        """Return the tensor; its gradient will be ``self.name``."""
        tapped: Tensor = _Tap.apply(tensor, self, name)
        return tapped

    def ask_unused(self, dispatcher: Any, tokens: Tensor, output: Tensor) -> Tensor:
        """Return the combined output; its gradient also asks the experts that were not used."""
        assert self.active_TE is not None
        self.unused_TE = torch.zeros(self.active_TE.shape, device=output.device, requires_grad=True)
        return all_experts.attach_gradients(
            dispatcher, tokens, ~self.active_TE, self.unused_TE, output
        )

    @torch.enable_grad()
    def gradients(self, router: Any) -> tuple[Tensor, Tensor] | None:
        """Return this rank's part of both gradients of the router's weight: [E, H] each.

        None if the backward pass has not been here.
        """
        if self.probs_grad_TE is None or self.unused_TE is None or self.unused_TE.grad is None:
            return None
        assert self.logits_TE is not None
        assert self.active_TE is not None
        logits_TE = self.logits_TE.float().requires_grad_()
        multipliers_TE = router.multipliers_again(logits_TE, self)
        (own_TE,) = torch.autograd.grad(multipliers_TE, logits_TE, self.probs_grad_TE)
        if self.scores_grad_TE is not None:
            own_TE = own_TE + self.scores_grad_TE
        every_TE = torch.where(self.active_TE, self.probs_grad_TE, self.unused_TE.grad)
        dense_TE = router.dense_probs(logits_TE)
        (true_TE,) = torch.autograd.grad(dense_TE, logits_TE, every_TE)
        tokens_TH = self.tokens_TH.float()
        return own_TE.t() @ tokens_TH, true_TE.t() @ tokens_TH


@torch.no_grad()
def compare(routers: list[Any]) -> None:
    """Leave ``fidelity`` on each probed router of a stage: [2], in the order of ``NAMES``.

    One all-reduce of ``8 E H`` bytes for each probed layer, over the stage's ranks.

    Args:
        routers: of the stage, the same on all its ranks.
    """
    probed = []
    for router in routers:
        probe, router.probe, router.fidelity = router.probe, None, None
        if router.probes and probe is not None:
            found = probe.gradients(router)
            if found is not None:
                probed.append((router, torch.stack(found)))
    if not probed:
        return
    sums = torch.stack([pair for _, pair in probed])
    torch.distributed.all_reduce(sums, group=routers[0].tp_dp_cp_group)
    for (router, _), (own, true) in zip(probed, sums, strict=True):
        tiny = torch.finfo(torch.float32).tiny
        cosine = (own * true).sum() / (own.norm() * true.norm()).clamp_min(tiny)
        router.fidelity = torch.stack([cosine, own.norm() / true.norm().clamp_min(tiny)])
