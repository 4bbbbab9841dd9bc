"""``default-linear`` (ours): stand-ins for unused experts that are linear in the token.

Backward only: the forward pass is TopK's. Formulas in ``maths/linear.py``. Where the prediction of
the *used* expert misses what it really did, the anchor adds as much to all others, in proportion
(``scaled``) to how well the predictions have done so far.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_default_moe.estimators.default import DefaultMoERouter
from megatron_default_moe.layers.observed_router import ObservedTopKRouter
from megatron_default_moe.maths import functional, linear


class _Pass:
    """What the end of a layer leaves for its beginning, in the backward pass of a micro-batch."""

    predicted_TE: Tensor | None = None


class _Predict(torch.autograd.Function):
    """Identity on the output; its backward pass makes the predictions ``<dy, v_j>``."""

    @staticmethod
    def forward(ctx: Any, output_TD: Tensor, left: _Pass, *constants: Tensor) -> Tensor:
        ctx.left = left
        ctx.save_for_backward(*constants)
        return output_TD.view_as(output_TD)

    @staticmethod
    def backward(ctx: Any, *grads_TD: Tensor) -> tuple[Tensor | None, ...]:
        constants = ctx.saved_tensors
        ctx.left.predicted_TE = linear.predictions(grads_TD[0], *constants)
        return grads_TD[0], None, *(None for _ in constants)


class _Anchored(torch.autograd.Function):
    """Identity on the multipliers; its backward pass gives unused experts their gradient.

    By then Megatron's own backward pass has brought ``g_a = <dy, E_a(x)>`` of the used ones here.
    """

    @staticmethod
    def forward(
        ctx: Any, probs_TE: Tensor, dense_TE: Tensor, left: _Pass, router: "DefaultLinearRouter"
    ) -> Tensor:
        ctx.left, ctx.router, ctx.dtype = left, router, dense_TE.dtype
        ctx.save_for_backward(probs_TE)
        return probs_TE.view_as(probs_TE)

    @staticmethod
    def backward(ctx: Any, *grads_TE: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (probs_TE,), predicted_TE = ctx.saved_tensors, ctx.left.predicted_TE
        assert predicted_TE is not None, "the end of the layer has not run backward yet"
        ctx.left.predicted_TE = None
        router: DefaultLinearRouter = ctx.router
        active_TE = probs_TE != 0
        # Only passes whose gradients the optimizer takes have one.
        router.count_fit(grads_TE[0], predicted_TE, active_TE)
        unused_TE = linear.unused_gradient(
            predicted_TE, grads_TE[0], probs_TE, router.anchor_strength()
        )
        return grads_TE[0], unused_TE.to(ctx.dtype), None, None


class DefaultLinearRouter(DefaultMoERouter):
    """Default vectors that are linear in the token, for the router's gradient alone.

    State beside the default vectors', F = 1 + r: ``linear_cross`` [E, D, F], ``linear_moments``
    [E, F, F] and ``anchor_fit`` [2], float32: ``4 E (D F + F^2) + 8`` bytes a layer, once more for
    the running step and once for the slopes. The step's all-reduce grows by as much. Extra work: a
    product [T, D]x[D, E r] in the backward pass; E solves of r x r a step.
    """

    fp32_buffers = (
        *DefaultMoERouter.fp32_buffers,
        *("linear_cross", "linear_moments", "anchor_fit"),
        *("local_cross", "local_moments", "local_fit", "slopes", "centres", "projection"),
    )
    needs_tokens = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the router; the arguments are Megatron's."""
        super().__init__(*args, **kwargs)
        rank, num_local = self.options.linear_rank, self.local_sums.shape[0]
        size, width, num = 1 + rank, self.vector_width, self.num_experts
        self._new_buffer("linear_cross", (num, width, size))
        self._new_buffer("linear_moments", (num, size, size))
        self._new_buffer("anchor_fit", (2,))
        self._new_buffer("local_cross", (num_local, width, size), persistent=False)
        self._new_buffer("local_moments", (num, size, size), persistent=False)
        self._new_buffer("local_fit", (2,), persistent=False)
        self._new_buffer("slopes", (num, width, rank), persistent=False)
        self._new_buffer("centres", (num, rank), persistent=False)
        self._new_buffer("projection", (rank, width), persistent=False)
        # Whether the slopes are those of the moments: not after a step, nor after loading.
        self._solved = False
        self._left: _Pass | None = None

    @property
    def own_sums(self) -> int:
        """Length of this estimator's part of the step's sums."""
        size = 1 + self.options.linear_rank
        return self.num_experts * size * (self.vector_width + size) + 2

    @property
    def uses_vectors(self) -> bool:
        """In training alone, and for its gradient."""
        return self.training

    def set_layer_number(self, layer_number: int) -> None:
        """Take the layer's number, which seeds its projection."""
        super().set_layer_number(layer_number)
        made = linear.projection(
            self.vector_width, self.options.linear_rank, self.model_layer_number
        )
        self.projection.copy_(made)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load; the slopes are solved for anew."""
        super()._load_from_state_dict(*args, **kwargs)
        self._solved = False

    @torch.no_grad()
    def begin_step(self) -> None:
        """Solve for the slopes, once a step."""
        if not self._solved:
            solution = linear.coefficients(
                self.linear_cross, self.linear_moments, self.options.linear_ridge
            )
            for buffer, value in zip((self.slopes, self.centres), solution, strict=True):
                buffer.copy_(value)
            self._solved = True

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Route; the multipliers' gradient also makes that of the unused experts."""
        probs_TE, map_TE = super().routing(logits, *args, **kwargs)
        self._left = None
        if self.training and torch.is_grad_enabled():
            self.begin_step()
            self._left = _Pass()
            probs_TE = _Anchored.apply(probs_TE, self._dense(), self._left, self)
        return probs_TE, map_TE

    def observe_experts(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> None:
        """Take the local experts' outputs, and their products with the tokens, into the sums.

        Arguments as in :meth:`DefaultMoERouter.observe_experts`.
        """
        super().observe_experts(rows, tokens_per_expert, probs)
        if not self.counts_this_pass:
            return
        assert self.routed_probs is not None
        assert self.tokens is not None
        with torch.no_grad():
            probs_R, weights_TE = probs.detach().reshape(-1).float(), self.routed_probs.float()
            # Rows come multiplied by their probability: this is what weighting `router` wants.
            weights_R = (probs_R != 0).float()
            if self.options.weighting == "uniform":
                weights_R = torch.where(probs_R != 0, 1 / probs_R, 0)
                weights_TE = (weights_TE != 0).float()
            inputs = self.dispatcher.expert_inputs
            self.local_cross += linear.row_moments(
                rows.detach(),
                tokens_per_expert.tolist(),
                weights_R,
                linear.features(inputs, self.projection),
            )
            self.local_moments += linear.token_moments(weights_TE, self._features())

    def _features(self) -> Tensor:
        assert self.tokens is not None
        return linear.features(self.tokens.reshape(-1, self.vector_width), self.projection)

    def finish_output(self, output: Tensor) -> Tensor:
        """Leave the output as it is; its gradient makes the predictions.

        Arguments as in :meth:`DefaultMoERouter.finish_output`.
        """
        left, self._left = self._left, None
        if left is None:
            return ObservedTopKRouter.finish_output(self, output)
        flat_TD = output.reshape(-1, self.vector_width)
        constants = (self.vectors_in_use(), self.slopes, self.centres, self._features())
        result_TD = _Predict.apply(flat_TD, left, *constants)
        if self.collects_details and self.counts_this_pass:
            inactive_TE = functional.inactive_probs(self._dense(), self._active())
            self._count_norms(inactive_TE, constants[0], result_TD)
        self._forget_routing()
        return result_TD.view_as(output)

    @torch.no_grad()
    def count_fit(self, grad_TE: Tensor, predicted_TE: Tensor, active_TE: Tensor) -> None:
        """Add up how well the used experts' terms are predicted, over this rank's tokens."""
        self.local_fit += linear.fit(predicted_TE, grad_TE, active_TE)

    def anchor_strength(self) -> Tensor | float | None:
        """Return delta: by ``--default-linear-anchor``, or None for none."""
        return linear.anchor_strength(self.options.linear_anchor, self.anchor_fit)

    def local_step_sums(self) -> list[Tensor]:
        """Return the buffers that the running step is summed up in on this rank."""
        own = [self.local_cross, self.local_moments, self.local_fit]
        return [*super().local_step_sums(), *own]

    def _own(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Name the parts of this estimator's sums: cross, moments, fit."""
        num, width, size = self.linear_cross.shape
        cross, moments, fit = flat.split([num * width * size, num * size * size, 2])
        return cross.view(num, width, size), moments.view(num, size, size), fit

    def own_parts(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pair this estimator's part of the step's buffer with its local sums."""
        cross, moments, fit = self._own(flat)
        return [
            (cross[self.local_experts], self.local_cross),
            (moments, self.local_moments),
            (fit, self.local_fit),
        ]

    @classmethod
    def take_step(cls, taking: Sequence[ObservedTopKRouter]) -> None:
        """Average the step's moments into the state, with the default vectors."""
        super().take_step(taking)
        for router in taking:
            assert isinstance(router, DefaultLinearRouter)
            assert router.pending_own is not None
            if router.frozen_expert_bias:
                continue
            cross, moments, fit = router._own(router.pending_own)
            mass_E, beta = moments[:, 0, 0], router.options.beta
            router.linear_cross.copy_(linear.average(router.linear_cross, cross, mass_E, beta))
            router.linear_moments.copy_(
                linear.average(router.linear_moments, moments, mass_E, beta)
            )
            router.anchor_fit.copy_(linear.average_fit(router.anchor_fit, fit, beta))
            router._solved = False
