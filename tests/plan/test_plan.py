"""The planner says what Megatron will build, allocate and refuse, without a GPU.

Contract: parameters are those of the model, in every layout; bytes of weights, gradients and
optimizer are those that Megatron's own optimizer allocates; a layout that cannot work is refused
in one sentence with the nearest that does; every configuration in `examples/` is planned.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import planning
import pytest

from megatron_default_moe import UserError
from megatron_default_moe.plan import cost
from megatron_default_moe.plan.arguments import Layout
from megatron_default_moe.plan.cards import CARDS
from megatron_default_moe.plan.memory import RESERVED

ROOT = pathlib.Path(__file__).parents[2]
# Transformer Engine and Megatron may lie in folders of their own (tests/gpu/README.md).
PYTHONPATH = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
VOCABULARY = 128256

pytestmark = pytest.mark.xdist_group("plan")

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    """Return a function that calls one of `planning` in a process without tests."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=planning.start
    ) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(300)


@pytest.fixture(scope="module")
def plan(call: Call) -> Call:
    """Return a function: what the plan of an example with more flags says."""

    def plan(name: str, flags: str = "", gpus: int = 8, card: str = "h100") -> planning.Planned:
        return call(planning.plan, [*example(name), *flags.split()], gpus, card)

    return plan


def example(name: str) -> list[str]:
    return ["--config", str(ROOT / "examples" / f"{name}.yaml")]


TINY = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 96 --num-experts 4"
    " --moe-router-topk 2 --moe-ffn-hidden-size 96 --moe-layer-freq [0,1,1,1]"
    " --moe-router-pre-softmax --swiglu --disable-bias-linear --normalization RMSNorm"
    " --untie-embeddings-and-output-weights --seq-length 32 --max-position-embeddings 32"
    " --position-embedding-type rope --vocab-size 4000 --tokenizer-type NullTokenizer"
    " --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 64"
    " --train-iters 10 --lr 1e-3 --transformer-impl local --no-rope-fusion"
    " --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion"
    " --sequence-parallel --expert-tensor-parallel-size 1 --distributed-backend gloo"
).split()


def paper_parameters(hidden: int, ffn: int, experts: int, used: int) -> int:
    """The paper's model by hand, with this many experts in each MoE layer."""
    attention = 4 * hidden * hidden + 3 * hidden
    norms = 2 * 2 * hidden
    ffn_matrices = 3 * hidden * ffn
    moe = used * ffn_matrices + experts * hidden
    layers = 24 * (attention + norms) + ffn_matrices + 23 * moe
    return 2 * VOCABULARY * hidden + layers + 2 * hidden


@pytest.mark.parametrize(
    ("name", "shape", "millions", "active"),
    [
        ("557m-8c1", (512, 1408, 8, 1), 556.8, None),
        ("1.96b-8c1", (1024, 2816, 8, 1), 1964.1, 571.3),
        ("1.96b-8c2", (1024, 2816, 8, 2), 1964.1, 770.3),
        ("1.96b-32c1", (1024, 704, 32, 1), 1958.2, 416),
        ("1.96b-32c2", (1024, 704, 32, 2), 1958.2, 466),
        ("1.96b-32c4", (1024, 704, 32, 4), 1958.2, 565),
        ("7.33b-8c1", (2048, 5632, 8, 1), 7330.3, None),
    ],
)
def test_parameters_of_the_papers_models(
    plan: Call, name: str, shape: tuple[int, int, int, int], millions: float, active: float | None
) -> None:
    hidden, ffn, experts, topk = shape
    found = plan(name)
    assert found.total == paper_parameters(hidden, ffn, experts, experts)
    assert found.active == paper_parameters(hidden, ffn, experts, topk)
    assert round(found.total / 1e6, 1) == millions
    if active is not None:
        # As many digits as the paper, or this count where the paper's is another, gives.
        digits = 1 if isinstance(active, float) else 0
        assert round(found.active / 1e6, digits) == active
    assert f"{found.total:,} total  (the paper: " in found.text


