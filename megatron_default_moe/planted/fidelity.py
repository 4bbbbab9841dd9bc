"""How near each estimator's router gradient is to the dense mixture's, at the same weights.

TopK trains; the estimators look on, keep their statistics, and are asked for the gradient that they
would have given. Estimators with a choice of their own have none at these weights.
"""

import torch
from torch import Tensor

from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.planted import measures, task
from megatron_default_moe.planted.arms import Arm
from megatron_default_moe.planted.settings import Setting
from megatron_default_moe.planted.task import Batch
from megatron_default_moe.planted.training import CLASSES, Trained, rate_at

_PROBED = 1024
SHARES = (0.2, 0.6, 1.0)
"""When gradients are compared, in shares of a training."""
TRUE = "the dense mixture"


def comparable(arms: dict[str, RouterGradientConfig]) -> dict[str, RouterGradientConfig]:
    """Return the arms whose choice of experts is TopK's, given the same weights."""
    return {
        name: one
        for name, one in arms.items()
        if not CLASSES[one.gradient].own_choice and one.loss_free_bias is None
    }


class Watched(Trained):
    """A TopK student that estimators watch."""

    def __init__(
        self, arms: dict[str, RouterGradientConfig], setting: Setting, seeds: list[int]
    ) -> None:
        """Start the student and the estimators that choose as it does."""
        super().__init__(RouterGradientConfig(gradient="topk"), setting, seeds)
        options = {**comparable(arms), TRUE: RouterGradientConfig(gradient="dense")}
        self.watching: dict[str, Arm] = {
            name: CLASSES[one.gradient](one, setting, seeds, self.student)
            for name, one in options.items()
        }

    def gradients(self, batch: Batch, watching: dict[str, Arm]) -> dict[str, Tensor]:
        """Return each estimator's gradient of the router's weights: [S, H, E]."""
        logits_STE = self.student.logits(batch.tokens_STH)
        dense_STE = self.arm.dense(logits_STE)
        choice = self.arm.choose(logits_STE, dense_STE, training=True)
        passes = self.student.forward(batch.tokens_STH, logits_STE, dense_STE, *choice)
        found = {}
        for name, arm in watching.items():
            ends, gradients = [], []
            for one in passes:
                target_TD = batch.target_STD[one.seed]
                grad_TD = 2 * (one.output_TD.detach() - target_TD) / target_TD.numel()
                ends.append(arm.output(one, training=True))
                gradients.append(grad_TD)
                unused_TE = arm.unused_gradient(one, grad_TD)
                if unused_TE is not None:
                    ends.append(one.dense_TE)
                    gradients.append(unused_TE)
            (found[name],) = torch.autograd.grad(
                ends, self.student.router_SHE, gradients, retain_graph=True
            )
        return found

    def look_on(self, batch: Batch) -> None:
        """Let the estimators see a training step's batch, before the step."""
        with torch.no_grad():
            logits_STE = self.student.logits(batch.tokens_STH)
            dense_STE = self.arm.dense(logits_STE)
            choice = self.arm.choose(logits_STE, dense_STE, training=True)
            passes = self.student.forward(batch.tokens_STH, logits_STE, dense_STE, *choice)
            for arm in self.watching.values():
                for one in passes:
                    target_TD = batch.target_STD[one.seed]
                    grad_TD = 2 * (one.output_TD - target_TD) / target_TD.numel()
                    arm.unused_gradient(one, grad_TD)
                    arm.observe(one)


def measure(
    setting: Setting, arms: dict[str, RouterGradientConfig], seeds: list[int], steps: list[int]
) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Return, for each arm and probed step, cosine and norm ratio to the dense gradient by seed.

    Args:
        setting: the task; TopK trains for as long as the last probe.
        arms: options by the arm's name; those with a choice of their own are left out.
        seeds: as in training: the same teacher, weights and batches.
        steps: when to probe, ascending, on the same held-out tokens.
    """
    teacher = task.Teacher(setting, seeds)
    probe = teacher.sample(task.generators(seeds, 4), _PROBED)
    sources = task.generators(seeds, 3)
    watched = Watched(arms, setting, seeds)
    found: dict[str, list[tuple[list[float], list[float]]]] = {
        name: [] for name in watched.watching if name != TRUE
    }
    for step in range(max(steps)):
        batch = teacher.sample(sources, setting.tokens)
        watched.look_on(batch)
        watched.step(batch, rate_at(step, setting.steps))
        if step + 1 in steps:
            gradients = watched.gradients(probe, watched.watching)
            for name, one in found.items():
                pairs = [
                    measures.cosine_and_ratio(*pair)
                    for pair in zip(gradients[name], gradients[TRUE], strict=True)
                ]
                one.append(([cosine for cosine, _ in pairs], [ratio for _, ratio in pairs]))
    return found
