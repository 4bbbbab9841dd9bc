"""The student: a router and experts that run on the tokens routed to them, for many seeds at once.

S seeds, T tokens, E experts, H width of a token, F hidden width, D width of an output, R rows: a
seed's (expert, token) pairs, sorted by expert, as Megatron's dispatchers hand them to the experts.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_default_moe.planted import task
from megatron_default_moe.planted.settings import Setting


@dataclasses.dataclass(frozen=True)
class Routed:
    """One seed's tokens on their way through the layer."""

    seed: int
    """Its place among the seeds."""
    tokens_TH: Tensor
    logits_TE: Tensor
    """Detached."""
    dense_TE: Tensor
    """Probabilities of all experts, with a graph."""
    probs_TE: Tensor
    """Multipliers, zero at unused experts."""
    active_TE: Tensor
    token_R: Tensor
    """[R] int64, each row's token."""
    counts: list[int]
    """Rows of each expert."""
    row_probs_R: Tensor
    rows_RD: Tensor
    """What the experts returned, times its probability; detached."""
    output_TD: Tensor
    """The sum of each token's rows, with a graph."""

    def active_gradient(self, grad_TD: Tensor) -> Tensor:
        """Return ``g_a = <dy, E_a(x)>`` [T, E] at used experts, zero elsewhere."""
        product_R = (grad_TD[self.token_R] * self.rows_RD).sum(-1)
        safe_R = torch.where(self.row_probs_R != 0, product_R / self.row_probs_R, 0)
        counts = torch.tensor(self.counts)
        expert_R = torch.arange(len(self.counts)).repeat_interleave(counts)
        return torch.zeros_like(self.probs_TE).index_put((self.token_R, expert_R), safe_R)


class Places(NamedTuple):
    """Where rows stand: those of all seeds one after the other, by seed, expert and token."""

    seed_R: Tensor
    expert_R: Tensor
    token_R: Tensor
    counts_SE: Tensor

    @classmethod
    def of(cls, active_STE: Tensor) -> "Places":
        """Find the rows of a choice of experts."""
        seed_R, expert_R, token_R = active_STE.transpose(1, 2).nonzero(as_tuple=True)
        return cls(seed_R, expert_R, token_R, active_STE.sum(1))


class Student:
    """Two-layer SiLU experts and a router without a bias; the router starts near zero."""

    def __init__(self, setting: Setting, seeds: list[int]) -> None:
        """Draw the weights, each seed's from a generator of its own."""
        self.setting = setting
        sources = task.generators(seeds, 1)
        width, hidden, output = setting.width, setting.hidden, setting.output
        self.router_SHE = 0.02 * task.normal(sources, width, setting.experts)
        self.first_SEHF = task.normal(sources, setting.experts, width, hidden) / width**0.5
        self.second_SEFD = task.normal(sources, setting.experts, hidden, output) / hidden**0.5
        self.first_bias_SEF = torch.zeros(len(seeds), setting.experts, hidden)
        self.second_bias_SED = torch.zeros(len(seeds), setting.experts, output)
        for weight in self.parameters():
            weight.requires_grad_()

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [
            *(self.router_SHE, self.first_SEHF, self.first_bias_SEF),
            *(self.second_SEFD, self.second_bias_SED),
        ]

    def logits(self, tokens_STH: Tensor) -> Tensor:
        """[S, T, E] the router's."""
        return tokens_STH @ self.router_SHE

    def rows(self, tokens_STH: Tensor, places: Places) -> Tensor:
        """Run the experts on the rows: [R, D] (all seeds' rows)."""
        num_experts = places.counts_SE.shape[1]
        counts_G = places.counts_SE.flatten()
        room = int(counts_G.max())
        group_R = places.seed_R * num_experts + places.expert_R
        first_G = counts_G.cumsum(0) - counts_G
        slot_R = group_R * room + torch.arange(len(group_R)) - first_G[group_R]
        padded_GCH = tokens_STH.new_zeros(len(counts_G) * room, tokens_STH.shape[-1])
        padded_GCH[slot_R] = tokens_STH[places.seed_R, places.token_R]
        padded_GCH = padded_GCH.view(len(counts_G), room, tokens_STH.shape[-1])
        hidden_GCF = torch.baddbmm(
            self.first_bias_SEF.flatten(0, 1).unsqueeze(1),
            padded_GCH,
            self.first_SEHF.flatten(0, 1),
        )
        output_GCD = torch.baddbmm(
            self.second_bias_SED.flatten(0, 1).unsqueeze(1),
            torch.nn.functional.silu(hidden_GCF),
            self.second_SEFD.flatten(0, 1),
        )
        return output_GCD.flatten(0, 1).index_select(0, slot_R)

    @torch.no_grad()
    def all_outputs(self, seed: int, tokens_TH: Tensor) -> Tensor:
        """[T, E, D] what every expert of one seed would return, without a graph."""
        hidden_ETF = tokens_TH @ self.first_SEHF[seed] + self.first_bias_SEF[seed].unsqueeze(1)
        output_ETD = torch.nn.functional.silu(hidden_ETF) @ self.second_SEFD[seed]
        return (output_ETD + self.second_bias_SED[seed].unsqueeze(1)).transpose(0, 1)

    def forward(
        self,
        tokens_STH: Tensor,
        logits_STE: Tensor,
        dense_STE: Tensor,
        probs_STE: Tensor,
        active_STE: Tensor,
    ) -> list[Routed]:
        """Run the layer on a choice of experts, and return each seed's part of it.

        Args:
            tokens_STH: [S, T, H].
            logits_STE: [S, T, E].
            dense_STE: [S, T, E] probabilities of all experts.
            probs_STE: [S, T, E] multipliers, zero at unused experts.
            active_STE: [S, T, E] bool the choice.
        """
        num_seeds, num_tokens = tokens_STH.shape[:2]
        places = Places.of(active_STE)
        row_probs_R = probs_STE[places.seed_R, places.token_R, places.expert_R]
        rows_RD = self.rows(tokens_STH, places) * row_probs_R.unsqueeze(-1)
        zeros_XD = rows_RD.new_zeros(num_seeds * num_tokens, rows_RD.shape[1])
        output_XD = zeros_XD.index_add(0, places.seed_R * num_tokens + places.token_R, rows_RD)
        sizes = places.counts_SE.sum(1).tolist()
        parts = (
            tokens_STH,
            logits_STE.detach(),
            dense_STE.unbind(),
            probs_STE.detach(),
            active_STE,
            places.token_R.split(sizes),
            places.counts_SE.tolist(),
            row_probs_R.detach().split(sizes),
            rows_RD.detach().split(sizes),
            output_XD.view(num_seeds, num_tokens, -1).unbind(),
        )
        return [Routed(seed, *part) for seed, part in enumerate(zip(*parts, strict=True))]
