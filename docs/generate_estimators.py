"""Write docs/estimators.md from the table that the program reads."""

import pathlib

from megatron_default_moe.options import estimators

TEXT = """# The estimators of the router gradient

Generated from `megatron_default_moe/options/estimators.py` by `python docs/generate_estimators.py`;
a test keeps the two equal. `--moe-router-gradient NAME` chooses one; what each is refused with is
in [support.md](support.md), its flags are in [flags.md](flags.md).

Notation: logits s = W x, N experts, K used per token, pi = softmax(s) over all experts, E_i an
expert, D its output's width, T tokens, y the routed experts' output, dy the gradient that comes
back.

"""
AFTER = """
`--moe-loss-free-bias RATE` goes beside topk, default, dense and expert-group: the experts are the
top-k of pi + b, weighted with pi alone, and b_i moves by RATE towards the experts that got fewer
tokens in a step (arXiv 2408.15664). Megatron has such a bias beside sigmoid gates only. State: b
[N] a layer; no collective of its own.

`--log-router-gradient-fidelity INTERVAL` logs how near an estimator comes: the cosine between the
gradient it gives the router's weight and the dense mixture's, and the ratio of their norms, without
balance losses, on the first micro-batch of every INTERVAL-th step, as a mean and (with
`--moe-per-layer-logging`) per layer. dense reads 1 and 1, remoe against its own open gates too. The
run keeps every bit; such a micro-batch runs all experts once more.

Every estimator trains in every layout of the parity tests (`tests/distributed/test_parity.py`): the
losses, router gradients and states of eight steps agree with one rank to 1e-5. Activation
recomputation, a resumed run and a repeated step repeat every bit
(`tests/distributed/test_estimator_runs.py`). Drawn experts are a function of the layer, the step
and the place of the token in the micro-batch of all ranks: the same in every layout. State changes
in steps that the optimizer took, and nowhere else. Not measured on a GPU.
"""
PATH = pathlib.Path(__file__).with_name("estimators.md")


def text() -> str:
    """Return what the file should hold."""
    return TEXT + estimators.markdown() + "\n" + AFTER


if __name__ == "__main__":
    PATH.write_text(text())
