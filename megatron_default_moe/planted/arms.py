"""The estimators on the planted task, each made of the package's own functions (``maths/``).

What the routers of ``estimators/`` do with Megatron's layer, these do with the student; one object
holds the state of all seeds. An arm is a choice of flags (``RouterGradientConfig``).
"""

import torch
from torch import Tensor

from megatron_default_moe.maths import balance, functional, groups, hashing, sparsemixer
from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.planted.settings import Setting
from megatron_default_moe.planted.student import Routed, Student


class Arm:
    """``topk``, with or without the loss-free bias; and what the others may do differently."""

    own_choice = False
    """Whether the choice of experts is another than that of topk, with the same weights."""

    def __init__(
        self, options: RouterGradientConfig, setting: Setting, seeds: list[int], student: Student
    ) -> None:
        """Start the state of every seed."""
        self.options, self.setting, self.student = options, setting, student
        self.num_seeds = len(seeds)
        self.bias_SE = torch.zeros(len(seeds), setting.experts)

    def parameters(self) -> list[Tensor]:
        """What is trained beside the student."""
        return []

    def dense(self, logits_STE: Tensor) -> Tensor:
        """[S, T, E] the probabilities of all experts."""
        return torch.softmax(logits_STE, dim=-1)

    def choose(
        self, logits_STE: Tensor, dense_STE: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the multipliers [S, T, E], zero where unused, and the choice [S, T, E] bool."""
        scores_STE = dense_STE.detach() + self.bias_SE.unsqueeze(1)
        best_STK = scores_STE.topk(self.setting.topk, dim=-1).indices
        active_STE = torch.zeros_like(scores_STE, dtype=torch.bool).scatter(-1, best_STK, True)
        return dense_STE.masked_fill(~active_STE, 0), active_STE

    def balance_loss(self, dense_STE: Tensor, active_STE: Tensor) -> Tensor:
        """Megatron's load-balancing loss, ``c E sum_i f_i P_i``, added up over the seeds: []."""
        if self.options.loss_free_bias is not None:
            return dense_STE.new_zeros(())
        share_SE = active_STE.float().mean(1) / self.setting.topk
        scale = self.setting.balance * self.setting.experts
        return scale * (share_SE * dense_STE.mean(1)).sum()

    def output(self, routed: Routed, training: bool) -> Tensor:
        """[T, D] the layer's output, with the estimator's graph."""
        return routed.output_TD

    def unused_gradient(self, routed: Routed, grad_TD: Tensor) -> Tensor | None:
        """[T, E] a gradient of the unused experts' probabilities that needs dy, or None."""
        return None

    def observe(self, routed: Routed) -> None:
        """Take a seed's statistics of the step."""

    def end_step(self, active_STE: Tensor) -> None:
        """Change the state after an optimizer step."""
        if self.options.loss_free_bias is not None:
            counts_SE = active_STE.sum(1).float()
            moved = [
                balance.moved_bias(bias_E, counts_E, self.options.loss_free_bias)
                for bias_E, counts_E in zip(self.bias_SE, counts_SE, strict=True)
            ]
            self.bias_SE = torch.stack(moved)


class Dense(Arm):
    """``dense``: the sparse forward pass with the dense mixture's router gradient."""

    def unused_gradient(self, routed: Routed, grad_TD: Tensor) -> Tensor:
        """``<dy, E_i(x)>`` at unused experts."""
        outputs_TED = self.student.all_outputs(routed.seed, routed.tokens_TH)
        gradient_TE = (outputs_TED @ grad_TD.unsqueeze(-1)).squeeze(-1)
        return gradient_TE.masked_fill(routed.active_TE, 0)


class ExpertGroup(Arm):
    """``expert-group``: stand-ins from tokens of the same group, made anew each step."""

    def output(self, routed: Routed, training: bool) -> Tensor:
        """The output, with the group term or its gradient."""
        if not training:
            return routed.output_TD
        size = self.options.expert_group_size
        group_TE = groups.membership(routed.logits_TE, size)
        sums_EED = groups.pair_sums(
            routed.rows_RD, routed.counts, routed.row_probs_R, group_TE[routed.token_R], 0
        )
        return groups.attach(
            routed.output_TD,
            functional.inactive_probs(routed.dense_TE, routed.active_TE),
            group_TE,
            groups.table(sums_EED, groups.pair_counts(routed.active_TE, group_TE)),
            size,
            self.options.expert_group_in_forward,
        )


class SparseMixerV2(Arm):
    """``sparsemixer-v2``: drawn experts, Heun's rule."""

    own_choice = True

    def __init__(
        self, options: RouterGradientConfig, setting: Setting, seeds: list[int], student: Student
    ) -> None:
        """Start the draws of every seed."""
        super().__init__(options, setting, seeds, student)
        self.seeds, self.step = seeds, 0

    def _uniforms(self, num_tokens: int, columns: int) -> Tensor:
        """[S T, columns] numbers in (0, 1) of this step."""
        place_T = torch.arange(num_tokens)
        keys = [torch.tensor([hash_of(seed, self.step), self.step]) for seed in self.seeds]
        return torch.cat([hashing.uniforms(key, place_T, columns) for key in keys])

    def _choices(self, logits_XE: Tensor, drawn_XC: Tensor | None) -> list[sparsemixer.Choice]:
        uniforms_KXE = coins_KX = None
        if drawn_XC is not None:
            drawn_KXC = drawn_XC.unflatten(1, (self.setting.topk, -1)).transpose(0, 1)
            uniforms_KXE, coins_KX = drawn_KXC[..., :-1], drawn_KXC[..., -1]
        return sparsemixer.sparsemixer_v2(
            logits_XE, self.setting.topk, self.options.mask_width, uniforms_KXE, coins_KX
        )

    def choose(
        self, logits_STE: Tensor, dense_STE: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """Draw in training, take the best in evaluation."""
        num_experts, drawn_XC = self.setting.experts, None
        if training:
            drawn_XC = self._uniforms(logits_STE.shape[1], self.setting.topk * (num_experts + 1))
        choices = self._choices(logits_STE.flatten(0, 1), drawn_XC)
        probs_XE, chosen_XE = sparsemixer.combine(choices, num_experts)
        return probs_XE.view_as(logits_STE), chosen_XE.view_as(logits_STE)

    def end_step(self, active_STE: Tensor) -> None:
        """Count the step."""
        self.step += 1


class SparseMixer(SparseMixerV2):
    """``sparsemixer``: the same with the mid-point rule, and a learned scale of the output."""

    def __init__(
        self, options: RouterGradientConfig, setting: Setting, seeds: list[int], student: Student
    ) -> None:
        """Start the scale at one."""
        super().__init__(options, setting, seeds, student)
        self.scale_SD = torch.ones(len(seeds), setting.output, requires_grad=True)

    def parameters(self) -> list[Tensor]:
        """Omega."""
        return [self.scale_SD]

    def _choices(self, logits_XE: Tensor, drawn_XC: Tensor | None) -> list[sparsemixer.Choice]:
        uniforms_XE = coin_X = None
        if drawn_XC is not None:
            uniforms_XE, coin_X = drawn_XC[:, :-1], drawn_XC[:, -1]
        width = self.options.mask_width
        return [sparsemixer.sparsemixer(logits_XE, width, uniforms_XE, coin_X)]

    def output(self, routed: Routed, training: bool) -> Tensor:
        """The output, scaled."""
        return routed.output_TD * self.scale_SD[routed.seed]


class ReMoE(Arm):
    """``remoe``: ReLU gates, and a sparsity loss whose weight adapts."""

    own_choice = True

    def __init__(
        self, options: RouterGradientConfig, setting: Setting, seeds: list[int], student: Student
    ) -> None:
        """Start lambda."""
        super().__init__(options, setting, seeds, student)
        self.weight_S = torch.full((len(seeds),), options.remoe_lambda)

    def dense(self, logits_STE: Tensor) -> Tensor:
        """The gates."""
        return torch.relu(logits_STE)

    def choose(
        self, logits_STE: Tensor, dense_STE: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """Run every expert whose gate is open."""
        return dense_STE, dense_STE > 0

    def balance_loss(self, dense_STE: Tensor, active_STE: Tensor) -> Tensor:
        """The sparsity loss, added up over the seeds."""
        tokens, topk = dense_STE.shape[1], self.setting.topk
        parts = zip(self.weight_S, dense_STE.mean(1), active_STE.sum(1).float(), strict=True)
        losses = [balance.sparsity_loss(*part, tokens, topk) for part in parts]
        return torch.stack(losses).sum()

    def end_step(self, active_STE: Tensor) -> None:
        """Move lambda."""
        experts, topk = self.setting.experts, self.setting.topk
        possible = torch.tensor(float(active_STE[0].numel()))
        factors = [
            balance.sparsity_weight_factor(
                routed, possible, topk, experts, self.options.remoe_factor
            )
            for routed in active_STE.sum((1, 2)).float()
        ]
        self.weight_S = self.weight_S * torch.stack(factors)


def hash_of(seed: int, step: int) -> int:
    """32 bits that differ for every seed and step."""
    return int(hashing.mix(hashing.mix(torch.tensor(seed)) ^ step))
