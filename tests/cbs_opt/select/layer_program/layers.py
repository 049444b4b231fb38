"""Small layers for tests: weights, a Gram matrix of correlated inputs, and supports by enumeration."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cbs_opt.select.layer_program.program import LayerHessian, LayerProgram
from cbs_opt.select.layer_program.support import support_of


def gram(inputs: int, *, tokens: int = 200, seed: int = 0) -> Tensor:
    """The second moment of inputs of different sizes that go together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ (mixing / inputs**0.5)
    x = x * torch.linspace(0.3, 3.0, inputs, dtype=torch.float64) + 0.5
    return x.T @ x / tokens


def layer_program(
    rows: int,
    inputs: int,
    sparsity: float | str = 0.5,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    damping: float = 0.01,
    budget: str = "rows",
) -> LayerProgram:
    """A layer of Gaussian weights."""
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(rows, inputs, generator=generator, dtype=torch.float64).to(dtype)
    hessian = LayerHessian(gram(inputs, seed=seed), damping)
    return LayerProgram(
        weights=weights, hessian=hessian, support=support_of(sparsity, (rows, inputs), budget)
    )


def every_set(inputs: int, sparsity: float | str) -> list[tuple[int, ...]]:
    """The kept inputs of every set that a row may have."""
    if isinstance(sparsity, str):
        n, m = map(int, sparsity.split(":"))
        groups = [itertools.combinations(range(first, first + m), n) for first in range(0, inputs, m)]
        return [tuple(itertools.chain(*parts)) for parts in itertools.product(*groups)]
    return list(itertools.combinations(range(inputs), inputs - round(sparsity * inputs)))


def masks(sets: list[tuple[int, ...]], inputs: int) -> Tensor:
    """Sets as kept masks, (sets, inputs) bool."""
    keep = torch.zeros(len(sets), inputs, dtype=torch.bool)
    for row, kept in enumerate(sets):
        keep[row, list(kept)] = True
    return keep
