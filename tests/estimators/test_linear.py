"""The linear default: one real MoE layer on one rank against loops in float64.

Contract: after two steps the router gradient is that of ``v_j(x)`` with moments, slopes and anchor
written down here by tokens and experts; the forward pass is TopK's to the bit; rank 0 without an
anchor is Default's backward-only form; a linear expert is predicted exactly.
"""

from typing import Any

import pytest
import torch
from building import train_step
from layer_reference import close, expert_outputs, tokens
from torch import Tensor

from megatron_default_moe.maths import linear, naive

BETA, RIDGE = 0.5, 0.1


def used_by(logits_TE: Tensor, topk: int) -> list[list[int]]:
    return [row.topk(topk).indices.tolist() for row in logits_TE]


class Reference:
    """State and gradient of one layer, in float64, one token and expert at a time."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.options = layer, layer.router.options
        self.projection = layer.router.projection.double()
        num, width, rank = 5, 12, self.options.linear_rank
        self.vectors = torch.zeros(num, width, dtype=torch.float64)
        self.cross = torch.zeros(num, width, 1 + rank, dtype=torch.float64)
        self.moments = torch.zeros(num, 1 + rank, 1 + rank, dtype=torch.float64)
        self.fit = torch.zeros(2, dtype=torch.float64)

    def step(self, x: Tensor, grad: Tensor) -> Tensor:
        """The router gradient of a step with this state; then the state after it."""
        x_TD = x.reshape(-1, 12).double()
        logits_TE = x_TD @ self.layer.router.weight.detach().double().T
        probs_TE, own_TED = torch.softmax(logits_TE, -1), expert_outputs(self.layer, x_TD).detach()
        used = used_by(logits_TE, self.layer.config.moe_router_topk)
        values_TED, fit = self.values(x_TD, probs_TE, own_TED, used, grad.reshape(-1, 12).double())
        gradient = naive.router_logit_gradient(probs_TE, values_TED, grad.reshape(-1, 12))
        self.update(x_TD, probs_TE, own_TED, used, fit)
        return gradient.T @ x_TD

    def prediction(self, j: int, features: Tensor) -> Tensor:
        mass = float(self.moments[j, 0, 0])
        if mass == 0 or features.numel() == 0:
            return self.vectors[j]
        mean_f, mean_e = self.moments[j, 0, 1:] / mass, self.cross[j, :, 0] / mass
        covariance = self.moments[j, 1:, 1:] / mass - torch.outer(mean_f, mean_f)
        square = self.moments[j, 1:, 1:].diagonal().mean() / mass
        if covariance.diagonal().mean() <= 1e-5 * square:  # one token
            return self.vectors[j]
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(mean_f)).double()
        cross = self.cross[j, :, 1:] / mass - torch.outer(mean_e, mean_f)
        return self.vectors[j] + cross @ torch.linalg.inv(covariance) @ (features - mean_f)

    def values(
        self, x_TD: Tensor, probs_TE: Tensor, own_TED: Tensor, used: list[list[int]], dy: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each token's v_j; and what is known of the fit after it."""
        explained = 0.0
        if self.fit[1] > 0:
            explained = min(max(1 - float(self.fit[0] / self.fit[1]), 0.0), 1.0)
        delta = {"none": 0.0, "full": 1.0, "scaled": explained}[self.options.linear_anchor]
        values_TED, fit = own_TED.clone(), torch.zeros(2, dtype=torch.float64)
        for t, experts in enumerate(used):
            features = self.projection @ x_TD[t]
            predicted = [self.prediction(j, features) for j in range(5)]
            total = sum(float(probs_TE[t, a]) for a in experts)
            shift = torch.zeros(12, dtype=torch.float64)
            for a in experts:
                residual = own_TED[t, a] - predicted[a]
                shift += float(probs_TE[t, a]) / total * residual
                fit += torch.stack([(dy[t] @ residual) ** 2, (dy[t] @ own_TED[t, a]) ** 2])
            for j in set(range(5)) - set(experts):
                values_TED[t, j] = predicted[j] + delta * shift
        return values_TED, fit

    def update(
        self, x_TD: Tensor, probs_TE: Tensor, own_TED: Tensor, used: list[list[int]], fit: Tensor
    ) -> None:
        for j in range(5):
            cross, moments = torch.zeros_like(self.cross[j]), torch.zeros_like(self.moments[j])
            for t, experts in enumerate(used):
                if j in experts:
                    weight = float(probs_TE[t, j]) if self.options.weighting == "router" else 1.0
                    f = torch.cat([torch.ones(1).double(), self.projection @ x_TD[t]])
                    cross += weight * torch.outer(own_TED[t, j], f)
                    moments += weight * torch.outer(f, f)
            if moments[0, 0] > 0:
                self.vectors[j] = BETA * self.vectors[j] + (1 - BETA) * cross[:, 0] / moments[0, 0]
                self.cross[j] = BETA * self.cross[j] + (1 - BETA) * cross
                self.moments[j] = BETA * self.moments[j] + (1 - BETA) * moments
        self.fit = BETA * self.fit + (1 - BETA) * fit / fit[1]