def test_parameters_of_a_deepseek_shape(plan: Call) -> None:
    """Latent attention, shared expert, expert bias and the prediction layer, at TP 2 and TP 1."""
    hidden, heads, vocabulary = 7168, 128, 129280
    attention = hidden * 1536 + 1536 + 1536 * heads * 192
    attention += hidden * (512 + 64) + 512 + 512 * heads * 256 + heads * 128 * hidden
    expert = 3 * hidden * 2048
    dense_layer = attention + 2 * hidden + 3 * hidden * 18432

    def moe_layer(experts: int) -> int:
        return attention + 2 * hidden + 256 * hidden + expert * (1 + experts)

    def model(experts: int) -> int:
        prediction = moe_layer(experts) + 2 * hidden * hidden + 3 * hidden
        layers = 3 * dense_layer + 58 * moe_layer(experts)
        return 2 * vocabulary * hidden + layers + hidden + prediction

    found = plan("deepseek-v3-like", gpus=1024)
    assert (found.total, found.active) == (model(256), model(8))
    assert [len(ranks) for ranks in found.ranks] == [1, 14, 1]
    whole = plan("deepseek-v3-like", "--tensor-model-parallel-size 1", 1024, "h200")
    assert (whole.total, whole.active) == (found.total, found.active)


@pytest.mark.parametrize(
    "flags",
    [
        "--expert-model-parallel-size 1",
        "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2",
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2",
        "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3",
        "--context-parallel-size 2 --pipeline-model-parallel-size 3 --global-batch-size 960",
    ],
)
def test_the_stages_of_every_layout_add_up_to_the_model(plan: Call, flags: str) -> None:
    found = plan("7.33b-8c1", f"{flags} --micro-batch-size 1", 96 if "960" in flags else 64)
    assert found.total == paper_parameters(2048, 5632, 8, 8)
    assert (
        sum(counts.moe_layers * len(r) for counts, r in zip(found.counts, found.ranks, strict=True))
        == 23
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--fp8-format hybrid --fp8-recipe blockwise --moe-router-padding-for-quantization",
        "--moe-router-fusion --apply-layernorm-1p --moe-shared-expert-overlap",
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn --te-rng-tracker",
        "--moe-router-gradient topk --moe-token-dispatcher-type flex --moe-enable-deepep",
        "--tp-comm-overlap --tensor-model-parallel-size 2 --defer-embedding-wgrad-compute"
        " --pipeline-model-parallel-size 2",
    ],
)
def test_flags_that_need_a_gpu_are_kept_and_count_the_same(plan: Call, flags: str) -> None:
    found = plan("7.33b-8c1", f"{flags} --micro-batch-size 1", 32)
    assert found.total == paper_parameters(2048, 5632, 8, 8)


def test_default_vectors_take_4ED_bytes_per_layer(plan: Call) -> None:
    for name, flags, layers, experts, width in (
        ("1.96b-32c4", "", 23, 32, 1024),
        ("7.33b-8c1", "--tensor-model-parallel-size 2", 23, 8, 2048),
    ):
        (memory,) = plan(name, flags).memory
        # Beside the vectors, a 64-bit count of updates per expert.
        assert memory.vectors == layers * (4 * experts * width + 8 * experts)
    (memory,) = plan("1.96b-32c4", "--moe-router-gradient topk").memory
    assert memory.vectors == 0


def test_local_sums_are_those_of_the_ranks_own_experts(plan: Call) -> None:
    (memory,) = plan("7.33b-8c1").memory
    stats, step = 4 * (8 * 2 + 4), 4 * (8 * (2048 + 2) + 4)
    assert memory.sums == 23 * (4 * 1 * 2048 + stats + 8 + step)


@pytest.mark.parametrize(
    "flags",
    [
        "--bf16 --use-distributed-optimizer --expert-model-parallel-size 4",
        "--bf16 --use-distributed-optimizer --tensor-model-parallel-size 2"
        " --expert-model-parallel-size 2 --pipeline-model-parallel-size 2",
        "--bf16 --use-distributed-optimizer --grad-reduce-in-bf16",
        "--use-distributed-optimizer --expert-model-parallel-size 2",
    ],
)
def test_state_is_what_megatrons_optimizer_allocates(call: Call, flags: str) -> None:
    """On the first and, with a pipeline, on the last stage; the rest is padding of the buffers."""
    argv, gpus = [*TINY, *flags.split()], 8
    planned = call(planning.plan, argv, gpus, "h100")
    for rank in {0, sum(len(ranks) for ranks in planned.ranks) - 1}:
        index = next(index for index, ranks in enumerate(planned.ranks) if rank in ranks)
        memory = planned.memory[index]
        real = call(planning.allocated, argv, gpus, rank)
        assert real["padding"] < 0.01 * planned.total
        for kind in ("weights", "gradients", "optimizer"):
            # Up to 4, 4 and 12 bytes per element; the first ranks' shards hold no padding.
            assert abs(real[kind] - getattr(memory, kind)) <= 12 * real["padding"], kind


