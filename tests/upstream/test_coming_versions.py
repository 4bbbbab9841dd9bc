"""What comes after the supported Megatron-Core: accepted where it costs nothing, else refused.

Contract: arguments that later versions hand to routers are passed on; a routing of indices and a
dispatcher that shows nothing are refused in one sentence; the commit is a callback where
``pretrain`` takes callbacks, and buffers are marked float32 where Megatron has a mark for it. The
stand-ins have the shapes of upstream's development branch (callbacks.py, module.py).
"""

import types
from typing import Any

import pytest
import torch
from building import build_layer

from megatron_default_moe import UserError, reduce_step_sums
from megatron_default_moe.layers import observed_router
from megatron_default_moe.layers.token_dispatcher import connect
from megatron_default_moe.loop import training


def tokens() -> torch.Tensor:
    return torch.randn(7, 3, 12, generator=torch.Generator().manual_seed(1))


def test_unknown_keywords_reach_megatrons_router(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, seen = build_layer(), []
    base = type(layer.router).__mro__[2]
    assert base.__module__.startswith("megatron.")
    stock_routing, stock_init = base.routing, base.__init__

    def routing(self: Any, logits: Any, padding_mask: Any = None, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return stock_routing(self, logits, padding_mask)

    def init(self: Any, *args: Any, layer_number: int | None = None, **kwargs: Any) -> None:
        seen.append(layer_number)
        stock_init(self, *args, **kwargs)

    monkeypatch.setattr(base, "routing", routing)
    monkeypatch.setattr(base, "__init__", init)
    layer.router.routing(torch.randn(7, 5), input_ids=1, packed_seq_params=2)
    groups = layer.router.tp_dp_cp_group
    assert groups is not None
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    type(layer.router)(layer.config, get_default_pg_collection(), layer_number=3)
    assert seen == [{"input_ids": 1, "packed_seq_params": 2}, 3]


def test_a_routing_of_indices_is_refused(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build_layer()
    base = type(layer.router).__mro__[2]
    indices = torch.zeros(21, 2, dtype=torch.int64)
    monkeypatch.setattr(base, "routing", lambda *args, **kwargs: (torch.ones(21, 2), indices))
    with pytest.raises(UserError, match=r"--moe-router-fusion .* drop --moe-router-fusion"):
        layer(tokens())


@pytest.mark.parametrize("dispatcher", [None, types.SimpleNamespace()], ids=["none", "another"])
def test_a_dispatcher_that_shows_nothing_is_refused(one_rank: None, dispatcher: Any) -> None:
    with pytest.raises(UserError, match=r"--moe-token-dispatcher-type .* use alltoall"):
        connect(dispatcher, build_layer().router, None)


def test_no_callback_where_pretrain_takes_none() -> None:
    from megatron.training import pretrain

    assert training.callback_arguments(pretrain) == {}


@pytest.mark.parametrize("skipped", [False, True])
def test_the_commit_is_a_callback(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, skipped: bool
) -> None:
    def pretrain(config: Any, *, callbacks: Any = None) -> None: ...

    monkeypatch.setattr(
        "megatron.training.global_vars.get_args", lambda: types.SimpleNamespace(curr_iteration=4)
    )
    (callback,) = training.callback_arguments(pretrain)["callbacks"]
    layer = build_layer()
    context = types.SimpleNamespace(model=[layer], skipped_iter=skipped)
    callback.on_train_step_start(context)
    layer(tokens())[0].sum().backward()
    reduce_step_sums(layer)
    callback.on_train_step_end(context)
    assert layer.router.pending is None
    assert bool(layer.router.default_vectors.any()) is not skipped


def test_float32_buffers_are_marked_where_megatron_has_a_mark(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[torch.Tensor] = []
    monkeypatch.setattr(observed_router, "_MARK_FLOAT32", marked.append)
    router = build_layer().router
    assert {id(x) for x in marked} == {id(getattr(router, x)) for x in router.fp32_buffers}
    # Megatron's own mark is what keeps them then; here nothing does, so the override is not used.
    assert router.bfloat16().default_vectors.dtype == torch.bfloat16
