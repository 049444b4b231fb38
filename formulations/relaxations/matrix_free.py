"""Both relaxations on gradient rows without forming ``H``: blocks of 10^3 to 10^6 weights.

The damping is the split. Beside the rows they need one Gram matrix, of order min(m, n), a panel of
64 MiB and a dozen vectors of length n.
"""

from __future__ import annotations

import math

import numpy as np

from formulations.problem import BlockProblem, FloatArray
from formulations.relaxations.capped_simplex_kernels import (
    METRIC_FLOOR,
    METRIC_SHARE,
    project_simplices,
    smallest_sum,
)
from formulations.relaxations.first_order import (
    BestPoint,
    StopRule,
    admm,
    proximal_gradient,
    starting_point,
)
from formulations.relaxations.group_norm import shrink_groups
from formulations.relaxations.shifted_inverse import ShiftedInverse, scaled_gram
from formulations.relaxations.support_norm import held_sum, shrink_support
from formulations.solution import Limits
from formulations.support import Groups

GRAM_LARGEST = 8192
"""Largest order of a Gram matrix that is formed (0.5 GiB); beyond it, proximal gradient."""


class JointRows:
    """The perspective relaxation with ``D = damping``, in ``t = sqrt(damping) u``."""

    def __init__(self, problem: BlockProblem) -> None:
        assert problem.rows is not None
        self.rows = problem.rows
        self.root = math.sqrt(problem.damping)
        self.scale = np.full(problem.n, 1.0 / self.root)
        self.linear = problem.linear_term() / self.root
        self._constant = problem.constant_term()
        self._support = problem.sets
        self._size = self._support.kept(problem.n)
        self._order = np.empty(problem.n, dtype=np.int64)

    def bound(self, point: FloatArray, product: FloatArray) -> float:
        """``constant - 1/2 t.Q t - 1/2 (largest sum of squares of l - Q t that the support can hold)``."""
        square = self._support.folded((self.linear - product) ** 2)
        return self._constant - 0.5 * float(point @ product) - 0.5 * held_sum(square, self._size)

    def shrink(self, target: FloatArray, penalty: float, image: FloatArray) -> None:
        """Proximal map of half the squared support norm."""
        if isinstance(self._support, Groups):
            image[:] = shrink_groups(target, self._support, 1.0 / penalty)[0]
        else:
            shrink_support(target, self._size, 1.0 / penalty, self._order, image)


class SelectionRows:
    """The capped-simplex relaxation with the shift ``damping w^2``, in ``t = sqrt(metric) y``.

    Where groups are pruned whole ``y`` has an entry a group, and rows and costs are summed over each.
    """

    def __init__(self, problem: BlockProblem) -> None:
        assert problem.rows is not None
        support, w = problem.sets, problem.weights
        self.rows, removed = problem.rows, w
        diagonal = problem.hessian_diagonal() * w**2
        cost = 0.5 * problem.damping * w**2 - problem.gradient_or_zero * w
        if support.unit is not None:
            units = support.n_units(problem.n)
            self.rows = np.zeros((problem.rows.shape[0], units))
            np.add.at(self.rows.T, support.unit, (problem.rows * w).T)
            removed = np.ones(units)
            # The curvature of a group, beside its share of the damping.
            diagonal = np.einsum("ij,ij->j", self.rows, self.rows) + support.folded(problem.damping * w**2)
            cost = support.folded(cost)
        self._unit = float(diagonal.mean()) or 1.0
        self._metric = METRIC_SHARE * (diagonal / self._unit + METRIC_FLOOR)
        self.root = np.sqrt(self._metric)
        self.scale = removed / (self.root * math.sqrt(self._unit))
        self.linear = -cost / (self._unit * self.root)
        self._count = support.pruned(problem.n)

    def bound(self, point: FloatArray, product: FloatArray) -> float:
        """``-1/2 t.Q t + (smallest sum of slopes that the support can prune)``."""
        slope = self.root * (product - self.linear)
        return self._unit * (-0.5 * float(point @ product) + smallest_sum(slope, self._count))

    def shrink(self, target: FloatArray, penalty: float, image: FloatArray) -> None:
        """Projection onto the capped simplex in the metric; any `penalty`."""
        project_simplices(target / self.root, self._metric, self._count, image)
        image *= self.root


def relax_joint_rows(
    problem: BlockProblem,
    limits: Limits,
    started: float,
    cutoff: float,
    start: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Solve the perspective relaxation with ``D = damping``.

    Parameters
    ----------
    problem : BlockProblem
        With rows and positive damping.
    limits : Limits
        `time_limit` and `iteration_limit` (steps of ADMM or of the proximal gradient method).
    started : float
        `time.perf_counter` at the start of the solve.
    cutoff : float
        Stop once the bound reaches it.
    start : (n,) float64 array, optional
        A point to start from, such as that of an earlier certificate.

    Returns
    -------
    point, residual : (n,) float64 arrays
        The point of the best bound and ``H w - g - Q u`` there; its largest entries in magnitude are
        the weights to keep.

    Notes
    -----
    O(m n min(m, n)) once, O(m n + n log n) a step.
    """
    relaxation = JointRows(problem)
    best, _ = solve_rows(relaxation, StopRule(limits, started, cutoff), start)
    return best.point / relaxation.root, (relaxation.linear - best.product) * relaxation.root


def solve_rows(
    relaxation: JointRows | SelectionRows, stop: StopRule, start: FloatArray | None = None
) -> tuple[BestPoint, FloatArray | None]:
    """Solve either relaxation from `start` (unscaled); the best point, scaled, and the Gram matrix if formed.

    The Gram matrix is that of ``R diag(scale)``. Without time for it the starting point comes back, whose
    bound is valid too.
    """
    best = starting_point(relaxation, None if start is None else start * relaxation.root)
    if min(relaxation.rows.shape) > GRAM_LARGEST:
        return proximal_gradient(relaxation, best, stop), None
    gram = scaled_gram(relaxation.rows, relaxation.scale, stop.out_of_time)
    if gram is None:
        return best, None
    return admm(relaxation, best, ShiftedInverse(relaxation.rows, relaxation.scale, gram), stop), gram
