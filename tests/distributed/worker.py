"""Run a list of trainings in one torchrun launch, recording every step to the last bit.

``worker.py CASES.json OUT``: each case is ``{"name", "argv", ...}`` and goes through the package's
own entry, ``pretrain.run``. A launch costs ten seconds of imports, a further case in it two. Per
case and rank, ``OUT/<name>.<rank>.pt`` holds a list of steps: loss, gradient norm, whether skipped,
and per MoE layer the estimator's state after the step, the router gradient, and the vectors that
the step should have led to, computed apart in float64 from what the experts returned.

With ``"stock": true`` the case builds a plain GPTModelConfig and nothing is patched. With
``"rerun": true`` Megatron's rerun machine runs every step twice. ``"poison": [where, step, value]``
puts a number that is not finite into one row of expert 0 in layer 1 (``expert``), or into the
gradient of its router (``gradient``), on rank 0 in that step.
"""

import datetime
import gc
import json
import os
import pathlib
import sys
from typing import Any

from megatron_default_moe.cpu import runtime

runtime.install()

import torch  # noqa: E402
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from megatron.training import training as megatron_training  # noqa: E402

from megatron_default_moe import pretrain  # noqa: E402
from megatron_default_moe.errors import UserError  # noqa: E402
from megatron_default_moe.layers import moe_layer, optimizer_step  # noqa: E402
from megatron_default_moe.maths import naive  # noqa: E402


def number_of(router: Any) -> int:
    """Number of a router's layer in the model; Megatron numbers MTP layers from 1 again."""
    after = router.config.num_layers if router.is_mtp_layer else 0
    return router.layer_number + after


