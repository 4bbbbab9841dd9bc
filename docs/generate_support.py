"""Write docs/support.md from the table the program refuses with."""

import pathlib

from megatron_default_moe.options import support

TEXT = """# What works with which router gradient, and what does not

Generated from `megatron_default_moe/options/support.py` by `python docs/generate_support.py`; a
test keeps the two equal. *refused*: the program ends with this sentence before training starts.
*warned*: it says so and goes on. *noted*: it says what it
does otherwise than Megatron. In brackets: only with these values of `--moe-router-gradient`.

What the table does not name works as in Megatron. Tested against float64 references: every
dispatcher but flex, capacity limits, groups of experts, expert bias (it chooses experts and weighs
nothing), sigmoid and sqrtsoftplus gates, scaling factors, quantile balancing, router replay, input
jitter, a float64 router, shared experts, padding masks (padding tokens are routed, so they count),
and multi-token prediction layers (`--mtp-num-layers`), which have default vectors of their own.
With `--default-vector-normalized-gate` a capacity limit still drops tokens by Megatron's own
probabilities. Multi-latent attention and latent MoE need Transformer Engine, so a GPU: the CPU
runtime refuses them, and only their parts are tested without one (the layers take their place in
the spec; the vectors have the latent width and are added before the projection back).

`--overlap-moe-expert-parallel-comm` cuts a layer into four autograd graphs; the gradient of the
default vectors is carried across them (`layers/overlap.py`). On CPU ranks, in bf16 and fp16, it
changes no bit of losses, gradients and vectors, also with tensor and interleaved pipeline
parallelism; with graphs of the router (each stood for by a twin of the layer) that is shown on one
rank in float32.
What the CPU cannot show is the order of its two CUDA streams: **not measured on a GPU**.

With Transformer Engine (`--transformer-impl transformer_engine`), by reading Megatron's code and
by tests of the parts that run on a CPU, and **not measured on a GPU**: grouped GEMM, FP8 and FP4
with any recipe, router padding (`--moe-router-padding-for-quantization`; the filler rows enter no
sum), permute and router fusion, the operation fuser, shared-expert overlap,
`--overlap-dispatch-backward-with-experts-wgrad`, `--delay-wgrad-compute`, recomputed and offloaded
activations, CUDA graphs of attention, of dense layers and of the router with its preprocessing.
`tests/gpu/README.md` says how to check all this on a GPU.

"""
PATH = pathlib.Path(__file__).with_name("support.md")


def text() -> str:
    """Return what the file should hold."""
    return TEXT + support.markdown() + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
