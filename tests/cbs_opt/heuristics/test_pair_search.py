"""The search over all pairs: no improving swap may escape it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cbs_opt.blocks import FisherBlock
from cbs_opt.heuristics import pair_search
from cbs_opt.heuristics.pair_search import improving_pairs, project
from cbs_opt.heuristics.selection_program import SelectionProgram
from tests.cbs_opt.heuristics.fisher import dense_form, fisher_block, random_set, swap_changes

WITH_ROWS = ("flat", "decaying", "duplicates", "zeros", "gradient", "undamped")
ENGINES = (pair_search._candidates_compiled, pair_search._candidates_torch)


def exact(block: FisherBlock, pruned: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor], Tensor]:
    """Costs of single weights, the change of given swaps, and the change of all, (n, n), else inf."""
    matrix, linear = dense_form(block)
    slope = matrix @ pruned.double() - linear
    cost = 0.5 * matrix.diagonal() + torch.where(pruned, -slope, slope)
    table = torch.full((block.n, block.n), torch.inf, dtype=torch.float64)
    changes, inside, outside = swap_changes(block, pruned)
    table[inside[:, None], outside[None, :]] = changes
    return cost, lambda out, into: table[out, into], table


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", WITH_ROWS)
@pytest.mark.parametrize("m", [1, 100])
def test_every_improving_pair_is_a_candidate(engine, kind: str, m: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    block = fisher_block(kind, 150, m, dtype=dtype)
    pruned = random_set(150, 70)
    cost, _, table = exact(block, pruned)
    projection = project(SelectionProgram.of(block), seed=0)
    finite = table[table.isfinite()].sort().values
    for rank in (0, 400):
        threshold = float(0.5 * (finite[rank] + finite[rank + 1]))
        out, into, complete = engine(projection, cost, pruned, threshold, 150 * 150, 150)
        assert complete
        found = torch.zeros_like(table, dtype=torch.bool)
        found[out, into] = True
        assert bool(found[table < threshold - 1e-12].all())
        assert bool(pruned[out].all())
        assert not bool(pruned[into].any())


@pytest.mark.parametrize("directions", [(1, 2), (16, 64)])
def test_the_bound_discards_pairs_and_both_engines_return_the_same(
    monkeypatch: pytest.MonkeyPatch, directions: tuple[int, int]
) -> None:
    for engine in ENGINES:
        monkeypatch.setattr(pair_search, "_candidates_compiled", engine)
        block = fisher_block("decaying", 300, 40)
        pruned = random_set(300, 200)
        cost, change, table = exact(block, pruned)
        threshold = float(table[table.isfinite()].quantile(0.01))
        projection = project(SelectionProgram.of(block), seed=0)
        out, into, values, complete = improving_pairs(change, projection, cost, pruned, threshold, 10**5, 300)
        assert complete
        assert values.equal(values.sort().values)
        expected = (table < threshold).nonzero()
        assert {*zip(out.tolist(), into.tolist(), strict=True)} == {*map(tuple, expected.tolist())}
        candidates, _, _ = engine(projection, cost, pruned, threshold, 10**5, 300)
        assert candidates.numel() < 0.2 * 200 * 100


@pytest.mark.parametrize("engine", ENGINES)
def test_too_many_pairs_are_not_called_all(engine) -> None:  # type: ignore[no-untyped-def]
    block = fisher_block("flat", 100, 9)
    pruned = random_set(100, 50)
    cost, _, _ = exact(block, pruned)
    projection = project(SelectionProgram.of(block), seed=0)
    out, into, complete = engine(projection, cost, pruned, torch.inf, 40, 100)
    assert not complete
    assert out.numel() == into.numel() == 40
    assert engine(projection, cost, pruned, torch.inf, 2500, 50)[0].numel() == 2500
    assert pair_search._candidates_compiled(projection, cost, pruned, torch.inf, 2500, 7)[2] is False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_projection_bounds_every_inner_product(dtype: torch.dtype) -> None:
    for seed, kind in enumerate(WITH_ROWS):
        block = fisher_block(kind, 120, 90, dtype=dtype)
        projection = project(SelectionProgram.of(block), seed)
        assert block.rows is not None
        columns = block.rows.double() * block.weights.double()
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
    block = FisherBlock(name="", start=0, stop=300, weights=torch.ones(300), rows=rows)
    projection = project(SelectionProgram.of(block), seed=0)
    bound = (
        projection.coordinates[0] @ projection.coordinates[1]
        + projection.remainder[0, 1] * projection.remainder[1, 1]
    )
    slack = pair_search.SLACK * projection.norm[0] * projection.norm[1]
    assert float(bound + slack) >= 8e-4
