"""The compiled and the torch kernels make the same best-improvement swaps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cbs_opt.select.selection_program import dense as dense_swaps
from cbs_opt.select.selection_program.dense import SwapCounts, swap_dense
from tests.cbs_opt.fisher import KINDS, dense_form, fisher_block, random_set, swap_changes

ENGINES = (dense_swaps.swap_dense, dense_swaps._swap_torch)


def batch_of(kinds: tuple[str, ...], n: int, n_prune: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forms = [dense_form(fisher_block(kind, n, 9)) for kind in kinds]
    gram = torch.stack([matrix for matrix, _ in forms])
    linear = torch.stack([c for _, c in forms])
    pruned = torch.stack([random_set(n, n_prune, seed) for seed in range(len(kinds))])
    return gram, (gram @ pruned.double()[:, :, None])[:, :, 0], linear, pruned


def run(engine, gram, product, linear, pruned, budget) -> tuple[Tensor, Tensor, SwapCounts]:  # type: ignore[no-untyped-def]
    v, y = product.clone(), pruned.clone()
    tolerance = torch.full((len(gram),), 1e-9, dtype=torch.float64)
    counts = engine(gram, v, linear, y, tolerance, torch.as_tensor(budget).expand(len(gram)).contiguous())
    return v, y, counts


def test_every_step_is_the_best_swap() -> None:
    for kind in KINDS:
        block = fisher_block(kind, 20, 9)
        gram, product, linear, pruned = batch_of((kind,), 20, 8)
        for _ in range(4):
            changes, inside, outside = swap_changes(block, pruned[0])
            product, after, counts = run(swap_dense, gram, product, linear, pruned, 1)
            if float(changes.min()) >= -1e-9:
                assert after.equal(pruned)
                assert bool(counts.locally_optimal)
                break
            out, into = (pruned & ~after)[0].nonzero().item(), (after & ~pruned)[0].nonzero().item()
            made = changes[(inside == out).nonzero().item(), (outside == into).nonzero().item()]
            assert float(made) == pytest.approx(float(changes.min()), rel=1e-9)
            pruned = after


@pytest.mark.parametrize("budget", [0, 1, 3, 10_000])
def test_both_engines_agree(budget: int) -> None:
    kinds = ("flat", "decaying", "gradient", "hessian")  # no ties
    data = batch_of(kinds, 24, 10)
    compiled, tensors = (run(engine, *data, budget) for engine in ENGINES)
    assert compiled[1].equal(tensors[1])
    torch.testing.assert_close(compiled[0], tensors[0])
    assert compiled[2].swaps.equal(tensors[2].swaps)
    assert compiled[2].locally_optimal.equal(tensors[2].locally_optimal)


@pytest.mark.parametrize("engine", ENGINES)
def test_product_and_counts_stay_true(engine) -> None:  # type: ignore[no-untyped-def]
    gram, product, linear, pruned = batch_of(KINDS, 24, 10)
    budget = torch.tensor([0, 1, 2, 5, 100, 100, 100])
    v, y, counts = run(engine, gram, product, linear, pruned, budget)
    assert y.sum(dim=1).tolist() == [10] * len(KINDS)
    torch.testing.assert_close(v, (gram @ y.double()[:, :, None])[:, :, 0], rtol=1e-10, atol=1e-12)
    assert bool((counts.swaps <= budget).all())
    for row, kind in enumerate(KINDS):
        best = float(swap_changes(fisher_block(kind, 24, 9), y[row])[0].min())
        assert not bool(counts.locally_optimal[row]) or best >= -1.001e-9


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n_prune", [0, 24])
def test_nothing_to_swap(engine, n_prune: int) -> None:  # type: ignore[no-untyped-def]
    data = batch_of(("flat",), 24, n_prune)
    _, pruned, counts = run(engine, *data, 5)
    assert pruned.equal(data[3])
    assert counts.swaps.tolist() == [0]
    assert counts.locally_optimal.tolist() == [True]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_no_pair_that_could_be_best_is_passed_over(rank: int) -> None:
    """Of low rank the products of two norms, by which pairs are passed over, are all but the terms."""
    generator = torch.Generator().manual_seed(rank)
    for trial in range(60):
        n = 4 + trial % 4
        factor = torch.randn(rank, n, generator=generator, dtype=torch.float64)
        gram = factor.T @ factor
        linear = 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        pruned = torch.zeros(n, dtype=torch.bool)
        pruned[torch.randperm(n, generator=generator)[: n // 2]] = True

        def value(y: Tensor, gram: Tensor = gram, linear: Tensor = linear) -> float:
            z = y.double()
            return float(0.5 * z @ gram @ z - linear @ z)

        least = math.inf
        for out in pruned.nonzero()[:, 0].tolist():
            for into in (~pruned).nonzero()[:, 0].tolist():
                other = pruned.clone()
                other[out], other[into] = False, True
                least = min(least, value(other))
        for engine in ENGINES:
            product = gram @ pruned.double()
            v, after, counts = run(engine, gram[None], product[None], linear[None], pruned[None], 1)
            assert int(after.sum()) == int(pruned.sum())
            if least < value(pruned) - 1e-9:
                assert int(counts.swaps) == 1
                assert value(after[0]) == pytest.approx(least, abs=1e-12)
                torch.testing.assert_close(v[0], gram @ after[0].double())
            else:
                assert after[0].equal(pruned)
                assert bool(counts.locally_optimal)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("everything", [False, True])
def test_without_a_pair_nothing_is_swapped(engine, everything: bool) -> None:  # type: ignore[no-untyped-def]
    gram, _, linear, _ = batch_of(("flat",), 5, 2)
    pruned = torch.full((1, 5), everything)
    product = (gram @ pruned.double()[:, :, None])[:, :, 0]
    v, after, counts = run(engine, gram, product, linear, pruned, 3)
    assert after.equal(pruned)
    assert v.equal(product)
    assert int(counts.swaps) == 0
    assert bool(counts.locally_optimal)


def test_no_pair_is_said_by_both_numbers() -> None:
    """Where nothing can leave, nothing can enter, or no pair lowers the value by what is asked for."""
    identity, zeros = np.eye(4), np.zeros(4)
    for y, threshold in (
        (np.zeros(4, dtype=bool), 0.0),
        (np.ones(4, dtype=bool), 0.0),
        (np.arange(4) < 2, -1e-9),
    ):
        state = identity @ y
        places = np.zeros(4, dtype=np.int64)
        arrays = (zeros.copy(), places, places.copy())
        found = dense_swaps._best_pair(identity, state, zeros, y, np.ones(4), *arrays, threshold)
        assert tuple(found) == (-1, -1)


def test_the_torch_path_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def counted(*given: Tensor) -> SwapCounts:
        taken.append(None)
        return engine(*given)

    engine = dense_swaps._swap_torch
    monkeypatch.setattr(dense_swaps, "_swap_torch", counted)
    gram, product, linear, pruned = batch_of(("flat",), 6, 3)
    for compiled, calls in ((True, 0), (False, 1)):
        swap_dense(
            gram,
            product.clone(),
            linear,
            pruned.clone(),
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, dtype=torch.int64),
            compiled=compiled,
        )
        assert len(taken) == calls


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chosen", [[0, 1], [2, 3]])
def test_of_equal_pairs_the_first_is_swapped_and_only_for_more_than_was_asked(
    engine, chosen: list[int]
) -> None:  # type: ignore[no-untyped-def]
    gram = torch.eye(4, dtype=torch.float64)[None]
    pruned = torch.tensor([i in chosen for i in range(4)])[None]
    # Every pair lowers the value by 1.
    linear = torch.where(pruned, 1.0, 2.0).double()
    others = [i for i in range(4) if i not in chosen]
    for tolerance, swaps in ((1.0, 0), (0.999, 1)):
        y, v = pruned.clone(), gram[0] @ pruned.double()[0]
        tolerances, budget = torch.tensor([tolerance], dtype=torch.float64), torch.tensor([1])
        counts = engine(gram, v[None].clone(), linear, y, tolerances, budget)
        assert counts.swaps.tolist() == [swaps]
        left = sorted([chosen[1], others[0]]) if swaps else chosen
        assert y[0].nonzero()[:, 0].tolist() == left
