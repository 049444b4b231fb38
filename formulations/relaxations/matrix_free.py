"""Both relaxations on gradient rows without forming ``H``: blocks of 10^3 to 10^6 weights.

The damping is the split. Over-relaxed ADMM needs one solve with ``R R^T + const I`` (m x m, by Woodbury)
and two products with ``R`` a step; every step proves a bound.
"""

from __future__ import annotations

import math
import time

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from formulations.dense_forms import error_factor
from formulations.problem import BlockProblem, FloatArray
from formulations.relaxations.capped_simplex_kernels import (
    METRIC_FLOOR,
    METRIC_SHARE,
    project_capped_simplex,
    smallest_sum,
)
from formulations.relaxations.perspective_kernels import OVER_RELAXATION
from formulations.relaxations.support_norm import largest_sum, prox_support_norm
from formulations.solution import Limits

MAX_STEPS = 300
CHECK_PERIOD = 10
"""Steps between two looks at the progress."""
LEAST_PROGRESS = 1e-6
"""Relative gain of the bound in one period below which ADMM stops."""
BALANCE_UNTIL = 100
"""Steps after which the penalty no longer follows the residuals, so that ADMM converges."""


class StopRule:
    """Decides when a run of ADMM has brought what it can."""

    def __init__(self, limits: Limits, started: float, cutoff: float) -> None:
        self.limits = limits
        self.started = started
        self.cutoff = cutoff
        self.most = MAX_STEPS if limits.iteration_limit is None else limits.iteration_limit
        self.checked = -math.inf

    def reached(self, step: int, bound: float) -> bool:
        """Whether to stop after `step` steps with `bound`."""
        spent = time.perf_counter() - self.started
        if self.limits.time_limit is not None and spent >= self.limits.time_limit:
            return True
        if step >= self.most or bound >= self.cutoff:
            return True
        if step % CHECK_PERIOD:
            return False
        slow = bound - self.checked < LEAST_PROGRESS * abs(bound)
        self.checked = bound
        return slow and bound > 0.0


def relax_joint_rows(
    problem: BlockProblem, limits: Limits, started: float, cutoff: float
) -> tuple[FloatArray, FloatArray]:
    """Solve the perspective relaxation with ``D = damping``.

    Parameters
    ----------
    problem : BlockProblem
        With rows and positive damping.
    limits : Limits
        `time_limit` and `iteration_limit` (ADMM steps).
    started : float
        `time.perf_counter` at the start of the solve.
    cutoff : float
        Stop once the bound reaches it.

    Returns
    -------
    point, residual : (n,) float64 arrays
        The point of the best bound and ``H w - g - Q u`` there.

    Notes
    -----
    O(m^2 n + m^3) once, O(m n + n log n) a step.
    """
    assert problem.rows is not None
    rows, size = problem.rows, problem.n_keep
    root = math.sqrt(problem.damping)
    linear = problem.linear_term() / root
    constant = problem.constant_term()
    eigenvalues, vectors = np.linalg.eigh(rows @ rows.T)
    eigenvalues = np.maximum(eigenvalues, 0.0) / problem.damping
    penalty = 1.0
    shrunk, dual = np.zeros(problem.n), np.zeros(problem.n)
    order = np.empty(problem.n, dtype=np.int64)
    best, best_point, best_residual = -math.inf, shrunk, linear
    rule = StopRule(limits, started, cutoff)
    step = 0
    while not rule.reached(step, best):
        step += 1
        # (R^T R / damping + penalty I)^-1 by Woodbury, in the eigenbasis of R R^T
        right = linear + penalty * (shrunk - dual)
        image = vectors.T @ (rows @ right)
        inner = vectors @ (image / (penalty + eigenvalues))
        solved = (right - rows.T @ inner / problem.damping) / penalty
        product = right - penalty * solved
        residual = linear - product
        bound = constant - 0.5 * float(solved @ product) - 0.5 * largest_sum(residual**2, size)
        if bound > best:
            best, best_point, best_residual = bound, solved, residual
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * shrunk
        before = shrunk.copy()
        prox_support_norm(relaxed + dual, size, 1.0 / penalty, order, shrunk)
        dual += relaxed - shrunk
        if step % CHECK_PERIOD == 0 and step <= BALANCE_UNTIL:
            primal = float(np.linalg.norm(solved - shrunk))
            change = penalty * float(np.linalg.norm(shrunk - before))
            factor = 2.0 if primal > 5.0 * change else 0.5 if change > 5.0 * primal else 1.0
            penalty *= factor
            dual /= factor
    return best_point / root, best_residual * root


def relax_selection_rows(problem: BlockProblem, limits: Limits, started: float, cutoff: float) -> FloatArray:
    """Solve the capped-simplex relaxation with the shift ``damping * w^2``.

    Parameters as in `relax_joint_rows`; any damping.

    Returns
    -------
    (n,) float64 array
        The point of the best bound.

    Notes
    -----
    O(m^2 n + m^3) once, O(m n) a step.
    """
    assert problem.rows is not None
    rows, weights, count = problem.rows, problem.weights, problem.n_prune
    diagonal = problem.hessian_diagonal() * weights**2
    scale = float(diagonal.mean()) or 1.0
    metric = METRIC_SHARE * (diagonal / scale + METRIC_FLOOR)
    linear = (0.5 * problem.damping * weights**2 - problem.gradient_or_zero * weights) / scale
    # (Y^T Y / scale + P)^-1 with Y = R diag(w): one m x m system
    small = (rows * (weights**2 / metric)) @ rows.T / scale
    small[np.diag_indices(small.shape[0])] += 1.0 + error_factor(problem.n)
    factor = cho_factor(small, check_finite=False)
    guess = np.full(problem.n, count / problem.n)
    dual = np.zeros(problem.n)
    best, best_point = -math.inf, guess
    rule = StopRule(limits, started, cutoff)
    step = 0
    while not rule.reached(step, best):
        step += 1
        right = metric * (guess - dual) - linear
        inner = cho_solve(factor, rows @ (weights * right / metric), check_finite=False)
        solved = (right - weights * (rows.T @ inner) / scale) / metric
        product = right - metric * solved
        bound = scale * (-0.5 * float(solved @ product) + smallest_sum(product + linear, count))
        if bound > best:
            best, best_point = bound, solved
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * guess
        project_capped_simplex(relaxed + dual, metric, count, guess)
        dual += relaxed - guess
    return best_point
