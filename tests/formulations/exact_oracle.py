"""Small blocks of every regime, and their optima in exact rational arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import lru_cache

import numpy as np

from formulations import BlockProblem
from formulations.loss import objective

SCALE_DECADES = 12
CANDIDATES = 3
"""Best sets, as float64 ranks them, whose values are recomputed exactly."""


def any_block(seed: int, *, damped: bool = False) -> BlockProblem:
    """A block of 3 to 10 weights drawn from all regimes of size, rank, damping, scale and degeneracy.

    `damped` asks for rows and positive damping, which the matrix-free path needs.
    """
    rng = np.random.default_rng([seed, 2])
    n = int(rng.integers(3, 11))
    m = int(rng.integers(1, n)) if rng.random() < 0.5 else int(rng.integers(n, 4 * n + 1))
    rank = int(rng.integers(1, min(m, n) + 1))
    rows = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) / np.sqrt(m * rank)
    weights = rng.normal(size=n) * 10.0 ** rng.uniform(-3.0, 1.0)
    spread = rng.choice([0.0, 2.0, SCALE_DECADES / 2])
    columns = 10.0 ** rng.uniform(-spread, spread, n)
    # Badly scaled parameters: a weight and its column of R scale against each other, or freely.
    rows *= columns
    weights = weights / columns if rng.random() < 0.5 else weights * 10.0 ** rng.uniform(-spread, spread, n)
    if rng.random() < 0.2:
        half = n // 2
        rows[:, half : 2 * half], weights[half : 2 * half] = rows[:, :half], weights[:half]
    if rng.random() < 0.2:
        rows[:, rng.random(n) < 0.3] = 0.0
    if rng.random() < 0.2:
        weights[rng.random(n) < 0.3] = 0.0
    unit = 10.0 ** rng.uniform(-SCALE_DECADES / 2, SCALE_DECADES / 2)
    rows *= unit
    mean = float((rows**2).sum()) / n or 1.0
    damping = mean * 10.0 ** rng.uniform(-8.0, 3.0)
    gradient = None
    if rng.random() < 0.5:
        size = np.sqrt((rows**2).sum(axis=0) + damping)
        gradient = rng.normal(size=n) * size * np.abs(weights * size).max() * 10.0 ** rng.uniform(-3.0, 1.0)
    n_prune = int(rng.integers(1, n))
    if not damped and m >= n and rank == n and rng.random() < 0.3:
        damping = 0.0
    if not damped and rng.random() < 0.4:
        return BlockProblem(
            weights=weights,
            hessian=_symmetric(rows.T @ rows),
            damping=damping,
            gradient=gradient,
            n_prune=n_prune,
        )
    return BlockProblem(weights=weights, rows=rows, damping=damping, gradient=gradient, n_prune=n_prune)


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return 0.5 * (matrix + matrix.T)


@lru_cache(maxsize=16)
def exact_optimum(problem: BlockProblem, program: str) -> Fraction:
    """The least exact value among the best sets by float64: no lower than the optimum.

    Kept for the blocks that were asked about last: every bound on a block is compared with it.
    """
    values = []
    for pruned in itertools.combinations(range(problem.n), problem.n_prune):
        keep = np.ones(problem.n, dtype=np.bool_)
        keep[list(pruned)] = False
        values.append((objective(problem, keep, program), pruned))
    values.sort()
    model = exact_model(problem)
    return min(model.value(pruned, program) for _, pruned in values[:CANDIDATES])


@lru_cache(maxsize=16)
def exact_model(problem: BlockProblem) -> ExactModel:
    """The model of a block, made once for all that is asked about it."""
    return ExactModel(problem)


class ExactModel:
    """A block's data as fractions: every float64 is one."""

    def __init__(self, problem: BlockProblem) -> None:
        self.n = problem.n
        self.weights = [Fraction(x) for x in problem.weights.tolist()]
        self.gradient = [Fraction(x) for x in problem.gradient_or_zero.tolist()]
        if problem.rows is not None:
            rows = [[Fraction(x) for x in row] for row in problem.rows.tolist()]
            below = [
                [sum((row[i] * row[j] for row in rows), Fraction(0)) for j in range(i + 1)]
                for i in range(self.n)
            ]
            self.hessian = [[below[max(i, j)][min(i, j)] for j in range(self.n)] for i in range(self.n)]
        else:
            self.hessian = [[Fraction(x) for x in row] for row in problem.hessian.tolist()]
        for i in range(self.n):
            self.hessian[i][i] += Fraction(problem.damping)

    def value(self, pruned: tuple[int, ...], program: str) -> Fraction:
        """Exact value of a pruned set: ``g.d + 1/2 d.H d`` at the best step of the program."""
        step = [Fraction(0)] * self.n
        for i in pruned:
            step[i] = -self.weights[i]
        if program == "joint":
            kept = [i for i in range(self.n) if i not in pruned]
            system = [[self.hessian[i][j] for j in kept] for i in kept]
            right = [-self.gradient[i] - sum(self.hessian[i][j] * step[j] for j in pruned) for i in kept]
            for i, x in zip(kept, _solve(system, right), strict=True):
                step[i] = x
        quadratic = sum(step[i] * self.hessian[i][j] * step[j] for i in range(self.n) for j in range(self.n))
        return quadratic / 2 + sum(g * d for g, d in zip(self.gradient, step, strict=True))


def _solve(system: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """Gaussian elimination on a positive definite system."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(system, right, strict=True)]
    for p in range(size):
        for q in range(p + 1, size):
            factor = rows[q][p] / rows[p][p]
            rows[q] = [x - factor * y for x, y in zip(rows[q], rows[p], strict=True)]
    solution = [Fraction(0)] * size
    for p in reversed(range(size)):
        known = sum((rows[p][q] * solution[q] for q in range(p + 1, size)), Fraction(0))
        solution[p] = (rows[p][size] - known) / rows[p][p]
    return solution
