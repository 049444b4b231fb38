"""Swap search: never worse, exact counts, and what it calls a 1-swap optimum is one."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.select.choice import SearchResult
from cbs_opt.select.saliency import magnitude, without_lowest
from cbs_opt.select.selection_program.program import SelectionProgram, SwapTuning
from cbs_opt.select.selection_program.swap_search import relative_tolerance, swap_search, swap_search_batch
from formulations.enumeration import enumerate_optimum
from formulations.solution import Limit
from tests.cbs_opt.fisher import (
    KINDS,
    data_of,
    dense_form,
    dense_objective,
    fisher_block,
    random_set,
    swap_changes,
)

SMALL = SwapTuning(
    dense_limit=20,
    pool=24,
    swaps_a_look=5,
    gathered=2,
    scan_rows=16,
    table_rows=4,
    partners=2,
    most_pairs=64,
    enough=20,
)
"""The path of large blocks, on small ones."""


def check(block: FisherBlock, start: Tensor, result: SearchResult) -> None:
    """Everything a result promises, against the dense matrix."""
    assert int(result.keep.sum()) == int(start.sum())
    assert result.value <= result.initial_value
    scale = float(dense_form(block)[0].diagonal().sum())
    assert result.initial_value == pytest.approx(dense_objective(block, ~start), rel=1e-9, abs=1e-13 * scale)
    assert result.value == pytest.approx(dense_objective(block, ~result.keep), rel=1e-9, abs=1e-13 * scale)
    assert result.locally_optimal == (result.limit is None)
    if result.locally_optimal and 0 < int(start.sum()) < block.n:
        tolerance = relative_tolerance(SelectionProgram(block), None) * abs(result.value)
        best = float(swap_changes(block, ~result.keep)[0].min())
        assert best >= -1.01 * tolerance - 1e-13 * scale
    if not result.swaps:
        assert result.keep.equal(start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_prune", [0, 1, 40, 79, 80])
def test_dense_blocks_end_at_a_swap_optimum(kind: str, n_prune: int, dtype: torch.dtype) -> None:
    block = fisher_block(kind, 80, 12, dtype=dtype)
    start = without_lowest(magnitude(block), n_prune)
    result = swap_search(SelectionProgram(block), start)
    assert result.locally_optimal
    check(block, start, result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_prune", "m"), [(0, 30), (1, 30), (60, 1), (60, 30), (200, 30)])
def test_large_blocks_end_at_a_swap_optimum(kind: str, n_prune: int, m: int, dtype: torch.dtype) -> None:
    block = fisher_block(kind, 200, m, dtype=dtype)
    start = without_lowest(magnitude(block), n_prune)
    result = swap_search(SelectionProgram(block), start, deadline=time.monotonic() + 30.0, tuning=SMALL)
    assert result.locally_optimal
    check(block, start, result)


@pytest.mark.parametrize("kind", ["decaying", "flat"])
def test_a_block_above_the_dense_limit(kind: str) -> None:
    block = fisher_block(kind, 2500, 24, dtype=torch.float32)
    start = without_lowest(magnitude(block), 2000)
    result = swap_search(SelectionProgram(block), start)
    assert result.locally_optimal
    assert result.swaps > 0
    check(block, start, result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("m", [1, 2, 30])
@pytest.mark.parametrize("seed", range(3))
def test_what_cancels_neither_loops_nor_fools(m: int, seed: int, dtype: torch.dtype) -> None:
    # Pairs of opposite columns: the start removes nearly all of the loss, down to rounding.
    block = fisher_block("undamped", 200, m, seed=seed, dtype=dtype)
    rows = data_of(block)
    rows[:, 100:] = rows[:, :100]
    block.weights[100:] = -block.weights[:100]
    for start in (without_lowest(magnitude(block), 100), ~random_set(200, 100, seed)):
        result = swap_search(SelectionProgram(block), start, deadline=time.monotonic() + 30.0, tuning=SMALL)
        assert result.locally_optimal
        check(block, start, result)


def test_terms_that_cancel_with_the_gradient_do_not_loop() -> None:
    # n equal weights whose quadratic and linear terms cancel: every change is rounding.
    for scale in (1.0, 1.1, 3.3, 0.7):
        n, k = 300, 150
        block = FisherBlock(
            name="",
            weights=torch.ones(n, dtype=torch.float64),
            hessian=RowsHessian(torch.full((1, n), scale, dtype=torch.float64)),
            gradient=torch.full((n,), 0.5 * k * scale**2, dtype=torch.float64),
        )
        start = ~random_set(n, k)
        result = swap_search(SelectionProgram(block), start, max_swaps=10_000)
        assert result.locally_optimal
        assert result.swaps < 100


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_engines_reach_an_optimum_too(kind: str) -> None:
    tuning = replace(SMALL, compiled=False)
    for n in (20, 120):
        block = fisher_block(kind, n, 10)
        start = ~random_set(n, n // 2)
        result = swap_search(SelectionProgram(block), start, tuning=tuning)
        assert result.locally_optimal
        check(block, start, result)


@pytest.mark.parametrize("n", [20, 120])
@pytest.mark.parametrize("max_swaps", [0, 1, 7])
def test_a_limit_on_swaps_is_kept_and_told(n: int, max_swaps: int) -> None:
    block = fisher_block("flat", n, 10)
    start = ~random_set(n, n // 2)
    result = swap_search(SelectionProgram(block), start, max_swaps=max_swaps, tuning=SMALL)
    assert result.swaps <= max_swaps
    assert result.limit in (Limit.ITERATION, None)
    assert result.limit is Limit.ITERATION or max_swaps > 1
    check(block, start, result)


@pytest.mark.parametrize("n", [20, 120])
def test_a_deadline_in_the_past_leaves_the_start(n: int) -> None:
    block = fisher_block("flat", n, 10)
    start = ~random_set(n, n // 2)
    result = swap_search(SelectionProgram(block), start, deadline=time.monotonic() - 1.0, tuning=SMALL)
    assert result.limit is Limit.TIME
    assert not result.locally_optimal
    assert result.keep.equal(start)
    assert result.value == result.initial_value


@pytest.mark.parametrize("max_swaps", [None, 0, 2, 5])
def test_a_batch_gives_what_single_calls_give(max_swaps: int | None) -> None:
    sizes = [(kind, n) for kind, n in itertools.product(KINDS, (12, 20, 60)) if kind != "duplicates"]
    blocks = [fisher_block(kind, n, 8) for kind, n in sizes]
    programs = [SelectionProgram(block) for block in blocks]
    starts = [~random_set(block.n, block.n // 3, seed) for seed, block in enumerate(blocks)]
    together = swap_search_batch(programs, starts, max_swaps=max_swaps, tuning=SMALL)
    for block, program, start, joint in zip(blocks, programs, starts, together, strict=True):
        alone = swap_search(program, start, max_swaps=max_swaps, tuning=SMALL)
        assert joint.keep.equal(alone.keep)
        assert (joint.swaps, joint.locally_optimal, joint.limit) == (
            alone.swaps,
            alone.locally_optimal,
            alone.limit,
        )
        check(block, start, joint)


def test_batches_are_cut_to_the_memory_allowed() -> None:
    blocks = [fisher_block("flat", 10, 8, seed=seed) for seed in range(7)]
    programs = [SelectionProgram(block) for block in blocks]
    starts = [~random_set(10, 4, seed) for seed in range(7)]
    whole = swap_search_batch(programs, starts)
    cut = swap_search_batch(programs, starts, tuning=SwapTuning(batch_bytes=2 * 8 * 10**2))
    assert [r.value for r in cut] == [r.value for r in whole]
    assert swap_search_batch([], []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_many_starts_find_the_enumerated_optimum(kind: str) -> None:
    hits = 0
    for seed in range(6):
        block = fisher_block(kind, 14, 6, seed=seed)
        optimum = enumerate_optimum(block.to_problem(6), "selection").objective
        assert optimum is not None
        starts = [~random_set(14, 6, draw) for draw in range(30)]
        results = swap_search_batch([SelectionProgram(block)] * 30, starts)
        values = [result.value for result in results]
        assert min(values) >= optimum - 1e-9 * max(1.0, abs(optimum))
        hits += min(values) <= optimum + 1e-9 * max(1.0, abs(optimum))
    assert hits >= 5


def test_a_seed_repeats_and_inputs_are_left_alone() -> None:
    block = fisher_block("flat", 120, 30)
    start = ~random_set(120, 60)
    before = start.clone(), block.weights.clone()
    results = [swap_search(SelectionProgram(block), start, seed=3, tuning=SMALL) for _ in range(2)]
    assert results[0].keep.equal(results[1].keep)
    assert results[0].value == results[1].value
    assert start.equal(before[0])
    assert block.weights.equal(before[1])


def test_a_loose_tolerance_stops_early() -> None:
    block = fisher_block("flat", 120, 30)
    start = ~random_set(120, 60)
    loose = swap_search(SelectionProgram(block), start, tolerance=0.05, tuning=SMALL)
    tight = swap_search(SelectionProgram(block), start, tuning=SMALL)
    assert loose.locally_optimal
    assert tight.value < loose.value < loose.initial_value
    assert float(swap_changes(block, ~loose.keep)[0].min()) >= -0.0501 * loose.value


@pytest.mark.parametrize("kind", ["flat", "decaying"])
def test_a_deadline_at_any_moment_is_kept_and_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = fisher_block(kind, 160, 30)
    start = ~random_set(160, 80)
    ends = []
    for looks in (2, 4, 8, 16, 32, 10_000):
        ticks = itertools.count()
        monkeypatch.setattr(time, "monotonic", lambda ticks=ticks: float(next(ticks)))
        result = swap_search(SelectionProgram(block), start, deadline=float(looks), tuning=SMALL)
        check(block, start, result)
        assert result.seconds <= looks + 4  # few looks at the clock after the one that was too late
        ends.append((result.value, result.limit))
    assert ends == sorted(ends, key=lambda end: -end[0])
    assert [limit for _, limit in ends[:2]] == [Limit.TIME] * 2
    assert ends[-1][1] is None
