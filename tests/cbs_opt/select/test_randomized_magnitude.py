"""Randomised magnitude pruning: exact counts, near magnitude, repeatable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt.select.scores import randomized_magnitude
from formulations.errors import ArgumentError


def weights_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), n=st.integers(0, 400), spread=st.floats(0.0, 1.0), seed=st.integers(0, 2**31))
def test_the_count_is_exact_and_nothing_outside_the_draw_goes(
    data: st.DataObject, n: int, spread: float, seed: int
) -> None:
    n_prune = data.draw(st.integers(0, n))
    weights = weights_of(n, seed % 17)
    pruned = ~randomized_magnitude(weights, n_prune, spread=spread, seed=seed)
    assert pruned.dtype == torch.bool
    assert int(pruned.sum()) == n_prune
    candidates = min(n, n_prune + round(spread * (n - n_prune)))
    order = weights.abs().argsort(stable=True)
    assert not bool(pruned[order[candidates:]].any())


@pytest.mark.parametrize("n_prune", [0, 1, 250, 499, 500])
def test_no_spread_is_magnitude(n_prune: int) -> None:
    weights = weights_of(500)
    pruned = ~randomized_magnitude(weights, n_prune, spread=0.0, seed=3)
    assert pruned.equal(
        torch.zeros(500, dtype=torch.bool).index_fill(0, weights.abs().argsort()[:n_prune], True)
    )


def test_a_seed_gives_one_set_and_another_seed_another() -> None:
    weights = weights_of(500)
    draws = [randomized_magnitude(weights, 300, spread=0.2, seed=seed) for seed in (1, 1, 2)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


def test_every_size_of_weight_is_drawn_with_the_same_share() -> None:
    weights = weights_of(10_000)
    pruned = ~randomized_magnitude(weights, 5_000, spread=0.5)
    shares = pruned[weights.abs().argsort()[:7_500]].double().view(15, 500).mean(dim=1)
    torch.testing.assert_close(shares, torch.full((15,), 2 / 3, dtype=torch.float64), rtol=0.0, atol=0.03)


@pytest.mark.parametrize("spread", [-0.1, 1.1, float("nan"), float("inf")])
def test_spread_outside_its_range(spread: float) -> None:
    with pytest.raises(ArgumentError) as caught:
        randomized_magnitude(weights_of(5), 2, spread=spread)
    assert caught.value.argument == "spread"
