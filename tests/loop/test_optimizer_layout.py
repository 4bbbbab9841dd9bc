"""A checkpoint of one optimizer resumes in two, and the other way round.

Contract: saved and loaded by Megatron's own checkpointing, every parameter group ends with the
state and settings of its saved counterpart, and stays what it was itself: the experts' or not.
The whole run, over ranks: ``tests/distributed/test_resharding.py``.
"""

import pathlib
from typing import Any

import building
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_default_moe.loop.optimizer_layout import with_regrouped_state

pytestmark = pytest.mark.usefixtures("one_rank")
AS_TRAINING = {"chained_optim_avoid_prefix": True}
"""What Megatron's training asks of a checkpoint: tensors by name, whichever optimizer has them."""


def build(experts_apart: bool, seed: int, bf16: bool) -> tuple[Any, Any]:
    """A model and its optimizer, the experts' gradients reduced apart or not; some steps old."""
    dtype = {"bf16": True, "params_dtype": torch.bfloat16} if bf16 else {}
    model = building.build_model(seed, **dtype)
    model = model.bfloat16() if bf16 else model
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = not experts_apart  # as Megatron does above EP 1
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    config = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.0, **dtype)
    optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
    for _ in range(seed):
        for parameter in ddp.parameters():
            parameter.main_grad.normal_()
        optimizer.step()
    return ddp, optimizer


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    return [group for one in optimizer.chained_optimizers for group in one.param_groups]


def moments(optimizer: Any) -> set[tuple[tuple[int, ...], float]]:
    """The first moments: shape and sum of each, all different."""
    states = [s for one in optimizer.chained_optimizers for s in one.optimizer.state.values()]
    return {(tuple(s["exp_avg"].shape), float(s["exp_avg"].sum())) for s in states}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("experts_apart", [False, True], ids=["to one", "to two"])
def test_groups_follow_the_state_and_stay_whose_they_are(
    tmp_path: pathlib.Path, experts_apart: bool, bf16: bool
) -> None:
    saved_model, saved = build(not experts_apart, seed=3, bf16=bf16)
    model, optimizer = build(experts_apart, seed=1, bf16=bf16)
    assert len(optimizer.chained_optimizers) == 2 if experts_apart else 1
    for group in groups_of(saved):
        group["lr"] = 3e-4  # as a schedule does
    before = [(group["is_expert_parallel"], len(group["params"])) for group in groups_of(optimizer)]
    assert any(is_expert for is_expert, _ in before) == experts_apart
    state = saved.sharded_state_dict(saved_model.sharded_state_dict(), metadata=AS_TRAINING)
    dist_checkpointing.save({"optimizer": state}, str(tmp_path))
    wanted = optimizer.sharded_state_dict(
        model.sharded_state_dict(), is_loading=True, metadata=AS_TRAINING
    )
    loaded = dist_checkpointing.load({"optimizer": wanted}, str(tmp_path))["optimizer"]
    with_regrouped_state(type(optimizer).load_state_dict)(optimizer, loaded)
    groups = groups_of(optimizer)
    assert [(group["is_expert_parallel"], len(group["params"])) for group in groups] == before
    assert {group["lr"] for group in groups} == {3e-4}
    assert moments(optimizer) == moments(saved)
