"""Float64 references of one MoE layer, from its weights alone, for the tests of the layer."""

from typing import Any

import torch
from torch import Tensor

SEQUENCE, BATCH = 13, 3


def tokens(layer: Any, seed: int = 0, sequence: int = SEQUENCE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequence, BATCH, layer.config.hidden_size, generator=generator)


def expert_weights(layer: Any) -> list[tuple[Tensor, Tensor]]:
    """Both weights of every expert in float64 on the CPU, of local or grouped experts."""
    experts = layer.experts
    if hasattr(experts, "local_experts"):
        pairs = [(one.linear_fc1.weight, one.linear_fc2.weight) for one in experts.local_experts]
    else:
        pairs = [
            tuple(getattr(fc, f"weight{i}") for fc in (experts.linear_fc1, experts.linear_fc2))
            for i in range(experts.num_local_experts)
        ]
    return [(fc1.double().cpu(), fc2.double().cpu()) for fc1, fc2 in pairs]


def expert_outputs(layer: Any, x_TD: Tensor) -> Tensor:
    """[T, E, D] float64: every expert on every token, from the weights alone (SwiGLU)."""
    outputs = []
    for fc1, fc2 in expert_weights(layer):
        gate, up = (x_TD.double().cpu() @ fc1.T).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ fc2.T)
    return torch.stack(outputs, dim=1)


def reference(layer: Any, x: Tensor, vectors_ED: Tensor) -> dict[str, Tensor]:
    """What the formula gives in float64: output, routing, and each token's v_i."""
    x_TD = x.detach().reshape(-1, x.shape[-1]).double().cpu()
    probs_TE = torch.softmax(x_TD @ layer.router.weight.detach().double().cpu().T, dim=-1)
    active_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    active_TE.scatter_(1, probs_TE.topk(layer.config.moe_router_topk, dim=1).indices, True)
    own_TED = expert_outputs(layer, x_TD).detach()
    values_TED = torch.where(active_TE.unsqueeze(-1), own_TED, vectors_ED.double().cpu())
    output_TD = (probs_TE.unsqueeze(-1) * values_TED).sum(1)
    return {
        "x": x_TD,
        "probs": probs_TE,
        "active": active_TE,
        "own": own_TED,
        "values": values_TED,
        "output": output_TD,
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, in the Euclidean norm; NaN if nothing was expected."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm())


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.2e}"


def record_routing(layer: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Collect (logits, probs, map), each [T, E], of every routing from now on."""
    recorded: list[tuple[Tensor, Tensor, Tensor]] = []
    routing = layer.router.routing

    def recording(logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probs_TE, map_TE = routing(logits, padding_mask)
        flat_TE = logits.detach().reshape(map_TE.shape)
        recorded.append((flat_TE, probs_TE.detach(), map_TE))
        return probs_TE, map_TE

    layer.router.routing = recording
    return recorded


def scores(function: str, logits_TE: Tensor) -> Tensor:
    """[T, E] of a score function in float64."""
    if function == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    if function == "sigmoid":
        return 1 / (1 + torch.exp(-logits_TE))
    return torch.log1p(torch.exp(logits_TE)).sqrt()


def chosen(scores_TE: Tensor, topk: int, groups: int = 1, group_topk: int = 1) -> Tensor:
    """[T, E] bool: the experts a token chooses, token by token (DeepSeek-V3's groups of experts).

    A group counts as much as its best ``topk / group_topk`` experts together.
    """
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    size = scores_TE.shape[1] // groups
    for t, row in enumerate(scores_TE.tolist()):
        worth = [
            sum(sorted(row[g * size : (g + 1) * size])[-(topk // group_topk) :])
            for g in range(groups)
        ]
        open_groups = sorted(range(groups), key=worth.__getitem__)[-group_topk:]
        experts = [e for e in range(len(row)) if e // size in open_groups]
        for e in sorted(experts, key=row.__getitem__)[-topk:]:
            chosen_TE[t, e] = True
    return chosen_TE
