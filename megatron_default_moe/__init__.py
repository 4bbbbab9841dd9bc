"""Default MoE on Megatron-Core: a sparse Mixture of Experts whose router learns from every expert.

The public API; everything else is an implementation detail. Names are imported on first use, so
that ``cpu.runtime`` can prepare a machine without a GPU before Megatron is imported.

    RouterGradientConfig              what the router learns from (options/config.py)
    attach                            validate the options and hook them into a TransformerConfig
    default_moe_spec                  Megatron's layer spec with this package's MoE layers
    DefaultMoEGPTModelConfig          a GPTModelConfig that builds with them (loop/model.py)
    DefaultMoELayer, DefaultMoERouter, DefaultMoE{AllGather,AlltoAll,Flex}TokenDispatcher
    commit, reduce_step_sums          the two moments of a step, for one's own training loop
    functional                        the maths, as pure functions
    UserError                         raised for a mistake that the user can mend
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "RouterGradientConfig": "options.config",
    "attach": "loop.model",
    "default_moe_spec": "loop.model",
    "DefaultMoEGPTModelConfig": "loop.model",
    "DefaultMoELayer": "layers.moe_layer",
    "DefaultMoERouter": "estimators.default",
    "DefaultMoEAllGatherTokenDispatcher": "layers.token_dispatcher",
    "DefaultMoEAlltoAllTokenDispatcher": "layers.token_dispatcher",
    "DefaultMoEFlexTokenDispatcher": "layers.token_dispatcher",
    "commit": "layers.optimizer_step",
    "reduce_step_sums": "layers.optimizer_step",
    "UserError": "errors",
}

__all__ = [*_HOME, "__version__", "functional"]


def _refuse_to_run_a_library() -> None:
    """End ``python -m`` with a module of ours that is no command, which would do nothing.

    ``sys.argv[0]`` is ``-m`` while Python looks for the module, and imports this on its way.
    """
    if sys.argv[:1] != ["-m"]:
        return
    words = [word.removeprefix("-m") for word in sys.orig_argv[1:]]
    name = next((word for word in words if word.split(".")[0] == __name__), __name__)
    from megatron_default_moe.commands.table import COMMANDS

    programs = {"", ".__main__", ".commands.line"}
    if name.removeprefix(__name__) in programs or name in {one.module for one in COMMANDS}:
        return
    parts = name.split(".")
    near = [one.name for one in COMMANDS if one.name in parts or one.module.startswith(f"{name}.")]
    sentence = f"{name} is no command: default-moe {near[0] if near else '--help'}"
    from megatron_default_moe import errors

    sys.exit(errors.report(errors.UserError(sentence)))


_refuse_to_run_a_library()


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "functional":
        return importlib.import_module("megatron_default_moe.functional")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] not in ("options.config", "errors"):
        # Before a Megatron of another version fails somewhere with an ImportError.
        importlib.import_module(f"{__name__}.patches").check_version()
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    # Megatron's --spec reads the module's dictionary.
    globals()[name] = value
    return value
