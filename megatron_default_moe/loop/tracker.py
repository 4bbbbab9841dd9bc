"""What the log, TensorBoard and W&B say about routers and default vectors.

``RouterMetricsTracker`` is Megatron's MoE metrics tracker that also reports what the routers leave
in ``step_metrics``; Megatron calls ``report`` after every step, so nothing is patched. On logging
steps one small all-reduce over the pipeline gathers all layers; on other steps it costs nothing.
"""

import contextlib
import datetime
import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from torch import Tensor

from megatron_default_moe.layers import fidelity
from megatron_default_moe.layers.layer_metrics import NAMES, SUMMED

OF_ALL = ("router entropy", "load max/mean", "dead experts")
"""The metrics that every model has."""


class MeteredRouter(Protocol):
    """What the tracker reads of a router."""

    collects_details: bool
    probes: bool
    step_metrics: Tensor | None

    @property
    def model_layer_number(self) -> int:
        """Number of the layer in the model, from 1, MTP layers after the decoder's."""


class Progress:
    """Tokens seen and time left, for the log line (Megatron prints neither)."""

    def __init__(self, train_iters: int, tokens: Callable[[], int]) -> None:
        """Start; the clock starts with the first step that is reported.

        Args:
            train_iters: number of the run's last step.
            tokens: returns the tokens consumed since the run began, in earlier processes too.
        """
        self.train_iters = train_iters
        self.tokens = tokens
        self._start: tuple[int, float] | None = None

    def eta(self, iteration: int) -> datetime.timedelta | None:
        """Time left at this process's mean pace so far; None before it is known."""
        if self._start is None:
            self._start = (iteration, time.monotonic())
            return None
        first, started = self._start
        if iteration == first:
            return None
        pace = (time.monotonic() - started) / (iteration - first)
        return datetime.timedelta(seconds=round(pace * max(0, self.train_iters - iteration)))


class RouterMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, with the router metrics, the tokens and the time left."""

    def __init__(
        self,
        *,
        log_interval: int,
        num_experts: int,
        progress: Progress,
        metrics: Sequence[str],
        fidelity_interval: int | None = None,
    ) -> None:
        """Report every ``log_interval`` steps on routers with ``num_experts`` experts.

        Of what belongs to estimators, ``metrics`` alone is reported; the fidelity of the router's
        gradient every ``fidelity_interval`` steps.
        """
        self.fidelity_interval = fidelity_interval
        super().__init__()
        self._names = [name for name in NAMES if name in OF_ALL or name in metrics]
        self.names = self._names
        self.log_interval = log_interval
        self.num_experts = num_experts
        self.progress = progress
        self.routers: Sequence[MeteredRouter] = ()

    def logs(self, iteration: int) -> bool:
        """Whether the step with this number (from 1) is logged."""
        return iteration % self.log_interval == 0

    def probes(self, iteration: int) -> bool:
        """Whether the step with this number is probed for the fidelity of the gradient."""
        return bool(self.fidelity_interval) and iteration % (self.fidelity_interval or 1) == 0

    def report(self, loss_scale: float, iteration: int, *args: Any, **kwargs: Any) -> str:
        """Report as upstream does, then this package's metrics on logging steps."""
        line = super().report(loss_scale, iteration, *args, **kwargs)
        eta = self.progress.eta(iteration)
        if not self.logs(iteration):
            return line
        probed = self.probes(iteration)
        self.names = [name for name in self._names if probed or name not in fidelity.NAMES]
        assert not args, "Megatron passes everything else by name"
        table = self._gather(kwargs["num_layers"], kwargs.get("mtp_num_layers"), kwargs)
        scalars = self._scalars(table)
        writer, wandb = kwargs.get("writer"), kwargs.get("wandb_writer")
        self._log_scalars({**scalars, "consumed tokens": self.progress.tokens()}, iteration,
                          writer, wandb)  # fmt: skip
        if kwargs.get("per_layer_logging"):
            self._log_scalars(self._per_layer(table), iteration, writer, wandb)
        shown = "".join(f" {name}: {value:.4g} |" for name, value in scalars.items())
        tokens = f" consumed tokens: {self.progress.tokens()} |"
        return line + shown + tokens + (f" ETA: {eta} |" if eta is not None else "")

    def _gather(self, num_layers: int, mtp_num_layers: int | None, kwargs: dict[str, Any]) -> Any:
        """[layers, 1 + len(NAMES) + E] of all pipeline stages; column 0 marks MoE layers."""
        width = 1 + len(NAMES) + self.num_experts
        table = torch.zeros(
            num_layers + (mtp_num_layers or 0), width, device=torch.cuda.current_device()
        )
        for router in self.routers:
            if router.step_metrics is not None:
                row = router.model_layer_number - 1
                table[row, 0] = 1
                table[row, 1:] = router.step_metrics
        collection = kwargs.get("pg_collection")
        group = (
            collection.pp
            if collection is not None
            else parallel_state.get_pipeline_model_parallel_group()
        )
        if group.size() > 1:
            torch.distributed.all_reduce(table, group=group)
        return table.tolist()

    def _scalars(self, table: list[list[float]]) -> dict[str, float]:
        """Mean or sum over the MoE layers; nothing if the step was not taken."""
        rows = [row[1:] for row in table if row[0]]
        if not rows:
            return {}
        totals = {name: sum(row[NAMES.index(name)] for row in rows) for name in self.names}
        return {
            name: total if name in SUMMED else total / len(rows) for name, total in totals.items()
        }

    def _per_layer(self, table: list[list[float]]) -> dict[str, float]:
        """One scalar a layer and metric, named as Megatron names them, and one an expert."""
        scalars: dict[str, float] = {}
        for layer, (present, *values) in enumerate(table):
            if present:
                for name in self.names:
                    scalars[f"moe/{name}_layer_{layer}"] = values[NAMES.index(name)]
                for expert, load in enumerate(values[len(NAMES) :]):
                    scalars[f"load/layer_{layer}/expert_{expert}"] = load
        return scalars


