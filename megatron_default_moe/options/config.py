"""What a user chooses: one frozen dataclass, from which the command line flags are generated."""

import argparse
import dataclasses
import math
from argparse import ArgumentParser, Namespace
from typing import Any, Literal

from megatron_default_moe.errors import UserError
from megatron_default_moe.options.estimators import Estimator, named


def _flag(default: Any, flag: str, **argparse_kwargs: Any) -> Any:
    """A field with this default whose command line flag is ``--flag``.

    The parser's default is None, "not given", so that a preset can tell what the user typed.
    """
    meta = {
        "arg_names": [f"--{flag}"],
        "dest": flag.replace("-", "_"),
        "default": None,
        **argparse_kwargs,
    }
    return dataclasses.field(default=default, metadata={"argparse_meta": meta})


def _switch(default: bool, flag: str) -> Any:
    """A boolean field with ``--flag`` and ``--no-flag``."""
    return _flag(default, flag, action=argparse.BooleanOptionalAction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterGradientConfig:
    """How the router learns: which gradient reaches it from the experts a token did not use."""

    gradient: Literal[
        "topk",
        "default",
        "default-linear",
        "dense",
        "sparsemixer",
        "sparsemixer-v2",
        "expert-group",
        "remoe",
    ] = _flag("default", "moe-router-gradient")
    """Router-gradient estimator. 'default' (Default MoE) lets the default vector of every expert
    a token did not use stand in for that expert's output; 'topk' is stock Megatron; the others are
    in docs/estimators.md."""

    loss_free_bias: float | None = _flag(None, "moe-loss-free-bias", type=float, metavar="RATE")
    """Balance the experts without a loss (DeepSeek): a bias takes part in the choice of experts
    beside the softmax gate, and moves by RATE a step towards the experts that got fewer tokens
    than the mean (0.001 with sigmoid gates; 0.0001 was best beside a softmax)."""

    global_aux_loss_exact: bool = _switch(True, "moe-global-aux-loss-exact")
    """Apply --moe-router-load-balancing-type global_aux_loss as strongly as --moe-aux-loss-coeff
    says, whatever the number of data-parallel ranks. Off: as Megatron 0.19 does, which divides its
    gradient by their number."""

    beta: float = _flag(0.99, "default-vector-beta")
    """Share of the old default vector kept at each optimizer step, in [0, 1)."""

    weighting: Literal["router", "uniform"] = _flag("router", "default-vector-weighting")
    """Weight of a token in the mean output of its expert: its router probability, or one."""

    order: Literal["after-use", "before-use"] = _flag("after-use", "default-vector-order")
    """'after-use': every micro-batch of a step uses the vectors of the step before; one extra
    collective per step. 'before-use' (the paper's): a micro-batch's own outputs enter the vectors
    it uses; one extra collective per MoE layer and forward pass."""

    in_forward: bool = _switch(True, "default-vector-in-forward")
    """Add the default vectors in the forward pass. Off: backward only, the forward is TopK's."""

    fade_in: int = _flag(0, "default-vector-fade-in", type=int, metavar="N")
    """Let the default vectors into the forward pass over N optimizer steps, from nothing to all of
    them, for a model that was trained without: a step (and evaluation after it) uses n/N of the
    default term, n being the steps taken since; the router's gradient is that of the whole term
    from the first. 0: all of it at once. 200 where --default-vector-from-baseline starts vectors,
    and in what default-moe calibrate saves, unless this flag says otherwise; a checkpoint saved
    during a fade-in goes on with it."""

    in_eval: bool = _switch(True, "default-vector-in-eval")
    """Use the default vectors in evaluation and inference too. They are part of the model: turn
    this off only to measure what they carry."""

    init: Literal["zeros", "gaussian"] = _flag("zeros", "default-vector-init")
    """Start of the default vectors: zeros, or a normal distribution with --init-method-std."""

    bias_correction: bool = _switch(False, "default-vector-bias-correction")
    """Divide a vector by 1 - beta^n after its n-th update, which removes the pull of its start at
    zero (and the warm-up that this start gives)."""

    normalized_gate: bool = _switch(False, "default-vector-normalized-gate")
    """For --moe-router-score-function sigmoid and sqrtsoftplus: weight every expert, used or not,
    with its score over the sum of ALL experts' scores, so that the weights of the used experts and
    of the default vectors sum to one. Megatron divides by the sum over the chosen experts (with
    --moe-router-topk 1, by nothing). Changes the weights of the experts in topk training too."""

    fidelity_interval: int | None = _flag(
        None, "log-router-gradient-fidelity", type=int, metavar="INTERVAL"
    )
    """Log, every INTERVAL steps, the cosine and the ratio of norms between the router's gradient
    and that of the dense mixture, on the step's first micro-batch. Changes nothing of the run; all
    experts run on all tokens of that micro-batch once more."""

    linear_rank: int = _flag(16, "default-linear-rank")
    """For default-linear: features of a token, made by a random projection (r)."""

    linear_ridge: float = _flag(0.1, "default-linear-ridge")
    """For default-linear: added to the diagonal of the features' covariance, in units of its
    mean."""

    linear_anchor: Literal["scaled", "full", "none"] = _flag("scaled", "default-linear-anchor")
    """For default-linear: how much of what the used expert's prediction missed is added to the
    other experts' predictions: all of it, none, or in proportion to the share of the used experts'
    terms that predictions explain."""

    mask_width: float = _flag(0.1, "sparsemixer-mask-width")
    """For sparsemixer and sparsemixer-v2: how far below the best logit an expert may be drawn,
    relative to the two logits' magnitudes (the paper's r)."""

    expert_group_size: int = _flag(2, "expert-group-size")
    """For expert-group: experts in a token's group, its best ones (G)."""

    expert_group_in_forward: bool = _switch(False, "expert-group-in-forward")
    """For expert-group: add the stand-ins in the forward pass of training too."""

    remoe_lambda: float = _flag(1e-8, "remoe-lambda")
    """For remoe: the weight that the sparsity loss starts with."""

    remoe_factor: float = _flag(1.2, "remoe-factor")
    """For remoe: what the weight is multiplied with in a step that was less sparse than
    1 - topk / experts, and divided by in one that was sparser."""

    kernels: bool = _switch(False, "default-vector-kernels")
    """On NVIDIA devices of compute capability 9 and 10, where Triton is installed, use the fused
    kernels. Off, and everywhere else: the same maths in PyTorch. (Off until they have been run on
    such a device: so far they are tested in Triton's interpreter and compiled.)"""

    from_baseline: bool = _flag(
        False, "default-vector-from-baseline", action="store_const", const=True
    )
    """Accept a checkpoint without what this estimator keeps (a plain Megatron one, or another
    estimator's): default vectors start as --default-vector-init says, other state as in a new run,
    and what the other estimator kept is left out; with one warning."""

    override: bool = _flag(False, "default-vector-override", action="store_const", const=True)
    """Go on from a checkpoint with other values of the flags of this group than it was trained
    with. Without it they are refused at resume."""

    absent: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    """Not a flag: the names of this model's state that the checkpoint about to be loaded lacks, and
    that start anew (``checks.prepare_load`` finds out). None of them with ``from_baseline``: all,
    where nobody has looked into the checkpoint."""

    def __post_init__(self) -> None:
        """Check the values themselves; combinations with Megatron's options are in support.py."""
        if not 0.0 <= self.beta < 1.0:
            raise UserError(
                f"--default-vector-beta must be at least 0 and below 1, not {self.beta}: it is the"
                " share of the old vector kept at each step (0.99 by default)"
            )
        if self.fade_in < 0:
            raise UserError(
                f"--default-vector-fade-in must be a number of steps, not {self.fade_in}: 0 adds"
                " all of the default term at once"
            )
        if self.fade_in and not self.in_forward:
            raise UserError(
                "--no-default-vector-in-forward leaves nothing to fade in: drop it or"
                " --default-vector-fade-in"
            )
        for flag, value, low, high, what in (
            ("--default-linear-ridge", self.linear_ridge, 0.0, math.inf, "a share of the mean"),
            ("--moe-loss-free-bias", self.loss_free_bias, 0.0, 1.0, "a step of the bias"),
            ("--sparsemixer-mask-width", self.mask_width, 0.0, 1.0, "a relative distance"),
            ("--remoe-lambda", self.remoe_lambda, 0.0, math.inf, "the weight of a loss"),
        ):
            if value is not None and not low < value < high:
                bound = f" and below {high:g}" if high < math.inf else ""
                raise UserError(f"{flag} must be above 0{bound}, not {value}: it is {what}")
        if not 1.0 < self.remoe_factor < math.inf:
            raise UserError(
                f"--remoe-factor must be above 1, not {self.remoe_factor}: the weight of the loss"
                " grows by it (1.2 by default)"
            )
        if self.fidelity_interval is not None and self.fidelity_interval < 1:
            raise UserError(
                "--log-router-gradient-fidelity must be at least 1, not"
                f" {self.fidelity_interval}: it is a number of steps"
            )
        if self.linear_rank < 0:
            raise UserError(
                f"--default-linear-rank must be at least 0, not {self.linear_rank}: it is a number"
                " of features"
            )
        if self.expert_group_size < 2:
            raise UserError(
                f"--expert-group-size must be at least 2, not {self.expert_group_size}: an expert"
                " alone has no group to learn from"
            )
        if self.init == "gaussian" and self.bias_correction:
            raise UserError(
                "--default-vector-bias-correction undoes a start at zero and cannot be combined"
                " with --default-vector-init gaussian: drop one of the two"
            )

    @property
    def estimator(self) -> Estimator:
        """The row of the table of estimators."""
        return named(self.gradient)

    @property
    def uses_default_vectors(self) -> bool:
        """Whether the model holds default vectors at all."""
        return self.estimator.vectors

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is logged of the estimator, and of the bias, beside the load."""
        biased = ("choice-bias spread",) if self.loss_free_bias is not None else ()
        probed = ("router-gradient cosine", "router-gradient ratio")
        return (*self.estimator.metrics, *biased, *(probed if self.fidelity_interval else ()))

    @property
    def fades(self) -> bool:
        """Whether the default vectors come into the forward pass, and so may do so gently."""
        return self.gradient == "default" and self.in_forward

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """Names of the state that a checkpoint of a layer's router has beside Megatron's."""
        fading = ("default_vector_steps",) if self.uses_default_vectors and self.fade_in else ()
        biased = ("choice_bias",) if self.loss_free_bias is not None else ()
        return (*self.estimator.checkpointed, *fading, *biased)

    @property
    def model_wide(self) -> bool:
        """Whether a step's load is added up over the whole model."""
        return self.estimator.model_wide

    @property
    def chooses(self) -> bool:
        """Whether the experts are chosen by this package instead of Megatron's top-k."""
        return self.estimator.chooses or self.loss_free_bias is not None


PAPER_PRESET = {
    "order": "before-use",
    "beta": 0.9,
    "weighting": "router",
    "in_forward": True,
}
"""--paper-default-moe: the published method, where it differs from the defaults or states them."""


FADE_IN = 200
"""Steps of the fade-in of vectors that a trained model gets, unless the user chooses."""


def chosen_by_flags() -> list[dataclasses.Field[Any]]:
    """The options that are flags."""
    fields = dataclasses.fields(RouterGradientConfig)
    return [field for field in fields if "argparse_meta" in field.metadata]


def add_router_gradient_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the package's flags to Megatron's parser, as one group.

    Args:
        parser: Megatron's argument parser.

    Returns:
        The same parser (the form ``extra_args_provider`` wants).
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    factory = ArgumentGroupFactory(RouterGradientConfig, exclude=["absent"])
    for field in chosen_by_flags():
        # The factory shows docstrings as they are; the default belongs to the help too.
        text = " ".join(factory.field_docstrings[field.name].split())
        default: Any = field.default
        switch = default is None or isinstance(default, bool)
        shown = ("on" if default else "off") if switch else default
        factory.field_docstrings[field.name] = f"{text} Default: {shown}."
    group = factory.build_group(parser, title="router gradient (megatron_default_moe)")
    group.add_argument(
        "--paper-default-moe",
        action="store_true",
        help="Preset: the published method (--default-vector-order before-use, "
        "--default-vector-beta 0.9, --default-vector-weighting router, "
        "--default-vector-in-forward). An explicit flag wins over it.",
    )
    return parser


def options_from_args(args: Namespace) -> RouterGradientConfig:
    """Build the options from parsed arguments: explicit flags over the preset over the defaults.

    Args:
        args: the namespace of a parser that :func:`add_router_gradient_args` extended. Flags that
            are missing from it count as not given.

    Returns:
        The validated options.

    Raises:
        UserError: a value out of range, or two flags that exclude each other.
    """
    values: dict[str, Any] = dict(PAPER_PRESET) if getattr(args, "paper_default_moe", False) else {}
    for field in chosen_by_flags():
        given = getattr(args, field.metadata["argparse_meta"]["dest"], None)
        if given is not None:
            values[field.name] = given
    return RouterGradientConfig(**values)
