"""The estimators of the router gradient: one table for code, docs and tests.

What ``--moe-router-gradient`` may be, what each needs of the rest of Megatron (the support table
reads these traits), and what a user wants to know of it (docs/estimators.md).
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimator:
    """One way for a router to learn."""

    name: str
    """The value of ``--moe-router-gradient``."""
    formula: str
    source: str
    when: str
    cost: str
    limits: str
    state: str
    checkpointed: tuple[str, ...] = ()
    """Ends of the names of its state in a checkpoint, which a plain Megatron one does not have."""
    trained: tuple[str, ...] = ()
    """Those of them that are parameters: the optimizer keeps state of its own for them."""
    metrics: tuple[str, ...] = ()
    """What is logged of it beside the load (``layers/layer_metrics.py`` says what they are)."""
    vectors: bool = False
    """Whether it keeps default vectors."""
    weights_unused: bool = False
    """Whether it needs the probabilities of the experts that a token did not use."""
    chooses: bool = False
    """Whether it chooses the experts itself, instead of Megatron's top-k."""
    draws: bool = False
    """Whether its choice in training is random."""
    model_wide: bool = False
    """Whether a step's load is added up over the whole model."""
    most_experts: int | None = None
    """Greatest --moe-router-topk it is defined for."""


_OF_VECTORS = tuple(f"default-vector {name}" for name in ("norm", "staleness", "share", "rejected"))

ESTIMATORS: tuple[Estimator, ...] = (
    Estimator(
        name="topk",
        formula="y = sum over used i of pi_i E_i(x); unused experts give the router nothing",
        source="Megatron-Core",
        when="the baseline; compare with a globally reduced balance loss",
        cost="none",
        limits="the router never learns what an unused expert would have done",
        state="none",
    ),
    Estimator(
        name="default",
        formula="y = topk + sum over unused i of pi_i Ê_i, Ê_i the moving average of E_i's outputs",
        source="Default MoE, arXiv 2504.12463",
        when="training at scale",
        cost="a [T,N]x[N,D] product each way; one all-reduce of 4 N (D+2) bytes a layer and step",
        limits="Ê_i does not depend on the token",
        state="Ê [N, D] float32 and N counts a layer",
        checkpointed=("default_vectors", "default_vector_updates"),
        metrics=_OF_VECTORS,
        vectors=True,
        weights_unused=True,
    ),
    Estimator(
        name="default-linear",
        formula="forward as topk; unused j stands in as v_j(x) = Ê_j + C_j G_j^-1 (P x - z_j) +"
        " delta (E_a(x) - v_a(x)), a the used expert",
        source="ours; measured on planted experts",
        when="experts that differ in how they depend on the token; backward only",
        cost="a [T,D]x[D,N r] product backward, N solves of r x r a step; the step's all-reduce"
        " grows by 4 N (1+r)(D+1+r) bytes a layer",
        limits="N (1+r) D floats of state a layer; delta 1 (anchor full) can be worse than topk",
        state="the default vectors', and moments [N, D, 1+r] and [N, 1+r, 1+r]",
        checkpointed=(
            "default_vectors",
            "default_vector_updates",
            "linear_cross",
            "linear_moments",
            "anchor_fit",
        ),
        metrics=_OF_VECTORS,
        vectors=True,
        weights_unused=True,
    ),
    Estimator(
        name="dense",
        formula="forward as topk; dL/ds_j = pi_j (g_j - sum_i pi_i g_i), g_i = <dy, E_i(x)>, all i",
        source="DenseMixer's straight-through; estimators compared in Default MoE",
        when="an upper bound and a measuring instrument",
        cost="the experts' forward work N/K times; a second dispatch and combine in training",
        limits="not a way to train at scale",
        state="none",
        weights_unused=True,
    ),
    Estimator(
        name="sparsemixer",
        formula="D drawn from the masked softmax p; y = omega p_D (1 or 1/2) E_D(x);"
        " d/dp_D twice the upstream",
        source="SparseMixer, arXiv 2310.00811",
        when="K = 1, few experts within reach of the mask",
        cost="a softmax and a hash of [T, N]; a product with omega",
        limits="K = 1; the drawn expert is often not the best",
        state="omega [D], a parameter, and a count of steps a layer",
        checkpointed=("draw_steps", "output_scale"),
        trained=("output_scale",),
        chooses=True,
        draws=True,
        most_experts=1,
    ),
    Estimator(
        name="sparsemixer-v2",
        formula="as sparsemixer with p_D (1 or 1/3), Heun's rule; the second expert without D",
        source="GRIN MoE, arXiv 2409.12136",
        when="K = 1 or 2",
        cost="a softmax and a hash of [T, N] per expert of a token",
        limits="K at most 2",
        state="a count of steps a layer",
        checkpointed=("draw_steps",),
        chooses=True,
        draws=True,
        most_experts=2,
    ),
    Estimator(
        name="expert-group",
        formula="unused i stands in as (1/G) sum over j in R_G(x) of a_ij, the mean of E_i over"
        " tokens with i used and i, j in their group; backward only unless asked",
        source="Dense Backpropagation Improves Routing, PMLR v262 panda24a",
        when="few experts; statistics of the micro-batch instead of averages over steps",
        cost="a table [N, N, D] a layer and micro-batch: an all-reduce of 4 N^2 (D+1) bytes, N"
        " products of [T, D]x[D, N] backward, G numbers a token sent to its experts",
        limits="N^2 D floats a layer",
        state="none",
        weights_unused=True,
    ),
    Estimator(
        name="remoe",
        formula="y = sum of ReLU(s_i) E_i(x) over open gates; loss lambda N sum_i f_i mean(gate_i)",
        source="ReMoE, arXiv 2412.14711",
        when="a router that is differentiable as it is",
        cost="the first hundreds of steps are nearly dense; [N] counts a layer and pass, and two"
        " numbers a step over the pipeline",
        limits="memory of up to N/K times the rows; no capacity, no other balance loss",
        state="lambda, one number",
        checkpointed=("sparsity_weight",),
        metrics=("remoe sparsity", "remoe lambda"),
        chooses=True,
        model_wide=True,
    ),
)

NAMES = tuple(one.name for one in ESTIMATORS)

STATES = {
    "default_vectors": "default vectors",
    "default_vector_updates": "default vectors",
    "linear_cross": "moments of default-linear",
    "linear_moments": "moments of default-linear",
    "anchor_fit": "moments of default-linear",
    "draw_steps": "count of drawn steps",
    "output_scale": "omega (output_scale)",
    "sparsity_weight": "lambda (sparsity_weight)",
    "choice_bias": "bias of --moe-loss-free-bias",
}
"""What a user calls the state that a checkpoint has or lacks, by its names there."""


def named(name: str) -> Estimator:
    """Return the row of an estimator."""
    return next(one for one in ESTIMATORS if one.name == name)


def markdown() -> str:
    """Return the table for the documentation."""
    columns = ("formula", "source", "when", "cost", "limits", "state")
    lines = ["| estimator | " + " | ".join(columns) + " |", "|---" * 7 + "|"]
    for one in ESTIMATORS:
        cells = [f"`{one.name}`", *(getattr(one, column) for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
