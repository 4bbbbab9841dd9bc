"""Compile the Triton kernels without a GPU; print registers, spills and shared memory.

    PYTHONPATH=. .venv/bin/python bench/compile_kernels.py

For sm_90 (H100, H200) and sm_100 (B200), with the ptxas of Triton's wheel, at the paper's shapes
and a DeepSeek-like one; writes docs/results/kernels_compiled.md. It proves that the kernels compile
and fit, nothing about speed.
"""

import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_default_moe.kernels import sums, term

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "docs/results/kernels_compiled.md"
CAPABILITIES = (90, 100)
SHARED_MEMORY = 227 * 1024
"""Bytes a program may use on both."""
SHAPES = {"1.96B 8c": (8, 1024), "1.96B 32c": (32, 1024), "7.33B": (8, 2048)}
"""Experts and width; the DeepSeek-like layer is last."""
SHAPES["DeepSeek-like"] = (256, 7168)
TOKENS = 8192

TERM = {
    **dict.fromkeys(("output", "result", "grad"), "*bf16"),
    **dict.fromkeys(("grad_scores", "scores", "probs", "vectors"), "*fp32"),
    **{"T": "i32", "scale": "fp32"},
}
SUMS = {
    **{"rows": "*bf16", "counts": "*i64", "tickets": "*i32"},
    **dict.fromkeys(("row_probs", "probs", "row_partials", "token_partials"), "*fp32"),
    **dict.fromkeys(("sums", "mass", "load", "tokens"), "*fp32"),
    **dict.fromkeys(("row_stride", "R", "D", "e", "chunk_rows"), "i32"),
    **dict.fromkeys(("T", "E", "chunk_tokens", "num_token_chunks"), "i32"),
}


class Compiled(NamedTuple):
    """What one kernel uses on one target."""

    name: str
    capability: int
    registers: int
    spilled: int
    """Bytes of stack a thread."""
    shared: int
    """Bytes a program."""
    ptx: str


def launches(num_experts: int, width: int) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """The three kernels with types and constants as the launchers choose them, for bf16."""
    constants = {"D": width, "E": num_experts, "SOFTMAX": True, "PRECISION": "bf16x3"}
    forward = term.forward_blocks(TOKENS, width, num_experts)
    backward = term.backward_blocks(width, num_experts)
    return [
        (
            sums.statistics_kernel,
            SUMS,
            {"UNIFORM": False, **sums.blocks(num_experts, num_experts)},
        ),
        (term.forward_kernel, TERM, {**constants, **forward}),
        (term.backward_kernel, TERM, {**constants, **backward}),
    ]


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int
) -> Compiled:
    """Compile one kernel for one capability."""
    constants = dict(constants)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    # As a launch finds them: pointers and widths that are multiples of 16.
    aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or n in ("D", "row_stride")]
    aligned = [i for i in aligned if names[i] not in constants]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        dump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        used = subprocess.run(
            [dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", used)
    assert found is not None, used
    registers, stack = map(int, found.groups())
    ptx = result.asm["ptx"]
    return Compiled(kernel.__name__, capability, registers, stack, result.metadata.shared, ptx)


def table() -> list[str]:
    """Rows of Markdown, one a kernel, shape and target."""
    rows = [
        "| shape | kernel | target | registers a thread | stack, bytes a thread |"
        " shared memory, bytes a program |",
        "|---|---|---|---|---|---|",
    ]
    for name, (num_experts, width) in SHAPES.items():
        for launch in launches(num_experts, width):
            for capability in CAPABILITIES:
                c = compiled(*launch, capability)
                rows.append(
                    f"| {name} (E {num_experts}, D {width}) | {c.name} | sm_{capability} |"
                    f" {c.registers} | {c.spilled} | {c.shared} |"
                )
    return rows


def main() -> None:
    """Print the table and write it down."""
    rows = table()
    text = [
        "# The kernels, compiled without a GPU",
        "",
        "Command: `PYTHONPATH=. .venv/bin/python bench/compile_kernels.py`, Triton"
        f" {triton.__version__} with its own ptxas; bf16 rows and outputs, float32 logits, {TOKENS}"
        " tokens. A stack of zero means that nothing spills. Speed: not measured.",
        "",
        *rows,
        "",
    ]
    RESULTS.write_text("\n".join(text))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
