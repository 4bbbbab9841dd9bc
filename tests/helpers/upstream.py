"""What this package takes for granted of Megatron-Core: a table of signatures.

    PYTHONPATH=. .venv/bin/python tests/helpers/upstream.py            print the installed table
    PYTHONPATH=. .venv/bin/python tests/helpers/upstream.py --write    make it the expected one

The names are collected, not listed: every import from Megatron in the package, every method of
Megatron that one of its classes overrides, every name that is replaced at run time.
What cannot be seen that way (results, methods called on objects, code that is mirrored) is in
``EXPLICIT``, ``RESULTS`` and ``SOURCES``. Runs in a process of its own, without the CPU runtime,
whose replacements would otherwise be what is inspected.
"""

import ast
import hashlib
import importlib
import inspect
import json
import pathlib
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_default_moe"
EXPECTED = ROOT / "tests/upstream/upstream_signatures.json"

EXPLICIT = (
    "megatron.core.transformer.moe.moe_layer.MoELayer.forward",
    "megatron.core.transformer.moe.moe_layer.MoELayer.set_layer_number",
    "megatron.core.transformer.moe.moe_logging.MoEMetricsTracker.clear",
    "megatron.core.transformer.moe.router.TopKRouter.forward",
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_mtp_block_spec",
    "megatron.training.training.evaluate",
    "megatron.training.training.train",
    "megatron.training.training.training_log",
)
"""Methods and functions that are called on objects, or whose call of ours is relied upon."""

RESULTS = ("megatron.training.training.train_step",)
"""Functions whose results are read by position."""

SOURCES = (
    "megatron.core.models.common.model_chunk_schedule_plan.TransformerLayerSchedulePlan.run",
    "megatron.core.models.common.utils.TransformerLayerNode.backward_impl",
    "megatron.core.models.common.utils.should_free_input",
    "megatron.core.models.gpt.fine_grained_callables.build_transformer_layer_callables",
    "megatron.core.pipeline_parallel.utils.ScheduleNode.stream_acquire_context",
    "megatron.core.transformer.moe.moe_layer.MoELayer.routed_experts_compute",
    "megatron.core.transformer.moe.moe_layer.MoELayer.postprocess",
    "megatron.core.transformer.moe.moe_utils.MoECudaGraphPartialCaptureSignal"
    ".get_early_return_outputs",
    "megatron.core.transformer.moe.moe_utils.pad_routing_map",
    "megatron.core.transformer.moe.moe_utils.topk_routing_with_score_function",
    "megatron.core.transformer.moe.router.TopKRouter.routing",
    "megatron.core.transformer.transformer_layer.TransformerLayer._te_cuda_graph_replay_impl",
    "megatron.training.models.gpt.GPTModelBuilder.build_model",
    "megatron.training.models.gpt.mtp_block_spec",
)
"""Code whose steps or numbers this package follows: any change of it is worth a look."""

FIELDS_COME_AND_GO = {"TransformerConfig", "GPTModelConfig"}
"""Configs, of which single fields are read; ``test_support.py`` checks that those exist."""


def imported() -> Iterator[str]:
    """Every name the package imports from Megatron."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def overridden() -> Iterator[str]:
    """Every method of Megatron that a class of the package overrides."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "megatron_default_moe."):
        home = importlib.import_module(module.name)
        for kind in vars(home).values():
            if isinstance(kind, type) and kind.__module__ == home.__name__:
                yield from _overridden_by(kind)


def _overridden_by(kind: type) -> Iterator[str]:
    ours = {name for one in kind.__mro__ if one.__module__ == kind.__module__ for name in vars(one)}
    ours -= {"__replace__"}  # Python 3.13 gives it to every dataclass.
    for name in sorted(ours - set(vars(object)) | {"__init__"}):
        for base in kind.__mro__:
            if base.__module__.startswith("megatron.") and name in vars(base):
                if callable(getattr(base, name)):
                    yield f"{base.__module__}.{base.__qualname__}.{name}"
                break


def replaced() -> Iterator[str]:
    """Every name of Megatron that is replaced at run time."""
    from megatron_default_moe.cpu import replacements
    from megatron_default_moe.loop import patches

    for patch in (*patches.PATCHES, *patches.WHILE_BUILDING):
        yield f"{patch.owner.replace(':', '.')}.{patch.attribute}"
    for row in replacements.REPLACEMENTS:
        if row.target.startswith("megatron."):
            yield row.target
    yield "megatron.core.datasets.utils.compile_helpers"


def _resolve(name: str) -> Any:
    """What ``from ... import`` gives: an attribute before a module of the same name."""
    owner, _, attribute = name.rpartition(".")
    try:
        return getattr(pkgutil.resolve_name(owner), attribute)
    except AttributeError:
        return pkgutil.resolve_name(name)


def signature(name: str) -> str:
    """Parameter names, kinds and defaults; what it is, where there are none; or ``missing``."""
    try:
        value = _resolve(name)
    except (AttributeError, ImportError):
        return "missing"
    if inspect.ismodule(value):
        return "module"
    if FIELDS_COME_AND_GO & set(name.split(".")):
        return "there"
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return type(value).__name__
    empty = inspect.Parameter.empty
    bare = [parameter.replace(annotation=empty) for parameter in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _tree(name: str) -> ast.AST:
    value = inspect.unwrap(_resolve(name))
    return ast.parse(textwrap.dedent(inspect.getsource(value)))


def results(name: str) -> str:
    """The tuples a function returns."""
    returns = [node for node in ast.walk(_tree(name)) if isinstance(node, ast.Return)]
    return " | ".join(ast.unparse(node.value) for node in returns if node.value)


def source(name: str) -> str:
    """A digest of a function's code without its documentation, the same on every Python."""
    tree = _tree(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def table() -> dict[str, str]:
    """The whole table for the Megatron-Core that is installed."""
    names = {*imported(), *overridden(), *replaced(), *EXPLICIT}
    rows = {name: signature(name) for name in sorted(names)}
    rows |= {f"{name} returns": results(name) for name in RESULTS}
    rows |= {f"{name} code": source(name) for name in SOURCES}
    return rows


def differences(expected: dict[str, Any], installed: dict[str, Any]) -> list[str]:
    """One sentence for every row that changed, and for every name that came or went."""
    before, now = expected["signatures"], installed["signatures"]
    changed = [
        f"{name} is {now[name]} in megatron-core {installed['version']}; this package was written"
        f" for {expected['version']}, where it was {before[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
    listed = [
        f"{name} is {'no longer' if name in before else 'newly'} used by this package: run"
        " tests/helpers/upstream.py --write"
        for name in sorted(before.keys() ^ now.keys())
    ]
    return changed + listed


def main() -> None:
    """Print the version and the table as JSON, or write it down as the expected one."""
    from megatron.core import package_info

    content = {"version": package_info.__shortversion__, "signatures": table()}
    text = json.dumps(content, indent=1)
    if sys.argv[1:] == ["--write"]:
        EXPECTED.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
