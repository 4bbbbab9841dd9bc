"""``default`` and ``default-linear`` on the planted task, made of ``maths/``."""

import torch
from torch import Tensor

from megatron_default_moe.maths import functional, linear
from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.planted.arms import Arm
from megatron_default_moe.planted.settings import Setting
from megatron_default_moe.planted.student import Routed, Student


class Default(Arm):
    """``default``: a default vector per expert, in the forward pass or for the gradient alone."""

    def __init__(
        self, options: RouterGradientConfig, setting: Setting, seeds: list[int], student: Student
    ) -> None:
        """Start at zero."""
        super().__init__(options, setting, seeds, student)
        shape = len(seeds), setting.experts
        self.vectors_SED = torch.zeros(*shape, setting.output)
        self.updates_SE = torch.zeros(shape, dtype=torch.int64)
        self.steps = torch.zeros(1, dtype=torch.int64)

    def _blended(self, routed: Routed) -> tuple[Tensor, Tensor]:
        """The seed's vectors after this step [E, D], and where they changed [E]."""
        weighting = self.options.weighting
        counts_E = torch.tensor(routed.counts)
        sums_ED = functional.expert_sums(
            routed.rows_RD, counts_E, routed.row_probs_R, weighting, padded=False
        )
        mass_E = functional.router_mass(routed.probs_TE, weighting)
        mean_ED, accepted_E = functional.mean_outputs(sums_ED, mass_E)
        old_ED = self.vectors_SED[routed.seed]
        return functional.blend(old_ED, mean_ED, accepted_E, self.options.beta), accepted_E

    def vectors(self, routed: Routed, training: bool) -> Tensor:
        """[E, D] the vectors that this pass uses."""
        vectors_ED, updates_E = self.vectors_SED[routed.seed], self.updates_SE[routed.seed]
        if training and self.options.order == "before-use":
            vectors_ED, accepted_E = self._blended(routed)
            updates_E = updates_E + accepted_E
        if self.options.bias_correction:
            return functional.bias_corrected(vectors_ED, updates_E, self.options.beta)
        return vectors_ED

    def output(self, routed: Routed, training: bool) -> Tensor:
        """The output with the default term, or with its gradient."""
        if not (training or (self.options.in_eval and self.options.in_forward)):
            return routed.output_TD
        inactive_TE = functional.inactive_probs(routed.dense_TE, routed.active_TE)
        vectors_ED = self.vectors(routed, training)
        if not self.options.in_forward:
            return functional.attach_default_gradient(routed.output_TD, inactive_TE, vectors_ED)
        if self.options.fade_in:
            fraction = functional.fade_in_fraction(self.steps, self.options.fade_in)
            inactive_TE = functional.faded(inactive_TE, fraction)
        return functional.add_default_term(routed.output_TD, inactive_TE, vectors_ED)

    def observe(self, routed: Routed) -> None:
        """Blend the step's means into the vectors."""
        after_ED, accepted_E = self._blended(routed)
        self.vectors_SED[routed.seed] = after_ED
        self.updates_SE[routed.seed] += accepted_E

    def end_step(self, active_STE: Tensor) -> None:
        """Count the step of a fade-in."""
        super().end_step(active_STE)
        self.steps += 1


class DefaultLinear(Default):
    """``default-linear``: stand-ins that are linear in the token; backward only."""

    def __init__(
        self, options: RouterGradientConfig, setting: Setting, seeds: list[int], student: Student
    ) -> None:
        """Draw each seed's projection; the moments start at zero."""
        super().__init__(options, setting, seeds, student)
        num, size = setting.experts, 1 + options.linear_rank
        self.projections = [
            linear.projection(setting.width, options.linear_rank, seed) for seed in seeds
        ]
        self.cross_SEDF = torch.zeros(len(seeds), num, setting.output, size)
        self.moments_SEFF = torch.zeros(len(seeds), num, size, size)
        self.fit_S2 = torch.zeros(len(seeds), 2)
        self.step_fit_S2 = torch.zeros(len(seeds), 2)

    def output(self, routed: Routed, training: bool) -> Tensor:
        """The output as it is; the gradient needs dy."""
        return routed.output_TD

    def _features(self, routed: Routed) -> Tensor:
        return linear.features(routed.tokens_TH, self.projections[routed.seed])

    def unused_gradient(self, routed: Routed, grad_TD: Tensor) -> Tensor:
        """The predictions, with their anchor."""
        seed = routed.seed
        slopes_EDr, centres_Er = linear.coefficients(
            self.cross_SEDF[seed], self.moments_SEFF[seed], self.options.linear_ridge
        )
        vectors_ED = self.vectors(routed, training=True)
        predicted_TE = linear.predictions(
            grad_TD, vectors_ED, slopes_EDr, centres_Er, self._features(routed)
        )
        active_grad_TE = routed.active_gradient(grad_TD)
        self.step_fit_S2[seed] = linear.fit(predicted_TE, active_grad_TE, routed.active_TE)
        strength = linear.anchor_strength(self.options.linear_anchor, self.fit_S2[seed])
        return linear.unused_gradient(predicted_TE, active_grad_TE, routed.probs_TE, strength)

    def observe(self, routed: Routed) -> None:
        """Average the step's moments into the state."""
        super().observe(routed)
        seed, beta = routed.seed, self.options.beta
        weights_R, weights_TE = torch.ones_like(routed.row_probs_R), routed.probs_TE
        if self.options.weighting == "uniform":
            weights_R = 1 / routed.row_probs_R
            weights_TE = (weights_TE != 0).float()
        features_TF = self._features(routed)
        cross_EDF = linear.row_moments(
            routed.rows_RD, routed.counts, weights_R, features_TF[routed.token_R]
        )
        moments_EFF = linear.token_moments(weights_TE, features_TF)
        mass_E = moments_EFF[:, 0, 0]
        old_cross, old_moments = self.cross_SEDF[seed], self.moments_SEFF[seed]
        self.cross_SEDF[seed] = linear.average(old_cross, cross_EDF, mass_E, beta)
        self.moments_SEFF[seed] = linear.average(old_moments, moments_EFF, mass_E, beta)
        self.fit_S2[seed] = linear.average_fit(self.fit_S2[seed], self.step_fit_S2[seed], beta)