def test_a_plain_attention_layer_keeps_what_korthikanti_et_al_count(call: Call) -> None:
    """Their 34 bytes per token and width, less two dropout masks; 4 per head for the statistics."""
    swiglu = [word for word in TINY if word != "--swiglu"]
    argv = [*swiglu, "--bf16", "--ffn-hidden-size", "256"]
    assert call(planning.layer_bytes, argv, 1, False) == (32 * 64 + 4 * 4, 0)


def test_an_moe_layer_keeps_rows_scores_and_the_unused_experts_probabilities(call: Call) -> None:
    argv = [*TINY, "--bf16"]
    width, ffn, k, experts = 64, 96, 2, 4
    attention = 2 * (2 * width + 4 * width) + 4 * 4
    routed = k * (2 * width + 4) + k * 2 * 3 * ffn
    kept = attention + 2 * 2 * width + routed + 9 * experts
    assert call(planning.layer_bytes, argv, 1, True) == (kept + 4 * experts, 0)
    topk = [*argv, "--moe-router-gradient", "topk"]
    assert call(planning.layer_bytes, topk, 1, True) == (kept, 0)
    again = "--recompute-granularity selective --recompute-modules moe".split()
    scores = 13 * experts
    assert call(planning.layer_bytes, [*argv, *again], 1, True) == (
        kept + 4 * experts - routed - scores,
        routed + scores,
    )


def test_micro_batches_in_flight(call: Call) -> None:
    pipeline = [*TINY, "--pipeline-model-parallel-size", "4"]
    assert call(planning.in_flight, pipeline, 4) == [4, 3, 2, 1]
    few = [*pipeline, "--global-batch-size", "4"]
    assert call(planning.in_flight, few, 4) == [2, 2, 2, 1]
    interleaved = [*TINY, "--pipeline-model-parallel-size", "2"]
    interleaved += ["--num-layers-per-virtual-pipeline-stage", "1"]
    # Warm-up of 1F1B, interleaved: 2 (P - p - 1) + (V - 1) P, and the one under way.
    assert call(planning.in_flight, interleaved, 2) == [5, 3]


def test_recomputation_and_division_take_less_memory(plan: Call) -> None:
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    kept = {
        name: plan("7.33b-8c1", flags).memory[0].activations
        for name, flags in {
            "all": "",
            "moe": "--recompute-granularity selective --recompute-modules moe",
            "full": full,
            "halved": "--tensor-model-parallel-size 2",
        }.items()
    }
    assert kept["full"] < kept["moe"] < kept["all"]
    assert kept["halved"] == kept["all"] / 2


def test_operations_and_communication_by_hand(plan: Call) -> None:
    found = plan("7.33b-8c1", gpus=64)
    hidden, ffn, sequence, gpus = 2048, 5632, 2048, 64
    attention = 4 * hidden * hidden + hidden * sequence  # half of the square, two products
    per_token = 24 * attention + 24 * 3 * hidden * ffn + VOCABULARY * hidden
    assert found.flops == pytest.approx(6 * per_token * 1024 * sequence, rel=1e-3)
    assert found.traffic["default vectors, once"] == pytest.approx(
        2 * 63 / 64 * 23 * 4 * (8 * (hidden + 2) + 4)
    )
    tokens = 1024 * sequence / gpus
    rows = tokens * (2 * hidden + 4)
    assert found.traffic["all-to-all (EP)"] == pytest.approx(23 * 4 * rows * 7 / 8)
    experts = 23 * 3 * hidden * ffn
    assert found.traffic["gradients + weights (expert DP)"] == pytest.approx(experts * 6 * 7 / 8)
    assert not any("TP" in name or "PP" in name for name in found.traffic)
    before = plan("7.33b-8c1", "--default-vector-order before-use", 64).traffic
    assert before.keys() - found.traffic.keys() == {"default vectors, before use"}


