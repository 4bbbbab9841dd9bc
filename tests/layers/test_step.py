"""An optimizer step begins and ends as it should, or says so: nothing is counted in silence.

Contract: a taken step whose sums nobody reduced is an error; what an interrupted forward pass has
left is in no step; `attach` commits at the finalisation where no loop is known to commit, and does
not put itself over a foreign finalisation; a frozen router's vectors stay; a model in which one MoE
layer is still Megatron's is refused.
"""

from typing import Any

import pytest
import torch
from building import build_model, train_step
from layer_reference import close, reference, tokens

from megatron_default_moe import UserError, attach, commit, reduce_step_sums
from megatron_default_moe.layers import optimizer_step
from megatron_default_moe.loop import model as model_of_the_loop
from megatron_default_moe.loop import patches, training
from megatron_default_moe.options.config import RouterGradientConfig


def backward(layer: Any, x: torch.Tensor) -> None:
    layer(x)[0].sum().backward()


@pytest.mark.parametrize("gradient", ["default", "topk"])
def test_a_step_whose_sums_nobody_reduced_is_an_error(new_layer: Any, gradient: str) -> None:
    layer = new_layer(gradient=gradient)
    train_step(layer, tokens(layer))
    backward(layer, tokens(layer))
    with pytest.raises(RuntimeError, match=r"reduce_step_sums\(model\)"):
        commit(layer, taken=True)
    commit(layer, taken=False)
    commit(layer, taken=True)  # Nothing was counted since: nothing to complain of.


def test_a_finalisation_that_a_framework_put_over_ours_is_found(new_layer: Any) -> None:
    from megatron.core.distributed import finalize_model_grads

    layer = new_layer()
    layer.config.finalize_model_grads_func = finalize_model_grads  # As a setup after attach does.
    backward(layer, tokens(layer))
    with pytest.raises(RuntimeError, match="finalize_model_grads_func"):
        commit(layer, taken=True)


@pytest.mark.parametrize("how", ["next step", "own loop"])
def test_a_forward_pass_that_raised_is_in_no_step(new_layer: Any, how: str) -> None:
    layer, untouched = new_layer(beta=0.0), new_layer(beta=0.0)
    layer(tokens(layer, 1) * 5)  # Megatron's loop, or the user's, raises behind this pass.
    if how == "next step":
        training.before_step(layer, 0)
    else:
        commit(layer, taken=False)
    train_step(layer, tokens(layer, 2))
    train_step(untouched, tokens(layer, 2))
    assert torch.equal(layer.router.default_vectors, untouched.router.default_vectors)
    assert layer.router.default_vectors.norm() > 0


def test_beginning_a_step_keeps_what_is_pending(new_layer: Any) -> None:
    """A rerun of the step overwrites the pending sums; only the commit drops them."""
    layer = new_layer()
    backward(layer, tokens(layer))
    reduce_step_sums(layer)
    optimizer_step.begin(layer)
    assert layer.router.pending is not None
    commit(layer, taken=True)
    assert int(layer.router.default_vector_updates.max()) == 1


@pytest.mark.parametrize("patched", [True, False])
def test_attach_commits_at_the_finalisation_unless_a_loop_commits(
    new_layer: Any, monkeypatch: pytest.MonkeyPatch, patched: bool
) -> None:
    config = new_layer().config
    config.finalize_model_grads_func = None
    monkeypatch.setattr(patches, "installed", lambda: patched)
    attach(config, RouterGradientConfig())
    names = {True: "finalize_model_grads", False: "finalize_model_grads_and_commit"}
    assert config.finalize_model_grads_func is getattr(optimizer_step, names[patched])


def test_attach_stops_at_a_foreign_finalisation(new_layer: Any) -> None:
    from megatron.core.distributed import finalize_model_grads

    config = new_layer().config
    config.finalize_model_grads_func = finalize_model_grads
    with pytest.raises(AssertionError, match="call reduce_step_sums from it"):
        attach(config, RouterGradientConfig())


def test_the_vectors_of_a_frozen_router_stay(new_layer: Any) -> None:
    layer = new_layer()
    train_step(layer, tokens(layer, 1))
    before_ED = layer.router.default_vectors.clone()
    layer.router.frozen_expert_bias = True
    train_step(layer, tokens(layer, 2))
    assert torch.equal(layer.router.default_vectors, before_ED)
    assert int(layer.router.default_vector_updates.max()) == 1
    layer.router.frozen_expert_bias = False
    train_step(layer, tokens(layer, 2))
    assert not torch.equal(layer.router.default_vectors, before_ED)


def test_before_use_counts_the_update_that_it_uses_in_the_bias_correction(new_layer: Any) -> None:
    layer = new_layer(order="before-use", bias_correction=True, beta=0.9)
    x = tokens(layer)
    (y,) = train_step(layer, x)
    found = reference(layer, x, torch.zeros(5, x.shape[-1]))
    weights_TE1 = torch.where(found["active"], found["probs"], 0.0).unsqueeze(-1)
    mean_ED = (weights_TE1 * found["own"]).sum(0) / weights_TE1.sum(0)
    assert found["active"].any(0).all()
    close(y.reshape(-1, y.shape[-1]), reference(layer, x, mean_ED)["output"])


def test_a_taken_step_ends_the_wait_for_a_baseline(new_layer: Any) -> None:
    layer = new_layer(from_baseline=True)
    plain = {k: v for k, v in layer.state_dict().items() if "default_vector" not in k}
    train_step(layer, tokens(layer))
    with pytest.raises(RuntimeError, match="default_vectors"):
        layer.load_state_dict(plain)
    waiting = new_layer(from_baseline=True)
    waiting.load_state_dict(plain)


def test_a_fade_in_begins_with_a_checkpoint_that_counts_no_steps_of_one(new_layer: Any) -> None:
    """Of such a checkpoint all but the count is asked; of any other, the count too."""
    whole = new_layer()
    train_step(whole, tokens(whole))
    beginning = new_layer(fade_in=3, absent=("default_vector_steps",))
    beginning.load_state_dict(whole.state_dict())
    assert torch.equal(beginning.router.default_vectors, whole.router.default_vectors)
    train_step(beginning, tokens(beginning))
    going_on = new_layer(fade_in=3)
    going_on.load_state_dict(beginning.state_dict())
    assert int(going_on.router.default_vector_steps) == 1
    with pytest.raises(RuntimeError, match="default_vector_steps"):
        new_layer(fade_in=3).load_state_dict(whole.state_dict())


@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
def test_a_dispatcher_forgets_what_it_has_shown(new_layer: Any, kind: str) -> None:
    layer = new_layer(moe_token_dispatcher_type=kind)
    layer(tokens(layer))
    with pytest.raises(AssertionError, match="without dispatch_postprocess"):
        layer.token_dispatcher.combine_preprocess(tokens(layer))


def test_a_layer_that_stayed_megatrons_is_refused(one_rank: None) -> None:
    ours = build_model()
    model_of_the_loop.refuse_stock_layers(ours)
    from megatron.core.transformer.moe.moe_layer import MoELayer

    ours.decoder.layers[1].mlp.__class__ = MoELayer
    with pytest.raises(UserError, match=r"decoder.layers.1.mlp was built as Megatron's own"):
        model_of_the_loop.refuse_stock_layers(ours)
