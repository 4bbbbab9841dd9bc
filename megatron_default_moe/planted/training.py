"""Training the arms side by side: the same teacher, first weights and batches for all of a seed."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.planted import measures, task
from megatron_default_moe.planted.arms import Arm, Dense, ExpertGroup, ReMoE, SparseMixer
from megatron_default_moe.planted.arms import SparseMixerV2 as V2
from megatron_default_moe.planted.settings import Setting
from megatron_default_moe.planted.student import Student
from megatron_default_moe.planted.task import Batch
from megatron_default_moe.planted.vectors import Default, DefaultLinear

CLASSES: dict[str, type[Arm]] = {
    "topk": Arm,
    "default": Default,
    "default-linear": DefaultLinear,
    "dense": Dense,
    "sparsemixer": SparseMixer,
    "sparsemixer-v2": V2,
    "expert-group": ExpertGroup,
    "remoe": ReMoE,
}
_HELD_OUT = 2048
EVERY = 25
"""Steps between two looks at the held-out tokens."""
_WARM_UP = 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an arm, a number for each seed."""

    fvu: list[float]
    """Fraction of variance unexplained on held-out tokens, as the arm runs in evaluation."""
    nmi: list[float]
    """Normalised mutual information of the router's first choice and the hidden expert."""
    load: list[float]
    dead: list[float]
    reached: list[int | None]
    """The first step (of every 25) at which the FVU was below the threshold."""
    curve: list[list[float]]
    """FVU by seed, at every 25th step."""


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate at a step: warm-up, then a cosine to a tenth."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    progress = (step - _WARM_UP) / max(1, steps - _WARM_UP)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


class Trained:
    """One arm's student, estimator and optimizer, for all seeds."""

    def __init__(self, options: RouterGradientConfig, setting: Setting, seeds: list[int]) -> None:
        """Start them."""
        self.setting = setting
        self.student = Student(setting, seeds)
        self.arm = CLASSES[options.gradient](options, setting, seeds, self.student)
        self.weights = [*self.student.parameters(), *self.arm.parameters()]
        self.optimizer = torch.optim.Adam(
            self.weights, lr=setting.rate, betas=(0.9, 0.99), foreach=True
        )
        self.curve: list[list[float]] = []

    def step(self, batch: Batch, rate: float) -> None:
        """Take an optimizer step on a batch."""
        arm = self.arm
        logits_STE = self.student.logits(batch.tokens_STH)
        dense_STE = arm.dense(logits_STE)
        probs_STE, active_STE = arm.choose(logits_STE, dense_STE, training=True)
        passes = self.student.forward(
            batch.tokens_STH, logits_STE, dense_STE, probs_STE, active_STE
        )
        output_STD = torch.stack([arm.output(one, training=True) for one in passes])
        grad_STD = 2 * (output_STD.detach() - batch.target_STD) / output_STD[0].numel()
        ends: list[Tensor] = [output_STD, arm.balance_loss(dense_STE, active_STE)]
        gradients = [grad_STD, torch.ones(())]
        unused = [arm.unused_gradient(*pair) for pair in zip(passes, grad_STD, strict=True)]
        given = [one for one in unused if one is not None]
        if given:
            ends.append(dense_STE)
            gradients.append(torch.stack(given))
        kept = [(end, grad) for end, grad in zip(ends, gradients, strict=True) if end.requires_grad]
        torch.autograd.backward([end for end, _ in kept], [grad for _, grad in kept])
        self.optimizer.param_groups[0]["lr"] = self.setting.rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for one in passes:
            arm.observe(one)
        arm.end_step(active_STE)

    @torch.no_grad()
    def look(self, held_out: Batch) -> tuple[list[float], Tensor, Tensor]:
        """Return each seed's FVU, the dense probabilities and the choice on held-out tokens."""
        logits_STE = self.student.logits(held_out.tokens_STH)
        dense_STE = self.arm.dense(logits_STE)
        probs_STE, active_STE = self.arm.choose(logits_STE, dense_STE, training=False)
        passes = self.student.forward(
            held_out.tokens_STH, logits_STE, dense_STE, probs_STE, active_STE
        )
        outputs = [self.arm.output(one, training=False) for one in passes]
        fvu = [
            measures.unexplained(*pair) for pair in zip(outputs, held_out.clean_STD, strict=True)
        ]
        return fvu, logits_STE, active_STE

    def outcome(self, held_out: Batch) -> Outcome:
        """Measure what came of it."""
        fvu, logits_STE, active_STE = self.look(held_out)
        pairs = zip(logits_STE.argmax(-1), held_out.expert_ST, strict=True)
        by_seed = list(zip(*self.curve, strict=True))
        reached = [
            next((EVERY * (i + 1) for i, at in enumerate(one) if at < self.setting.threshold), None)
            for one in by_seed
        ]
        return Outcome(
            fvu=fvu,
            nmi=[measures.mutual_information(*pair) for pair in pairs],
            load=[measures.greatest_load(active_TE) for active_TE in active_STE],
            dead=[measures.dead_experts(active_TE) for active_TE in active_STE],
            reached=reached or [None] * len(fvu),
            curve=[list(one) for one in by_seed],
        )


def train(
    setting: Setting,
    arms: dict[str, RouterGradientConfig],
    seeds: list[int],
    progress: Callable[[int], None] = lambda step: None,
) -> dict[str, Outcome]:
    """Train every arm on the same batches, and return what came of each.

    Args:
        setting: the task and the student.
        arms: the estimators' options, by the name of the arm.
        seeds: of teacher, first weights and batches.
        progress: called with the number of steps taken, every 25 steps.
    """
    teacher = task.Teacher(setting, seeds)
    held_out = teacher.sample(task.generators(seeds, 2), _HELD_OUT)
    sources = task.generators(seeds, 3)
    trained = {name: Trained(options, setting, seeds) for name, options in arms.items()}
    for step in range(setting.steps):
        batch = teacher.sample(sources, setting.tokens)
        for one in trained.values():
            one.step(batch, rate_at(step, setting.steps))
        if (step + 1) % EVERY == 0:
            for one in trained.values():
                one.curve.append(one.look(held_out)[0])
            progress(step + 1)
    return {name: one.outcome(held_out) for name, one in trained.items()}