class _Renaming:
    """A writer of TensorBoard's or W&B's that writes what is called validation by another name."""

    def __init__(self, writer: Any, name: str) -> None:
        self._writer, self._name = writer, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._writer, attribute)

    def _renamed(self, tag: str) -> str:
        return tag.replace(" validation", f" {self._name}", 1)

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> None:
        self._writer.add_scalar(self._renamed(tag), *args, **kwargs)

    def log(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._writer.log(
            {self._renamed(tag): value for tag, value in values.items()}, *args, **kwargs
        )


@contextlib.contextmanager
def _writers_renaming(function: Callable[..., Any], name: str) -> Iterator[None]:
    """Let this function of Megatron's find writers that rename."""
    names = vars(sys.modules[function.__module__])
    originals = {getter: names[getter] for getter in ("get_tensorboard_writer", "get_wandb_writer")}

    def renaming(getter: Callable[[], Any]) -> Any:
        writer = getter()
        return writer and _Renaming(writer, name)

    try:
        for key, getter in originals.items():
            names[key] = functools.partial(renaming, getter)
        yield
    finally:
        names.update(originals)


def with_evaluations_named(evaluate_and_print_results: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's evaluation: what it measures is logged by a name of its own.

    Megatron logs the loss of the test set as validation loss too, and so the second evaluation of
    the last step, on other batches, where ``--eval-interval`` has it evaluated already.

    Args:
        evaluate_and_print_results: upstream's function.
    """
    from megatron.training.global_vars import get_args

    signature = inspect.signature(evaluate_and_print_results)

    @functools.wraps(evaluate_and_print_results)
    def named(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        prefix, iteration = arguments["prefix"], arguments["iteration"]
        interval, loaded = get_args().eval_interval, get_args().iteration
        name = "validation"
        if prefix.endswith("on test set"):
            name = "test"
        elif prefix.endswith("on validation set") and interval:
            again = iteration > loaded and iteration % interval == 0
            name = "validation after training" if again else name
        with _writers_renaming(evaluate_and_print_results, name):
            return evaluate_and_print_results(*args, **kwargs)

    return named
