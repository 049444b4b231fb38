"""Seeded Fisher blocks for the tests of the heuristics, and dense oracles in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.dense import DenseHessian
from cbs_opt.hessian.operators import PlainHessian
from cbs_opt.hessian.rows import RowsHessian

KINDS = ("flat", "decaying", "duplicates", "zeros", "gradient", "undamped", "hessian")


def fisher_block(
    kind: str, n: int, m: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> FisherBlock:
    """A random block of one of `KINDS`."""
    generator = torch.Generator().manual_seed(1000 * KINDS.index(kind) + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, weights = normal(m, n) / m**0.5, normal(n)
    if kind == "decaying":
        rows *= torch.logspace(0, -3, m, dtype=torch.float64)[:, None]
    if kind == "duplicates":
        half = n // 2
        rows[:, half : 2 * half], weights[half : 2 * half] = rows[:, :half], weights[:half]
    if kind == "zeros":
        rows[:, ::3] = 0.0
        weights[::4] = 0.0
    gradient = 0.1 * normal(n) if kind in ("gradient", "hessian", "zeros") else None
    # a share of the identity, so that rounding to single precision leaves it definite
    hessian = rows.T @ rows + 0.1 * torch.eye(n, dtype=torch.float64) if kind == "hessian" else None
    return FisherBlock(
        name=kind,
        weights=weights.to(dtype),
        hessian=RowsHessian(rows.to(dtype))
        if hessian is None
        else DenseHessian((0.5 * (hessian + hessian.T)).to(dtype)),
        gradient=None if gradient is None else gradient.to(dtype),
        damping=0.0 if kind == "undamped" else 0.01,
    )


def data_of(block: FisherBlock) -> Tensor:
    """The rows of a block, or its matrix."""
    hessian = block.hessian.without_channels()
    assert isinstance(hessian, PlainHessian)
    return hessian.data


def with_rows(block: FisherBlock, rows: Tensor, **changes: Any) -> FisherBlock:
    """The block with other rows."""
    return replace(block, hessian=RowsHessian(rows), **changes)


def dense_hessian(block: FisherBlock) -> Tensor:
    """``H`` in float64, (n, n)."""
    data = data_of(block).double()
    hessian = data.T @ data if block.hessian.by_rows else data.clone()
    hessian.diagonal().add_(block.damping)
    return hessian


def dense_form(block: FisherBlock) -> tuple[Tensor, Tensor]:
    """``A = diag(w) H diag(w)``, (n, n), and ``c = g * w``, (n,), in float64."""
    w = block.weights.double()
    linear = torch.zeros_like(w) if block.gradient is None else block.gradient.double() * w
    return w[:, None] * dense_hessian(block) * w[None, :], linear


def dense_objective(block: FisherBlock, pruned: Tensor) -> float:
    """Selection objective by its definition."""
    matrix, linear = dense_form(block)
    y = pruned.double()
    return float(0.5 * (y @ matrix @ y) - linear @ y)


def swap_changes(block: FisherBlock, pruned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Change of the objective for every swap, (k, n - k), and the indices of its rows and columns."""
    matrix, linear = dense_form(block)
    slope = matrix @ pruned.double() - linear
    half = 0.5 * matrix.diagonal()
    inside, outside = pruned.nonzero().squeeze(1), (~pruned).nonzero().squeeze(1)
    table = (half - slope)[inside][:, None] + (half + slope)[outside][None, :]
    return table - matrix[inside][:, outside], inside, outside


def random_set(n: int, n_prune: int, seed: int = 0) -> Tensor:
    """A random pruned set of that size."""
    pruned = torch.zeros(n, dtype=torch.bool)
    pruned[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_prune]] = True
    return pruned
