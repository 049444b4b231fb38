"""Supports against all sets that there are."""

from __future__ import annotations

import pytest
import torch

from cbs_opt.select.layer_program.support import (
    LayerCount,
    LayerSupport,
    RowCounts,
    RowPattern,
    support_of,
)
from formulations.errors import ArgumentError, ShapeError
from formulations.support import NofM
from tests.cbs_opt.select.layer_program.layers import every_set, masks


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, "1:4", "2:4", "3:4", "2:2", "4:8"])
def test_the_best_set_has_the_largest_sum_of_all(sparsity: float | str) -> None:
    scores = torch.rand(7, 8, generator=torch.Generator().manual_seed(0))
    sets = masks(every_set(8, sparsity), 8)
    keep = support_of(sparsity, (7, 8)).best(scores)
    sums = scores @ sets.T.to(scores.dtype)
    assert torch.allclose((scores * keep).sum(1), sums.max(1).values)
    assert all(any(torch.equal(row, one) for one in sets) for row in keep)


def test_every_row_may_have_a_count_of_its_own() -> None:
    scores = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    support = RowCounts(torch.tensor([0, 3, 9, 5]))
    keep = support.best(scores)
    assert keep.sum(1).tolist() == [0, 3, 9, 5]
    assert torch.equal(keep[3], RowCounts(5).best(scores)[3])
    assert support.take(torch.tensor([3, 1])).best(scores[[3, 1]]).sum(1).tolist() == [5, 3]


def test_a_count_of_the_layer_is_the_best_of_all_rows_together() -> None:
    scores = torch.rand(6, 10, generator=torch.Generator().manual_seed(3)) * torch.arange(1.0, 7.0).view(6, 1)
    support = support_of(0.7, (6, 10), "layer")
    keep = support.best(scores)
    assert support.total(6, 10) == int(keep.sum()) == 18
    assert float(scores[keep].min()) >= float(scores[~keep].max())
    settled = support.settled(keep)
    assert settled.counts(6, 10).tolist() == keep.sum(1).tolist()
    assert len(set(keep.sum(1).tolist())) > 1
    with pytest.raises(ArgumentError, match="budget"):
        support_of("2:4", (6, 8), "layer")
    with pytest.raises(ArgumentError, match="keep 0 to 4"):
        LayerCount(5).best(torch.ones(2, 2))


def test_equal_scores_still_give_the_exact_count() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0]])
    assert RowCounts(2).best(scores).sum(1).tolist() == [2, 2]
    assert RowPattern(NofM(1, 2)).best(scores).view(2, 2, 2).sum(-1).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("support", [RowCounts(6), RowPattern(NofM(2, 4)), RowPattern(NofM(1, 2))])
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_exchanges_stay_inside_the_support_and_pay(support: LayerSupport, limit: int) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(30, 12, generator=generator)
    keep = support.best(torch.rand(30, 12, generator=generator))
    costs, gains = torch.where(keep, scores, torch.inf), torch.where(keep, -torch.inf, scores)
    row, leaving, entering = support.exchanges(costs, gains, torch.full((30,), limit))
    assert len(row)
    assert int(row.bincount().max()) <= limit
    assert bool(keep[row, leaving].all())
    assert not bool(keep[row, entering].any())
    assert bool((scores[row, entering] > scores[row, leaving]).all())
    moved = keep.clone()
    moved[row, leaving] = False
    moved[row, entering] = True
    size = support.group(12)
    assert torch.equal(moved.view(30, -1, size).sum(-1), keep.view(30, -1, size).sum(-1))
    if isinstance(support, RowCounts) and limit == 100:
        assert torch.equal(moved, support.best(scores))


def test_droppable_is_what_a_group_has_too_many_of() -> None:
    keep = torch.tensor([[True, True, True, False, True, True, False, False]])
    assert RowPattern(NofM(2, 4)).droppable(keep).tolist() == [[True, True, True] + [False] * 5]
    assert torch.equal(RowCounts(4).droppable(keep), keep)
    assert not bool(RowCounts(5).droppable(keep).any())


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), "4:2", "0:4", "2-4", True, None])
def test_a_sparsity_that_is_none_is_refused_by_name(sparsity: object) -> None:
    with pytest.raises(ArgumentError, match="sparsity"):
        support_of(sparsity, (7, 8))  # type: ignore[arg-type]


def test_inputs_that_m_does_not_divide_are_refused_by_name() -> None:
    with pytest.raises(ShapeError, match="10 inputs, which 4 does not divide"):
        support_of("2:4", (2, 10))
    with pytest.raises(ArgumentError, match="n_keep"):
        RowCounts(11).best(torch.ones(2, 10))


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, "1:4", "2:4", "4:8"])
def test_each_row_has_the_support_of_formulations(sparsity: float | str) -> None:
    scores = torch.rand(7, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    support = support_of(sparsity, (7, 8))
    for row, keep in zip(scores, support.best(scores), strict=True):
        own = support.of_row(int(keep.sum()))
        assert own.contains(keep.numpy())
        assert own.best(row.numpy()).tolist() == keep.tolist()