@pytest.mark.parametrize(
    ("ranks", "stride", "rate"),
    [
        (8, 1, 450e9),  # inside a host
        (64, 1, 400e9),  # every adapter of eight hosts
        (32, 2, 200e9),
        (8, 8, 50e9),  # one rank of each host
        (2, 64, 50e9),
    ],
)
def test_a_ring_over_hosts_uses_the_adapters_of_its_ranks(
    ranks: int, stride: int, rate: float
) -> None:
    seconds = cost._ring_seconds(1e9, ranks, stride, CARDS["h100"])
    assert seconds == pytest.approx(1e9 / (cost.LINK_EFFICIENCY * rate))


@pytest.mark.parametrize(
    ("name", "flags", "gpus", "card", "reason", "nearest"),
    [
        ("7.33b-8c1", "--expert-model-parallel-size 3", 64, "h100", "3 does not divide", (1, 1, 4)),
        (
            "7.33b-8c1",
            "--tensor-model-parallel-size 3",
            64,
            "h100",
            "3 does not divide the number of ranks, 64",
            (4, 1, 8),
        ),
        ("7.33b-8c1", "--pipeline-model-parallel-size 16", 128, "h100", "layers", (1, 8, 8)),
        ("7.33b-8c1", "", 12, "h100", "4 x data parallelism 12", (1, 3, 4)),
        ("7.33b-8c1", "--micro-batch-size 64", 8, "h100", r"needs [\d.]+ GiB", (8, 1, 8)),
        (
            "mixtral-8x7b-like",
            "--pipeline-model-parallel-size 1",
            64,
            "h100",
            r"needs [\d.]+ GiB per GPU and a H100 SXM 80 GB has 79.6 GiB",
            (1, 2, 8),
        ),
    ],
)
def test_an_impossible_layout_names_the_nearest_that_works(
    plan: Call,
    call: Call,
    name: str,
    flags: str,
    gpus: int,
    card: str,
    reason: str,
    nearest: tuple[int, int, int],
) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        plan(name, flags, gpus, card)
    message = str(refused.value)
    layout = Layout(*nearest)
    assert message.endswith(f"; the nearest layout that works is {layout}")
    assert "\n" not in message
    assert plan(name, f"{flags} {layout}", gpus, card).layout == layout
    argv = [*example(name), *flags.split()]
    assert call(planning.nearer_layouts_that_work, argv, gpus, card, layout) == []