class Recorder:
    """What one case did on this rank."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.rerun: bool = case.get("rerun", False)
        self.poison: tuple[str, int, str] = case.get("poison", ("nowhere", 0, "nan"))
        self.steps: list[dict[str, Any]] = []
        self.layers: dict[int, dict[str, Any]] = {}
        self.runs = 0

    def poisons(self, where: str) -> bool:
        """Whether this is the place and step to poison, on this rank."""
        place, step, _ = self.poison
        return place == where and step == len(self.steps) + 1 and torch.distributed.get_rank() == 0

    def poison_expert(self, layer: Any) -> None:
        """Spoil the first row of the first local expert of layer 1, if it has one."""

        def spoil(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            counts = args[1].tolist()
            if not (layer.layer_number == 1 and self.poisons("expert") and counts[0]):
                return output
            rows = output[0].clone()
            rows[0] = float(self.poison[2])
            return rows, *output[1:]

        layer.experts.register_forward_hook(spoil)

    def watch_experts(self, layer: Any) -> None:
        """Sum the experts' outputs apart from the package's own sums, in float64."""

        def sum_up(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if not (layer.training and torch.is_grad_enabled()):
                return
            _, tokens_per_expert, probs = args
            rows = output[0].detach()
            weight = probs.detach().double().reshape(-1, 1)
            if layer.router.options.weighting == "uniform":
                rows = torch.where(weight != 0, rows / weight, 0)
                weight = (weight != 0).double()
            counts = tokens_per_expert.tolist()
            sums = torch.stack([part.sum(0) for part in rows.double().split(counts)])
            mass = torch.stack([part.sum() for part in weight.split(counts)])
            # Every expert-tensor-parallel rank sees the same rows, as partial sums.
            entry = self.layers.setdefault(id(layer), {"sums": 0, "mass": 0})
            entry["sums"] = entry["sums"] + sums
            entry["mass"] = entry["mass"] + mass / layer.token_dispatcher.tp_size

        layer.experts.register_forward_hook(sum_up)

    def expected(self, layer: Any, before: torch.Tensor) -> torch.Tensor:
        """The vectors that this step should lead to."""
        entry = self.layers.pop(id(layer))
        router = layer.router
        width = router.vector_width
        flat = torch.zeros(router.num_experts, width + 1, dtype=torch.float64)
        flat[router.local_experts, :width] = entry["sums"]
        flat[router.local_experts, width] = entry["mass"]
        torch.distributed.all_reduce(flat, group=router.tp_dp_cp_group)
        return naive.ema(before, flat[:, :width], flat[:, width], router.options.beta)

    def train_step(self, original: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            model = args[2]
            layers = [m for c in model for m in c.modules() if hasattr(m, "router")]
            watched = [m for m in layers if hasattr(m.router, "default_vectors")]
            before = {id(m): m.router.default_vectors.double().clone() for m in watched}
            if self.rerun:
                get_rerun_state_machine().set_mode(RerunMode.REPORT_DETERMINISM_STATS)
            self.runs = 0
            result = original(*args, **kwargs)
            step: dict[str, Any] = {
                "loss": {key: value.clone() for key, value in (result[0] or {}).items()},
                "skipped": bool(result[1]),
                "grad_norm": result[5],
                "runs": self.runs,
                "layers": {},
            }
            for layer in layers:
                number = number_of(layer.router)
                step["layers"][number] = {
                    "router_weight": layer.router.weight.detach().clone().float(),
                    "router_grad": self.router_grads.get(number),
                    "fidelity": getattr(layer.router, "fidelity", None),
                    "state": {
                        name: getattr(layer.router, name).detach().clone()
                        for name in getattr(layer.router, "checkpointed", ())
                    },
                }
            for layer in watched:
                step["layers"][number_of(layer.router)].update(
                    before=before[id(layer)].float(),
                    rejected=layer.router.rejected_updates.clone(),
                    vectors=layer.router.default_vectors.clone(),
                    updates=layer.router.default_vector_updates.clone(),
                    expected=self.expected(layer, before[id(layer)]),
                )
            self.steps.append(step)
            return result

        return recorded

    router_grads: dict[int, torch.Tensor]

    def finalize(self, original: Any) -> Any:
        """Keep the router gradients as finalisation leaves them, before clipping."""

        def recorded(model: Any, *args: Any, **kwargs: Any) -> None:
            self.runs += 1
            if self.poisons("gradient"):
                router = next(m.router for c in model for m in c.modules() if hasattr(m, "router"))
                router.weight.main_grad[0, 0] = float(self.poison[2])
            original(model, *args, **kwargs)
            self.router_grads = {
                number_of(module.router): module.router.weight.main_grad.detach().clone()
                for chunk in model
                for module in chunk.modules()
                if hasattr(module, "router")
            }

        return recorded


def run(case: dict[str, Any], out: pathlib.Path) -> None:
    """Run one case and write what it did."""
    recorder = Recorder(case)
    originals = {
        (megatron_training, "train_step"): megatron_training.train_step,
        (optimizer_step, "megatron_finalize_model_grads"): (
            optimizer_step.megatron_finalize_model_grads
        ),
        (moe_layer.DefaultMoELayer, "__init__"): moe_layer.DefaultMoELayer.__init__,
        (pretrain, "build_model_config"): pretrain.build_model_config,
    }

    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        originals[moe_layer.DefaultMoELayer, "__init__"](layer, *args, **kwargs)
        recorder.watch_experts(layer)
        recorder.poison_expert(layer)

    moe_layer.DefaultMoELayer.__init__ = init
    optimizer_step.megatron_finalize_model_grads = recorder.finalize(
        optimizer_step.megatron_finalize_model_grads
    )
    recorder.router_grads = {}
    if case.get("stock"):
        pretrain.build_model_config = _stock_model_config

    def install_then_record() -> None:
        from megatron_default_moe.loop import patches

        if not case.get("stock"):
            originals_install()
        assert case.get("stock") or patches.installed()
        megatron_training.train_step = recorder.train_step(megatron_training.train_step)

    from megatron_default_moe.loop import patches

    originals_install = patches.install
    patches.install = install_then_record
    status = "ok"
    try:
        pretrain.run(case["argv"])
    except UserError as error:
        status = f"UserError: {error}"
    except SystemExit as end:  # --exit-interval ends this way
        status = "ok" if not end.code else f"exit {end.code}"
    finally:
        patches.install = originals_install
        for (owner, name), value in originals.items():
            setattr(owner, name, value)
        _forget_the_run()
    rank = int(os.environ["RANK"])
    torch.save({"status": status, "steps": recorder.steps}, out / f"{case['name']}.{rank}.pt")


def _stock_model_config(args: Any, options: Any) -> Any:
    from megatron.training.argument_utils import gpt_config_from_args

    return gpt_config_from_args(args)


def _forget_the_run() -> None:
    """Back to a fresh process, as far as Megatron is concerned."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # Megatron only forgets its groups; each keeps three threads, which slow down all others.
        world = torch.distributed.group.WORLD
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            if group is not world:
                torch.distributed.destroy_process_group(group)
    megatron_training.destroy_global_state()
    MTPLossLoggingHelper.tracker = {}
    # What the run leaves in circles must not be collected in a data loader's forked process, where
    # the threads that some of it belongs to are not (Python 3.13 then ends there).
    gc.collect()


if __name__ == "__main__":
    cases, out_dir = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
    # Megatron uses a process group that is already there; a second rendezvous would hang.
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    for one in cases:
        run(one, out_dir)
    torch.distributed.destroy_process_group()