@pytest.mark.parametrize(
    ("weighting", "dispatcher"), [("router", "alltoall"), ("uniform", "allgather")]
)
@pytest.mark.parametrize("anchor", ["none", "full", "scaled"])
@pytest.mark.parametrize("topk", [1, 2], ids="k{}".format)
def test_three_steps_are_those_of_the_formula(
    new_layer: Any, topk: int, anchor: str, weighting: str, dispatcher: str
) -> None:
    settings = {"moe_router_topk": topk, "moe_token_dispatcher_type": dispatcher}
    layer = new_layer(gradient="default-linear", linear_rank=3, linear_anchor=anchor, beta=BETA,
                      weighting=weighting, **settings)  # fmt: skip
    plain = new_layer(gradient="topk", **settings)
    reference = Reference(layer)
    for step in range(3):
        x = tokens(layer, step, sequence=17)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(30 + step))
        layer.zero_grad()
        plain.zero_grad()
        (y,), (base,) = train_step(layer, x, grad=grad), train_step(plain, x, grad=grad)
        assert torch.equal(y, base)
        expected = reference.step(x, grad)
        if expected.norm() < 1e-9:
            # Nothing is known yet: a full anchor then makes all experts alike.
            assert (step, anchor) == (0, "full")
            assert layer.router.weight.grad.norm() < 1e-5
        else:
            close(layer.router.weight.grad, expected, 2e-5)
        for name in ("vectors", "cross", "moments", "fit"):
            prefix = {"vectors": "default_", "fit": "anchor_"}.get(name, "linear_")
            close(getattr(layer.router, prefix + name), getattr(reference, name))
    for ours, theirs in zip(layer.experts.parameters(), plain.experts.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_rank_zero_without_an_anchor_is_default_backward_only(new_layer: Any) -> None:
    layer = new_layer(gradient="default-linear", linear_rank=0, linear_anchor="none", beta=BETA)
    other = new_layer(gradient="default", in_forward=False, beta=BETA)
    for step in range(3):
        for one in (layer, other):
            one.zero_grad()
            train_step(one, tokens(one, step), tokens(one, 10 + step))
        close(layer.router.weight.grad, other.router.weight.grad, 1e-6)
        assert torch.equal(layer.router.default_vectors, other.router.default_vectors)


def test_a_linear_expert_is_predicted_exactly() -> None:
    """With as many features as there are dimensions and hardly a ridge."""
    generator = torch.Generator().manual_seed(0)
    x_TH, projection_rH = torch.randn(400, 6, generator=generator), linear.projection(6, 6, 1)
    matrices_EDH = torch.randn(3, 4, 6, generator=generator)
    offsets_ED = torch.randn(3, 4, generator=generator)
    outputs_TED = torch.einsum("edh,th->ted", matrices_EDH, x_TH) + offsets_ED
    weights_TE = torch.rand(400, 3, generator=generator) + 0.1
    features_TF = linear.features(x_TH, projection_rH)
    moments_EFF = linear.token_moments(weights_TE, features_TF)
    cross_EDF = torch.einsum("te,ted,tf->edf", weights_TE, outputs_TED, features_TF)
    slopes_EDr, centre_Er = linear.coefficients(cross_EDF, moments_EFF, 1e-7)
    means_ED = cross_EDF[..., 0] / moments_EFF[:, 0, :1]
    grad_TD = torch.randn(400, 4, generator=generator)
    predicted_TE = linear.predictions(grad_TD, means_ED, slopes_EDr, centre_Er, features_TF)
    close(predicted_TE, torch.einsum("td,ted->te", grad_TD, outputs_TED), 1e-4)


def test_experts_without_tokens_and_poisoned_moments_have_no_slope() -> None:
    cross, moments = torch.zeros(4, 4, 3), torch.zeros(4, 3, 3)
    moments[1] = torch.eye(3)
    # Two tokens that were alike.
    alike = torch.tensor([1.0, 0.3, -0.7])
    moments[3] = 2 * torch.outer(alike, alike)
    cross[3] = 2 * torch.outer(torch.tensor([0.1, 0.2, 0.3, 0.4]), alike)
    cross[1] = 1.0
    cross[2], moments[2] = float("nan"), torch.eye(3)
    slopes, centres = linear.coefficients(cross, moments, RIDGE)
    assert (slopes[0] == 0).all()
    assert (centres[0] == 0).all()
    assert slopes[1].abs().min() > 0
    assert (slopes[2:] == 0).all()
    old = torch.ones(3, 2)
    sums = torch.tensor([[3.0, 3.0], [float("inf"), 1.0], [5.0, 5.0]])
    new = linear.average(old, sums, torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert new.tolist() == [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]]