@pytest.mark.parametrize(
    ("name", "flags", "gpus", "words"),
    [
        ("deepseek-v3-like", "", 8, "no other TP, PP and EP sizes work either, and on 256 GPUs "),
        ("1.96b-8c1", "", 100, "no other TP, PP and EP sizes work either, and on 96 GPUs "),
        ("1.96b-8c1", "--tensor-model-parallel-size 0", 8, "--tensor-model-parallel-size must be"),
        ("1.96b-8c1", "--num-layers 0", 8, "--num-layers must be at least 1"),
        ("1.96b-8c1", "--num-layers 23", 8, "--moe-layer-freq names another number of layers"),
        ("1.96b-8c1", "--fp8-format hybrid --fp8-recipe mxfp8", 8, "capability 10.0 and a H100"),
        ("1.96b-8c1", "--moe-router-topk 9", 8, "--moe-router-topk is above --num-experts"),
        ("quickstart", "", 2, "--vocab-size is missing"),
        ("1.96b-8c1", "--optimizer muon", 8, "--optimizer muon cannot be planned"),
        ("1.96b-8c1", "--moe-latent-size 64", 8, "--moe-latent-size cannot be planned"),
        ("1.96b-8c1", "--no-such-flag", 8, "--no-such-flag is not a flag"),
        ("1.96b-8c1", "--moe-router-load-balancing-type sinkhorn", 8, "sinkhorn"),
    ],
)
def test_what_no_layout_can_help(plan: Call, name: str, flags: str, gpus: int, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        plan(name, flags, gpus)
    assert "nearest layout" not in str(refused.value)


def test_a_smaller_micro_batch_is_named_where_it_is_enough(plan: Call) -> None:
    """The layout in the file's comment for 512 GPUs; and one that the batch does not divide."""
    with pytest.raises(UserError, match="; with --micro-batch-size 2 it works; the nearest layout"):
        plan("7.33b-8c1", "", 512)
    assert plan("7.33b-8c1", "--micro-batch-size 2", 512).layout == Layout(1, 1, 8)
    with pytest.raises(UserError) as refused:
        plan("7.33b-8c1", "", 24)
    assert "--micro-batch-size 2" not in str(refused.value)


def test_a_number_of_gpus_that_is_named_works(plan: Call) -> None:
    with pytest.raises(UserError) as refused:
        plan("mixtral-8x7b-like", "", 8)
    gpus, layout = re.search(r"and on (\d+) GPUs (--.*) does$", str(refused.value)).groups()
    assert plan("mixtral-8x7b-like", layout, int(gpus)).fullest < 80 * 2**30


def test_a_layout_that_would_lose_layers_is_refused(plan: Call) -> None:
    """With one or two stages Megatron builds the layers named for the first and last alone."""
    sizes = "--tensor-model-parallel-size 4 --expert-model-parallel-size 64"
    for stages in (1, 2):
        with pytest.raises(UserError, match=r"--decoder-first-pipeline-num-layers"):
            plan(
                "deepseek-v3-like", f"{sizes} --pipeline-model-parallel-size {stages}", 128, "b200"
            )


def test_the_command_prints_the_plan_or_one_sentence() -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "tools/plan.py", "examples/7.33b-8c1.yaml", *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    done = run("--gpus", "64", "--gpu", "h200")
    assert done.returncode == 0, done.stderr
    for words in ("7,330,271,232 total", "estimated, not measured", "Transformer Engine is not"):
        assert words in done.stdout
    assert done.stdout.startswith("64 x H200 SXM 141 GB: TP 1, PP 1, EP 8")
    refused = run("--gpus", "64", "--gpu", "h200", "--expert-model-parallel-size", "5")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Traceback" not in refused.stderr
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, refused.stderr
    assert errors[0].startswith("error: --expert-model-parallel-size 5 does not divide ")


def rows(name: str) -> list[tuple[int, str, str, int]]:
    """The layouts in an example's comment: GPUs, card, flags, GiB."""
    found = re.findall(
        r"^# +(\d+)  (\w+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) GiB$",
        (ROOT / "examples" / f"{name}.yaml").read_text(),
        re.MULTILINE,
    )
    return [
        (int(gpus), card, f"{Layout(int(tp), int(pp), int(ep))} --micro-batch-size {mbs}", int(gib))
        for gpus, card, tp, pp, ep, mbs, gib in found
    ]


def own_layout(name: str) -> str:
    """The layout a file holds, as the flags of :func:`rows`."""
    lines = (ROOT / "examples" / f"{name}.yaml").read_text().splitlines()
    value = dict(line.split(": ", 1) for line in lines if ": " in line and line[0] != "#")
    tp, pp, ep = (
        int(value[f"{kind}-model-parallel-size"]) for kind in ("tensor", "pipeline", "expert")
    )
    return f"{Layout(tp, pp, ep)} --micro-batch-size {value['micro-batch-size']}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_planned_as_it_stands(plan: Call, name: str) -> None:
    if name == "quickstart":
        assert plan(name, "--vocab-size 4096", 2).layout == Layout(1, 1, 2)
        return
    sizes = own_layout(name)
    gpus, card, _, gib = next(row for row in rows(name) if row[2] == sizes)
    assert round(plan(name, "", gpus, card).fullest / 2**30) == gib


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "row"), [(name, row) for name in EXAMPLES for row in rows(name)], ids=str
)
def test_every_layout_in_the_examples_comments(
    plan: Call, name: str, row: tuple[int, str, str, int]
) -> None:
    gpus, card, flags, gib = row
    assert round(plan(name, flags, gpus, card).fullest / 2**30) == gib


def test_the_plan_in_the_documentation_is_what_is_printed(plan: Call) -> None:
    text = (ROOT / "docs" / "plan.md").read_text()
    assert plan("deepseek-v3-like", gpus=1024).text in text
    with pytest.raises(UserError) as refused:
        plan("7.33b-8c1", "--pipeline-model-parallel-size 7", 64)
    assert f"error: {refused.value}\n" in text


@pytest.mark.parametrize("name", ["1.96B 8c1", "1.96B 32c4", "7.33B 8c1", "DeepSeek-like"])
def test_the_step_bench_fits_one_gpu(call: Call, name: str) -> None:
    """Three ways of training beside each other, of which one at a time has activations."""
    memory, room = call(planning.step_bench, name)
    assert memory.vectors > 0
    assert 3 * memory.total - 2 * (memory.activations + RESERVED) < 0.9 * room
