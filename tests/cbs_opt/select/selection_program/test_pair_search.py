"""The search over all pairs: no improving swap may escape it."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.select.selection_program import pair_search
from cbs_opt.select.selection_program.pair_search import (
    CompiledScan,
    Projection,
    SwapChanges,
    TorchScan,
    improving_pairs,
)
from cbs_opt.select.selection_program.program import SelectionProgram, SwapTuning
from tests.cbs_opt.fisher import data_of, dense_form, fisher_block, random_set, swap_changes

WITH_ROWS = ("flat", "decaying", "duplicates", "zeros", "gradient", "undamped")
SCANS = (CompiledScan, TorchScan)


def exact(block: FisherBlock, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """Costs of single weights, (n,), and the change of all swaps, (n, n), else inf."""
    matrix, linear = dense_form(block)
    slope = matrix @ pruned.double() - linear
    cost = 0.5 * matrix.diagonal() + torch.where(pruned, -slope, slope)
    table = torch.full((block.n, block.n), torch.inf, dtype=torch.float64)
    changes, inside, outside = swap_changes(block, pruned)
    table[inside[:, None], outside[None, :]] = changes
    return cost, table


def changes_of(block: FisherBlock, pruned: Tensor) -> SwapChanges:
    program = SelectionProgram(block)
    return SwapChanges(
        program=program,
        pruned=pruned,
        image=program.image(pruned.double()),
        half_diagonal=0.5 * program.diagonal(),
        linear=program.linear(),
    )


def projection_of(block: FisherBlock, seed: int = 0) -> Projection:
    columns = data_of(block).double() * block.weights.double()
    return pair_search.project(SelectionProgram(block), columns.square().sum(dim=0), seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", WITH_ROWS)
def test_the_change_of_every_swap_is_exact(kind: str, dtype: torch.dtype) -> None:
    block = fisher_block(kind, 60, 20, dtype=dtype)
    pruned = random_set(60, 35)
    _, table = exact(block, pruned)
    out, into = table.isfinite().nonzero().unbind(1)
    found = changes_of(block, pruned).of(out, into)
    torch.testing.assert_close(found, table[out, into], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", WITH_ROWS)
@pytest.mark.parametrize("m", [1, 100])
def test_no_scan_passes_over_an_improving_pair(  # type: ignore[no-untyped-def]
    scan, kind: str, m: int, dtype: torch.dtype
) -> None:
    block = fisher_block(kind, 150, m, dtype=dtype)
    pruned = random_set(150, 70)
    cost, table = exact(block, pruned)
    rows, outside = pruned.nonzero().squeeze(1), (~pruned).nonzero().squeeze(1)
    finite = table[table.isfinite()].sort().values
    for rank in (0, 400):
        threshold = float(0.5 * (finite[rank] + finite[rank + 1]))
        row, into, crowded = scan(projection_of(block), cost, outside)(rows, threshold)
        assert row.equal(row.sort().values)
        assert not bool(pruned[into].any())
        assert not bool(torch.isin(crowded, row).any())
        found = torch.zeros_like(table, dtype=torch.bool)
        found[rows[row], into] = True
        found[rows[crowded]] = True
        assert bool(found[table < threshold - 1e-12].all())


@pytest.mark.parametrize("scan", SCANS)
def test_the_bound_discards_most_pairs_of_a_decaying_spectrum(scan) -> None:  # type: ignore[no-untyped-def]
    block = fisher_block("decaying", 300, 40)
    pruned = random_set(300, 200)
    cost, table = exact(block, pruned)
    rows, outside = pruned.nonzero().squeeze(1), (~pruned).nonzero().squeeze(1)
    threshold = float(table[table.isfinite()].quantile(0.01))
    row, _, crowded = scan(projection_of(block), cost, outside)(rows, threshold)
    assert row.numel() + crowded.numel() * 100 < 0.2 * 200 * 100


@pytest.mark.parametrize("gathered", [0, 4, 150])
@pytest.mark.parametrize("kind", WITH_ROWS)
def test_lists_and_tables_find_the_same_pairs(kind: str, gathered: int) -> None:
    sizes = {"cells": 30 * 20, "gathered": gathered, "scan_rows": 32, "table_rows": 8, "partners": 150}
    block = fisher_block(kind, 150, 30)
    pruned = random_set(150, 70)
    cost, table = exact(block, pruned)
    finite = table[table.isfinite()].sort().values
    rank = 300 + int((finite[300:].diff() > 1e-9).nonzero()[0])  # ties stay on one side
    threshold = float(0.5 * (finite[rank] + finite[rank + 1]))
    for compiled in (True, False):
        pairs = improving_pairs(
            changes_of(block, pruned),
            projection_of(block),
            cost,
            improving=threshold,
            reach=threshold,
            start=17,
            tuning=SwapTuning(**sizes, compiled=compiled),
        )
        assert pairs.complete
        assert pairs.resume == 17
        assert pairs.change.equal(pairs.change.sort().values)
        expected = (table < threshold).nonzero()
        assert {*zip(pairs.out.tolist(), pairs.into.tolist(), strict=True)} == {
            *map(tuple, expected.tolist())
        }


def test_a_sweep_that_has_enough_is_not_called_complete_and_resumes() -> None:
    tuning = SwapTuning(enough=40, most_pairs=25, table_rows=4)
    block = fisher_block("flat", 100, 9)
    pruned = random_set(100, 50)
    cost, table = exact(block, pruned)
    start, seen = 0, 0
    while seen < 50:
        pairs = improving_pairs(
            changes_of(block, pruned),
            projection_of(block),
            cost,
            improving=torch.inf,
            reach=torch.inf,
            start=start,
            tuning=tuning,
        )
        assert not pairs.complete
        assert pairs.out.numel() == 25
        finished = (pairs.resume - start) % 50
        ranked = pruned.nonzero().squeeze(1)[cost[pruned].argsort()].roll(-start)[:finished]
        best = table[ranked].min()
        torch.testing.assert_close(pairs.change[0], best, rtol=1e-9, atol=1e-11)
        start, seen = pairs.resume, seen + finished


@pytest.mark.parametrize("gathered", [0, 150])
def test_the_clock_is_looked_at_within_a_sweep(monkeypatch: pytest.MonkeyPatch, gathered: int) -> None:
    block = fisher_block("flat", 150, 30)
    pruned = random_set(150, 70)
    cost, _ = exact(block, pruned)
    ticks = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    pairs = improving_pairs(
        changes_of(block, pruned),
        projection_of(block),
        cost,
        improving=torch.inf,
        reach=torch.inf,
        deadline=5.0,
        tuning=SwapTuning(cells=30 * 20, gathered=gathered),
    )
    assert not pairs.complete
    assert next(ticks) <= 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_projection_bounds_every_inner_product(dtype: torch.dtype) -> None:
    for seed, kind in enumerate(WITH_ROWS):
        block = fisher_block(kind, 120, 90, dtype=dtype)
        projection = projection_of(block, seed)
        columns = data_of(block).double() * block.weights.double()
        inner = columns.T @ columns
        norms = projection.norm[:, None] * projection.norm[None, :]
        torch.testing.assert_close(projection.norm.square(), inner.diagonal())
        for width, column in ((pair_search.COARSE, 0), (None, 1)):
            leading = projection.coordinates[:, :width].double()
            rest = projection.remainder[:, column]
            bound = leading @ leading.T + rest[:, None] * rest[None, :] + pair_search.SLACK * norms
            assert bool((inner <= bound + 1e-14).all())


def test_a_column_inside_the_directions_still_has_its_remainder() -> None:
    # Column 0 lies in the span but for a ten-thousandth, which is all it shares with column 1.
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(200, 300)
    rows[:64, 2:] = torch.randn(64, 298, generator=generator) * 10.0
    rows[:64, 0], rows[100, 0] = 1.0, 8e-4
    rows[100, 1] = 1.0
    block = FisherBlock(name="", weights=torch.ones(300), hessian=RowsHessian(rows))
    projection = projection_of(block)
    bound = (
        projection.coordinates[0] @ projection.coordinates[1]
        + projection.remainder[0, 1] * projection.remainder[1, 1]
    )
    slack = pair_search.SLACK * projection.norm[0] * projection.norm[1]
    assert float(bound + slack) >= 8e-4
