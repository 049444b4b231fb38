"""Small blocks for the tests: random, real, degenerate; and a brute-force oracle in plain numpy."""

from __future__ import annotations

import itertools

import numpy as np

from formulations import BlockProblem, BlockSolution, Limit, Termination, objective
from formulations.dense_forms import dense_form

KINDS = ("random", "gradient", "hessian", "duplicates", "zeros", "wide", "real")


def block(kind: str, n: int, n_prune: int, seed: int) -> BlockProblem:
    """A seeded block of one of `KINDS`."""
    generator = np.random.default_rng([seed, n, KINDS.index(kind)])
    height = max(2, n // 3) if kind == "wide" else 3 * n
    rows = generator.normal(size=(height, n)) @ (np.eye(n) + 0.4 * generator.normal(size=(n, n)))
    rows *= np.exp(0.5 * generator.normal(size=n)) / np.sqrt(height)
    weights = generator.normal(size=n)
    gradient = generator.normal(size=n) * 0.3 if kind in ("gradient", "zeros") else None
    if kind == "real":
        from sklearn.datasets import load_digits

        images = load_digits().data
        columns = generator.choice(np.flatnonzero(images.std(axis=0) > 0.1), n, replace=False)
        rows = images[:300, columns] / 16.0 / np.sqrt(300.0)
    if kind == "duplicates":
        rows[:, n // 2 :] = rows[:, : n - n // 2]
        weights[n // 2 :] = weights[: n - n // 2]
    if kind == "zeros":
        rows[:, generator.random(n) < 0.3] = 0.0
        rows[:2] = 0.0
        weights[generator.random(n) < 0.3] = 0.0
    damping = float(10.0 ** generator.uniform(-5.0, 0.0))
    if kind == "hessian":
        return BlockProblem(
            weights=weights, hessian=rows.T @ rows, damping=damping, n_prune=n_prune, gradient=gradient
        )
    return BlockProblem(weights=weights, rows=rows, damping=damping, n_prune=n_prune, gradient=gradient)


def brute_force(problem: BlockProblem, program: str) -> float:
    """Optimum by evaluating every set with `formulations.loss`."""
    best = np.inf
    for pruned in itertools.combinations(range(problem.n), problem.n_prune):
        keep = np.ones(problem.n, dtype=np.bool_)
        keep[list(pruned)] = False
        best = min(best, objective(problem, keep, program))
    return float(best)


def closed(problem: BlockProblem, solution: BlockSolution, tolerance: float = 0.0) -> bool:
    """Whether a solution is proved, or its method complete and no gap left but rounding and `tolerance`."""
    if solution.termination is Termination.OPTIMAL:
        return solution.limit is None and solution.gap <= solution.rel_gap
    form = dense_form(problem, solution.program)
    # Three allowances, and what the nodes lose to rounding of their own.
    allowance = 4.0 * form.scale * form.rounding.allowance(solution.objective / form.scale)
    left = solution.objective - solution.bound
    return solution.limit is Limit.GAP and left <= 1.001 * allowance + tolerance * abs(solution.objective)


def slack(problem: BlockProblem) -> float:
    """What two float64 evaluations of one objective may differ by."""
    scale = abs(problem.constant_term()) + float(np.abs(problem.gradient_or_zero) @ np.abs(problem.weights))
    return 1e-9 * scale
