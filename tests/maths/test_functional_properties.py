"""What the formulas promise for any input that hypothesis finds.

The order of tokens and the splitting of a batch do not matter, experts without tokens and poisoned
experts keep their vectors, and the moving average is a convex combination.
"""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from maths import WEIGHTINGS, same_bits
from torch import Tensor

from megatron_default_moe.maths import functional

PROPERTY = hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, database=None, print_blob=False
)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """A routed batch in float64, with experts without tokens and probabilities of zero."""
    num_tokens = draw(st.integers(1, 63))
    num_experts = draw(st.integers(1, 7))
    width = draw(st.integers(1, 33))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    # Top-1, with some experts out of reach.
    reachable = draw(st.integers(1, num_experts))
    expert_T = torch.randint(reachable, (num_tokens,), generator=generator)
    prob_T = torch.rand(num_tokens, generator=generator, dtype=torch.float64) + 0.01
    prob_T[torch.rand(num_tokens, generator=generator) < draw(st.sampled_from([0, 0.2, 1]))] = 0
    own_TD = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    return {
        "experts": num_experts,
        "expert": expert_T,
        "prob": prob_T,
        "rows": prob_T.unsqueeze(-1) * own_TD,
        "weighting": draw(st.sampled_from(WEIGHTINGS)),
        "generator": generator,
    }


def statistics(batch: dict[str, Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and mass of these tokens: sorted by expert as a dispatcher does, in the given order."""
    expert_T, prob_T = batch["expert"][tokens], batch["prob"][tokens]
    order = expert_T.argsort(stable=True)
    counts_E = torch.bincount(expert_T, minlength=batch["experts"])
    sums_ED = functional.expert_sums(
        batch["rows"][tokens][order], counts_E, prob_T[order], batch["weighting"]
    )
    chosen_TE = torch.nn.functional.one_hot(expert_T, batch["experts"]).bool()
    probs_TE = prob_T.unsqueeze(-1).expand(-1, batch["experts"])
    return sums_ED, functional.router_mass(probs_TE * chosen_TE, batch["weighting"])


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@PROPERTY
@hypothesis.given(batches())
def test_the_order_of_tokens_does_not_matter(batch: dict[str, Any]) -> None:
    num_tokens = len(batch["prob"])
    in_order = statistics(batch, torch.arange(num_tokens))
    shuffled = statistics(batch, torch.randperm(num_tokens, generator=batch["generator"]))
    near(shuffled[0], in_order[0])
    near(shuffled[1], in_order[1])


@PROPERTY
@hypothesis.given(batches(), st.integers(1, 5))
def test_pieces_of_a_batch_add_up(batch: dict[str, Any], num_pieces: int) -> None:
    tokens = torch.arange(len(batch["prob"]))
    whole = statistics(batch, tokens)
    pieces = [statistics(batch, piece) for piece in tokens.chunk(num_pieces)]
    near(sum(sums for sums, _ in pieces), whole[0])
    near(sum(mass for _, mass in pieces), whole[1])


@PROPERTY
@hypothesis.given(batches())
def test_sums_and_mass_equal_the_loop(batch: dict[str, Any]) -> None:
    sums_ED, mass_E = statistics(batch, torch.arange(len(batch["prob"])))
    for i in range(batch["experts"]):
        mine = (batch["expert"] == i) & (batch["prob"] != 0)
        rows, probs = batch["rows"][mine], batch["prob"][mine]
        if batch["weighting"] == "uniform":
            near(sums_ED[i], (rows / probs.unsqueeze(-1)).sum(0))
            assert mass_E[i] == mine.sum()
        else:
            near(sums_ED[i], rows.sum(0))
            near(mass_E[i], probs.sum())


@PROPERTY
@hypothesis.given(batches(), st.floats(0, 0.9999))
def test_experts_without_tokens_keep_their_vector(batch: dict[str, Any], beta: float) -> None:
    """Without tokens, or with tokens of probability zero only."""
    sums_ED, mass_E = statistics(batch, torch.arange(len(batch["prob"])))
    vectors_ED = torch.randn(sums_ED.shape, generator=batch["generator"], dtype=torch.float64)
    after_ED = functional.ema(vectors_ED, sums_ED, mass_E, beta)
    used = torch.zeros(batch["experts"], dtype=torch.bool)
    used[batch["expert"][batch["prob"] != 0]] = True
    assert same_bits(after_ED[~used], vectors_ED[~used])
    assert (after_ED[used] != vectors_ED[used]).any(-1).all()


@PROPERTY
@hypothesis.given(batches(), st.floats(0, 0.9999), st.sampled_from(["nan", "inf", "-inf"]))
def test_a_poisoned_expert_stays_and_touches_no_other(
    batch: dict[str, Any], beta: float, poison: str
) -> None:
    tokens = torch.arange(len(batch["prob"]))
    sums_ED, mass_E = statistics(batch, tokens)
    vectors_ED = torch.randn(sums_ED.shape, generator=batch["generator"], dtype=torch.float64)
    clean_ED = functional.ema(vectors_ED, sums_ED, mass_E, beta)
    # One token's output, with a probability that counts, is not finite.
    victim = int(batch["expert"][0])
    batch["prob"][0] = 0.5
    batch["rows"][0, -1] = float(poison)
    sums_ED, mass_E = statistics(batch, tokens)
    after_ED = functional.ema(vectors_ED, sums_ED, mass_E, beta)
    others = torch.arange(batch["experts"]) != victim
    assert same_bits(after_ED[victim], vectors_ED[victim])
    assert same_bits(after_ED[others], clean_ED[others])


finite = st.floats(-1e6, 1e6, width=32)


@PROPERTY
@hypothesis.given(finite, finite, st.floats(2.0**-10, 2.0**10, width=32), st.floats(0, 0.9999))
def test_ema_is_a_convex_combination(old: float, total: float, mass: float, beta: float) -> None:
    after = functional.ema(
        torch.tensor([[old]]), torch.tensor([[total]]), torch.tensor([mass]), beta
    ).item()
    mean = (torch.tensor(total) / torch.tensor(mass)).item()
    slack = 4 * torch.finfo(torch.float32).eps * max(abs(old), abs(mean))
    assert min(old, mean) - slack <= after <= max(old, mean) + slack
    assert after == pytest.approx(beta * old + (1 - beta) * mean, abs=slack)
