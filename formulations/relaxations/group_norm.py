"""The perspective relaxation where groups are kept or pruned whole: one share ``z`` for all of a group.

With ``M = Q + D`` scaled so that ``D = I``, the last term is half the squared support norm of the groups'
lengths, so that its proximal map shrinks lengths, and every point ``t`` proves

    optimum >= -1/2 t.Q t - 1/2 (sum of the s largest |l - Q t|^2 over groups).
"""

from __future__ import annotations

import numpy as np

from formulations.problem import FloatArray
from formulations.relaxations.ascent import OVER_RELAXATION
from formulations.relaxations.support_norm import largest_sum, prox_support_norm
from formulations.solution import Stopped, never
from formulations.support import Groups

CHECK_PERIOD = 5
"""Steps between two looks at the progress and at the clock."""
PATIENCE = 3
"""Looks in a row that may find next to no gain."""


def shrink_groups(point: FloatArray, support: Groups, step: float) -> tuple[FloatArray, FloatArray]:
    """Return the proximal map of ``step / 2`` times the squared norm, and the share of each group."""
    lengths = np.sqrt(support.folded(point * point))
    order, image = np.empty(lengths.size, dtype=np.int64), np.empty(lengths.size)
    left, right = prox_support_norm(lengths, support.n_keep, step, order, image)
    shares = np.zeros(lengths.size)
    shares[order[:left]] = 1.0
    shared = order[left:right]
    level = float(image[shared].sum()) / max(support.n_keep - left, 1)
    if level > 0.0:
        shares[shared] = image[shared] / level
    factor = np.divide(image, lengths, out=np.zeros(lengths.size), where=lengths > 0.0)
    return point * support.spread(factor), shares


def group_bound(point: FloatArray, product: FloatArray, linear: FloatArray, support: Groups) -> float:
    """Return what `point` proves; `product` = ``Q point``."""
    squares = support.folded((linear - product) ** 2)
    return -0.5 * float(point @ product) - 0.5 * float(largest_sum(squares, support.n_keep))


def group_slopes(u: FloatArray, point: FloatArray, residual: FloatArray, support: Groups) -> FloatArray:
    """Supergradient of the bound in the split, ``1/2 u_i^2 (1 / z - 1)``, ``z`` the share of its group."""
    shares = support.spread(shrink_groups(point + residual, support, 1.0)[1])
    rest = np.divide(1.0, shares, out=np.ones(u.size), where=shares > 0.0) - 1.0
    return np.asarray(0.5 * u * u * np.maximum(rest, 0.0))


def ascend_groups(
    smooth: FloatArray,
    linear: FloatArray,
    support: Groups,
    start: FloatArray,
    cutoff: float,
    max_steps: int,
    tolerance: float,
    stopped: Stopped = never,
) -> tuple[float, FloatArray, FloatArray]:
    """Raise the bound by over-relaxed ADMM on the splitting quadratic / norm; O(n^3) once, O(n^2) a step.

    Parameters
    ----------
    smooth, linear : (n, n) and (n,) float64 arrays
        ``Q`` and ``l``.
    support : Groups
    start : (n,) float64 array
    cutoff : float
        A bound that is good enough.
    max_steps : int
    tolerance : float
        Share of the gap to the cutoff (of the bound without one) that `CHECK_PERIOD` steps have to gain.
    stopped : callable

    Returns
    -------
    bound : float
    point, residual : (n,) float64 arrays
        The best point and ``l - Q t`` there.
    """
    product = smooth @ start
    best, point, residual = group_bound(start, product, linear, support), start, linear - product
    if best >= cutoff or max_steps == 0:
        return best, point, residual
    shifted = smooth.copy()
    shifted[np.diag_indices(linear.size)] += 1.0
    inverse = np.linalg.inv(shifted)
    shrunk, dual = start.copy(), residual.copy()
    idle, previous = 0, best
    for step in range(1, max_steps + 1):
        solved = inverse @ (linear + shrunk - dual)
        product = smooth @ solved
        value = group_bound(solved, product, linear, support)
        if value > best:
            best, point, residual = value, solved, linear - product
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * shrunk
        shrunk, _ = shrink_groups(relaxed + dual, support, 1.0)
        dual = dual + relaxed - shrunk
        if best >= cutoff:
            break
        if step % CHECK_PERIOD == 0:
            wanted = tolerance * (cutoff - best if cutoff < np.inf else abs(best))
            idle = idle + 1 if best - previous < wanted else 0
            previous = best
            if idle >= PATIENCE or stopped():
                break
    return best, point, residual
