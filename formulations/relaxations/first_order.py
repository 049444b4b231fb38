"""First-order methods on either relaxation in scaled coordinates; every step proves a bound.

Both minimise ``1/2 t.Q t - l.t + phi(t)`` with ``Q = Z^T Z``, ``Z = R diag(scale)``, and ``phi`` half the
squared s-support norm (joint) or the indicator of the capped simplex (selection).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from formulations.problem import FloatArray
from formulations.relaxations.shifted_inverse import ShiftedInverse
from formulations.solution import Limit, Limits

ADMM_STEPS = 200
GRADIENT_STEPS = 4000
"""Most steps of a run without an iteration limit."""
OVER_RELAXATION = 1.7
"""Over-relaxation of ADMM, in (1, 2)."""
CHECK_PERIOD = 5
"""Steps between two looks at the progress."""
SHARE_OF_GAP = 0.02
"""A period that closes less than this share of the gap to the cutoff is idle."""
SHARE_OF_BOUND = 1e-6
"""Without a cutoff, the gain relative to the bound below which a period is idle."""
ADMM_PATIENCE = 2
GRADIENT_PATIENCE = 30
"""Idle periods in a row that end a run; bounds of accelerated steps rise in waves."""
BALANCE_PERIOD = 10
BALANCE_UNTIL = 60
"""Steps after which the penalty no longer follows the residuals, so that ADMM converges."""
BALANCE_RATIO = 5.0
POWER_STEPS = 30
POWER_MARGIN = 1.05


class RowRelaxation(Protocol):
    """One relaxation in scaled coordinates."""

    @property
    def rows(self) -> FloatArray:
        """Gradient rows ``R``, (m, n)."""
        ...

    @property
    def scale(self) -> FloatArray:
        """``Z = R diag(scale)``."""
        ...

    @property
    def linear(self) -> FloatArray:
        """``l``, (n,)."""
        ...

    def bound(self, point: FloatArray, product: FloatArray) -> float:
        """Return the bound that `point` proves in units of the loss; `product` = ``Q point``."""
        ...

    def shrink(self, target: FloatArray, penalty: float, image: FloatArray) -> None:
        """Write the minimiser of ``phi(t) + penalty / 2 |t - target|^2`` to `image`."""
        ...


@dataclass
class BestPoint:
    """The point of the best bound so far and ``Q`` times it."""

    bound: float
    point: FloatArray
    product: FloatArray
    steps: int = 0

    def offer(self, bound: float, point: FloatArray, product: FloatArray) -> None:
        """Take a point with a better bound."""
        if bound > self.bound:
            self.bound, self.point, self.product = bound, point, product


class StopRule:
    """Decides when a run has brought what it can.

    Parameters
    ----------
    limits : Limits
        `time_limit` and `iteration_limit` (steps).
    started : float
        `time.perf_counter` at the start of the solve.
    cutoff : float
        A bound that is good enough.

    Attributes
    ----------
    steps : int
        Steps made so far.
    limit : Limit or None
        The limit that was reached, if one was.
    """

    def __init__(self, limits: Limits, started: float, cutoff: float) -> None:
        self.limits = limits
        self.started = started
        self.cutoff = cutoff
        self.steps = 0
        self.limit: Limit | None = None
        self._checked = -math.inf
        self._idle = 0

    def out_of_time(self, ahead: float = 0.0) -> bool:
        """Whether the time limit has passed, or will `ahead` seconds on."""
        if not self.limits.out_of_time(self.started, ahead):
            return False
        self.limit = Limit.TIME
        return True

    def out_of_steps(self) -> bool:
        """Whether so many steps have been made as the limits allow."""
        limit = self.limits.iteration_limit
        if limit is None or self.steps < limit:
            return False
        self.limit = Limit.ITERATION
        return True

    def reached(self, best: BestPoint, most: int, patience: int) -> bool:
        """Whether to stop at `best`: after `most` steps at the latest, or `patience` idle periods."""
        self.steps = best.steps
        if best.bound >= self.cutoff or self.out_of_time():
            return True
        if self.out_of_steps():
            return True
        if best.steps >= most:
            return True
        if best.steps % CHECK_PERIOD or not best.steps:
            return False
        wanted = SHARE_OF_BOUND * abs(best.bound)
        if self.cutoff < math.inf:
            wanted = max(wanted, SHARE_OF_GAP * (self.cutoff - best.bound))
        self._idle = self._idle + 1 if best.bound - self._checked < wanted else 0
        self._checked = best.bound
        return self._idle >= patience


def q_product(relaxation: RowRelaxation, x: FloatArray) -> FloatArray:
    """``Q x``; O(m n)."""
    image = relaxation.rows @ (relaxation.scale * x)
    return np.asarray(relaxation.scale * (relaxation.rows.T @ image))


def starting_point(relaxation: RowRelaxation, start: FloatArray | None) -> BestPoint:
    """Return the first point and its bound: `start`, or zero."""
    if start is None:
        start = np.zeros(relaxation.linear.size)
        product = np.zeros_like(start)
    else:
        product = q_product(relaxation, start)
    return BestPoint(bound=relaxation.bound(start, product), point=start, product=product)


def admm(relaxation: RowRelaxation, best: BestPoint, inverse: ShiftedInverse, stop: StopRule) -> BestPoint:
    """Over-relaxed ADMM from `best`, with a penalty that balances the residuals at first.

    O(m n + n log n) a step and one Cholesky factorisation a change of the penalty. In coordinates in
    which ``phi`` has curvature 1, 20 to 40 steps from a penalty of 1 leave 1e-4 of the bound or less.
    """
    penalty = 1.0
    linear = relaxation.linear
    shrunk = best.point.copy()
    dual = np.zeros_like(shrunk)
    if shrunk.any():
        dual = (linear - best.product) / penalty
    while not stop.reached(best, ADMM_STEPS, ADMM_PATIENCE):
        best.steps += 1
        right = linear + penalty * (shrunk - dual)
        solved = inverse.solve(right, penalty)
        product = right - penalty * solved
        best.offer(relaxation.bound(solved, product), solved, product)
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * shrunk
        before = shrunk.copy()
        relaxation.shrink(relaxed + dual, penalty, shrunk)
        dual += relaxed - shrunk
        if best.steps % BALANCE_PERIOD == 0 and best.steps <= BALANCE_UNTIL:
            primal = float(np.linalg.norm(solved - shrunk))
            change = penalty * float(np.linalg.norm(shrunk - before))
            factor = (
                2.0 if primal > BALANCE_RATIO * change else 0.5 if change > BALANCE_RATIO * primal else 1.0
            )
            penalty *= factor
            dual /= factor
    return best


def proximal_gradient(relaxation: RowRelaxation, best: BestPoint, stop: StopRule) -> BestPoint:
    """Accelerated proximal gradient from `best`, restarted when the momentum points uphill.

    For rows of which even the smaller Gram matrix is too large; O(m n + n log n) a step.
    Source: Beck & Teboulle (2009); O'Donoghue & Candes (2015) for the restart.
    """
    curvature = _largest_eigenvalue(relaxation, stop)
    shrunk = best.point.copy()
    ahead, momentum = shrunk.copy(), 1.0
    while not stop.reached(best, GRADIENT_STEPS, GRADIENT_PATIENCE):
        best.steps += 1
        product = q_product(relaxation, ahead)
        best.offer(relaxation.bound(ahead, product), ahead, product)
        following = np.empty_like(shrunk)
        relaxation.shrink(ahead + (relaxation.linear - product) / curvature, curvature, following)
        moved = following - shrunk
        if float((ahead - following) @ moved) > 0.0:
            momentum = 1.0
        grown = 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * momentum * momentum))
        ahead = following + (momentum - 1.0) / grown * moved
        momentum, shrunk = grown, following
    return best


def _largest_eigenvalue(relaxation: RowRelaxation, stop: StopRule) -> float:
    """Slightly more than the largest eigenvalue of ``Q``, by power steps; at least 1e-12."""
    vector = np.random.default_rng(0).normal(size=relaxation.linear.size)
    value = 0.0
    for _ in range(POWER_STEPS):
        vector = q_product(relaxation, vector / max(float(np.linalg.norm(vector)), 1e-300))
        value = max(value, float(np.linalg.norm(vector)))
        if stop.out_of_time():
            break
    return max(POWER_MARGIN * value, 1e-12)
