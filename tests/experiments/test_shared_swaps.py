"""Blocks that share a Hessian make the swaps that they make each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cbs_opt.select.selection_program.dense import swap_dense
from experiments.benchmarks import shared_swaps
from experiments.benchmarks.shared_swaps import swap_shared
from formulations.errors import ShapeError


def made(
    blocks: int, n: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A correlated Hessian, weights, gradients times weights, and sets of the smallest weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n // 2, n, generator=generator, dtype=torch.float64) + 0.5
    hessian = rows.T @ rows / n + 0.01 * torch.eye(n, dtype=torch.float64)
    weights = torch.randn(blocks, n, generator=generator, dtype=torch.float64)
    linear = 0.05 * torch.randn(blocks, n, generator=generator, dtype=torch.float64)
    pruned = torch.zeros(blocks, n, dtype=torch.bool)
    for block in range(blocks):
        count = int(torch.randint(1, n, (), generator=generator))
        pruned[block, weights[block].abs().argsort()[:count]] = True
    return hessian.to(dtype), weights.to(dtype), linear.to(dtype), pruned


def each(
    hessian: Tensor, weights: Tensor, linear: Tensor, pruned: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """The sets and the number of swaps by the compiled engine, which takes one Gram matrix a block."""
    gram = weights[:, :, None] * hessian * weights[:, None, :]
    sets, product = pruned.clone(), torch.einsum("bij,bj->bi", gram, pruned.to(gram))
    found = swap_dense(
        gram,
        product,
        linear,
        sets,
        torch.full((len(sets),), 1e-12, dtype=torch.float64),
        torch.full((len(sets),), budget),
    )
    return sets, found.swaps


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("blocks", "n"), [(1, 2), (7, 5), (9, 40), (12, 90)])
@pytest.mark.parametrize("budget", [1, 3, 10_000])
def test_the_swaps_of_the_compiled_engine(seed: int, blocks: int, n: int, budget: int) -> None:
    hessian, weights, linear, pruned = made(blocks, n, seed)
    expected, swaps = each(hessian, weights, linear, pruned, budget)
    sizes = pruned.sum(1)
    found = swap_shared(hessian, weights, pruned, linear=linear, tolerance=1e-12, max_swaps=budget)
    assert pruned.equal(expected)
    assert found.swaps.equal(swaps)
    assert pruned.sum(1).equal(sizes)
    assert bool(found.locally_optimal.all()) or budget < 10_000


def test_tables_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, weights, linear, pruned = made(20, 60, 5)
    other = pruned.clone()
    swap_shared(hessian, weights, pruned, linear=linear, tolerance=1e-12)
    monkeypatch.setattr(shared_swaps, "TABLE_NUMBERS", 50)
    swap_shared(hessian, weights, other, linear=linear, tolerance=1e-12)
    assert pruned.equal(other)


def test_ends_at_a_one_swap_optimum_in_single_precision() -> None:
    hessian, weights, _, pruned = made(12, 80, 3, torch.float32)
    found = swap_shared(hessian, weights, pruned, tolerance=1e-4)
    assert bool(found.locally_optimal.all())
    gram = (weights[:, :, None] * hessian * weights[:, None, :]).double()
    product = torch.einsum("bij,bj->bi", gram, pruned.double())
    half = 0.5 * gram.diagonal(dim1=1, dim2=2)
    out = (half - product).masked_fill(~pruned, torch.inf)
    into = (half + product).masked_fill(pruned, torch.inf)
    assert float((out[:, :, None] + into[:, None, :] - gram).min()) > -1.1e-4


@pytest.mark.parametrize("n_prune", [0, 6])
def test_nothing_to_swap(n_prune: int) -> None:
    hessian, weights, _, pruned = made(3, 6, 0)
    pruned[:] = n_prune > 0
    found = swap_shared(hessian, weights, pruned)
    assert bool(found.locally_optimal.all())
    assert int(found.swaps.sum()) == 0


def test_shapes_must_fit() -> None:
    hessian, weights, _, pruned = made(3, 6, 0)
    with pytest.raises(ShapeError, match="hessian"):
        swap_shared(hessian[:4], weights, pruned)
    with pytest.raises(ShapeError, match="pruned"):
        swap_shared(hessian, weights, pruned[:2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_the_same_swaps_on_a_gpu() -> None:
    hessian, weights, linear, pruned = made(30, 200, 1)
    there = pruned.cuda()
    swap_shared(hessian.cuda(), weights.cuda(), there, linear=linear.cuda(), tolerance=1e-12)
    swap_shared(hessian, weights, pruned, linear=linear, tolerance=1e-12)
    assert pruned.equal(there.cpu())
