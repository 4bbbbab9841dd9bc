"""The teacher: experts behind a hidden partition of the tokens, for many seeds at once.

S seeds, T tokens, N hidden experts, H width of a token, D width of a target. Every seed draws from
generators of its own, so that its numbers do not depend on which others run beside it.

    target = sqrt(rho) b_z + sqrt(1 - rho) g_z(x) + sqrt(0.01) noise,    z the hidden expert of x

b_z is the mean of an expert (less the mean over experts), g_z linear, with mean zero and variance
one over the tokens of z: rho is the share of the signal that the means of the experts carry.
"""

import dataclasses

import torch
from torch import Tensor

from megatron_default_moe.planted.settings import Setting

NOISE = 0.01
"""Variance of the target's noise."""
_CALIBRATED = 8192
"""Tokens over which an expert's function is centred and scaled."""
_NEAR = 0.7
"""Share of a word in its tokens' variance."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens and what is asked of them."""

    tokens_STH: Tensor
    expert_ST: Tensor
    """[S, T] int64, the hidden expert z."""
    clean_STD: Tensor
    """The target without noise."""
    target_STD: Tensor


def generators(seeds: list[int], purpose: int) -> list[torch.Generator]:
    """Return a generator for each seed and this purpose (a small number)."""
    return [torch.Generator().manual_seed(1000 * seed + purpose) for seed in seeds]


def normal(sources: list[torch.Generator], *shape: int) -> Tensor:
    """[S, *shape] from N(0, 1), each seed's from its own generator."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources])


class Teacher:
    """The hidden experts of every seed."""

    def __init__(self, setting: Setting, seeds: list[int]) -> None:
        """Draw them; the mean and scale of their functions are those of a large sample."""
        self.setting = setting
        sources = generators(seeds, 0)
        width, count, output = setting.width, setting.teachers, setting.output
        self.scores_SHN = normal(sources, width, count)
        offsets_SND = normal(sources, count, output)
        self.offsets_SND = offsets_SND - offsets_SND.mean(1, keepdim=True)
        self.matrices_SNHD = normal(sources, count, width, output) / width**0.5
        self.words_SCH = normal(sources, setting.words, width)
        even = torch.arange(setting.words) % count
        self.expert_SC = torch.stack(
            [even[torch.randperm(setting.words, generator=source)] for source in sources]
        )
        variance_H = 1 / torch.arange(1, width + 1)
        scale_H = (variance_H / variance_H.mean()).sqrt()
        self.basis_SHH = scale_H.unsqueeze(-1) * torch.linalg.qr(normal(sources, width, width))[0]
        self.means_SND = torch.zeros_like(offsets_SND)
        self.scales_SN = torch.ones(len(seeds), count)
        self._calibrate(sources)

    def _calibrate(self, sources: list[torch.Generator]) -> None:
        tokens_STH, expert_ST = self._draw(sources, _CALIBRATED)
        for s, (tokens_TH, expert_T) in enumerate(zip(tokens_STH, expert_ST, strict=True)):
            for n, matrix_HD in enumerate(self.matrices_SNHD[s]):
                value_TD = tokens_TH[expert_T == n] @ matrix_HD
                if len(value_TD):
                    self.means_SND[s, n] = value_TD.mean(0)
                    self.scales_SN[s, n] = value_TD.var(0, correction=0).mean().sqrt()

    def _draw(self, sources: list[torch.Generator], count: int) -> tuple[Tensor, Tensor]:
        """[S, T, H] tokens and [S, T] their experts."""
        tokens_STH = normal(sources, count, self.setting.width)
        if self.setting.kind == "words":
            word_ST = torch.stack(
                [torch.randint(self.setting.words, (count,), generator=one) for one in sources]
            )
            index_STH = word_ST.unsqueeze(-1).expand_as(tokens_STH)
            centre_STH = self.words_SCH.gather(1, index_STH)
            tokens_STH = _NEAR**0.5 * centre_STH + (1 - _NEAR) ** 0.5 * tokens_STH
            return tokens_STH, self.expert_SC.gather(1, word_ST)
        if self.setting.spectrum:
            tokens_STH = tokens_STH @ self.basis_SHH
        return tokens_STH, (tokens_STH @ self.scores_SHN).argmax(-1)

    def sample(self, sources: list[torch.Generator], count: int) -> Batch:
        """Draw ``count`` tokens for each seed, from its generator."""
        tokens_STH, expert_ST = self._draw(sources, count)
        num_seeds, num, width, output = self.matrices_SNHD.shape
        flat_SHX = self.matrices_SNHD.transpose(1, 2).reshape(num_seeds, width, num * output)
        all_STND = (tokens_STH @ flat_SHX).view(num_seeds, count, num, output)
        index_STD = expert_ST.unsqueeze(-1).expand(-1, -1, output)
        value_STD = all_STND.gather(2, index_STD.unsqueeze(2)).squeeze(2)
        value_STD = value_STD - self.means_SND.gather(1, index_STD)
        value_STD = value_STD / self.scales_SN.gather(1, expert_ST).unsqueeze(-1)
        share = self.setting.mean_share
        clean_STD = share**0.5 * self.offsets_SND.gather(1, index_STD)
        clean_STD = clean_STD + (1 - share) ** 0.5 * value_STD
        noise_STD = normal(sources, count, output)
        return Batch(tokens_STH, expert_ST, clean_STD, clean_STD + NOISE**0.5 * noise_STD)
