"""Better diagonal splits ``H = Q + D``: barrier Newton steps on ``max c.D, H - D psd``.

The bound of either relaxation is concave in ``D`` with a supergradient ``c`` that the relaxation's
solution gives. The best split solves a semidefinite program (Frangioni & Gentile 2007; Dong, Chen &
Linderoth 2015); here ``D`` follows its central path a few Newton steps at a time.
"""

from __future__ import annotations

import numpy as np

from formulations.compiled import MATRIX, REAL, SWITCH, VECTOR, compiled, entry
from formulations.factorisation import cholesky_factor, inverse_from_factor, solve_factored
from formulations.problem import FloatArray

LAPACK_FROM = 48
"""Order from which LAPACK inverts faster than the plain kernel."""

INTERIOR_SHARE = 0.7
INTERIOR_STEP = 0.01


@entry(MATRIX, VECTOR, VECTOR, REAL, SWITCH)
@compiled
def barrier_step(
    matrix: FloatArray, split: FloatArray, slopes: FloatArray, weight: float, positive: bool
) -> bool:
    """One damped Newton step on ``slopes.D / weight + log det(H - D) [+ sum log D]``, in place.

    Parameters
    ----------
    matrix : (n, n) array
        ``H``.
    split : (n,) array
        A strictly feasible ``D``; replaced by a better one whose feasibility a Cholesky
        factorisation has confirmed.
    slopes : (n,) array
        Supergradient of the bound, non-negative.
    weight : float
        Barrier weight: the centre is within ``2 n weight`` of the linear optimum.
    positive : bool
        Whether ``D > 0`` is required.

    Returns
    -------
    bool
        False if `split` was left as it was.
    """
    n = split.size
    slack = matrix.copy()
    for i in range(n):
        slack[i, i] -= split[i]
    factor = np.zeros((n, n))
    # A large slack matrix is not tested first: what a singular one leads to fails the test below.
    if n >= LAPACK_FROM:
        inverse = np.linalg.inv(slack)
    elif cholesky_factor(slack, factor):
        inverse = inverse_from_factor(factor)
    else:
        return False
    gradient = np.empty(n)
    curvature = inverse * inverse
    for i in range(n):
        gradient[i] = slopes[i] / weight - inverse[i, i]
        if positive:
            gradient[i] += 1.0 / split[i]
            curvature[i, i] += 1.0 / (split[i] * split[i])
        curvature[i, i] *= 1.0 + 1e-12
    if not np.isfinite(gradient).all() or not cholesky_factor(curvature, factor):
        return False
    direction = solve_factored(factor, gradient)
    # Of lengths near 1 / (1 + Newton decrement) all are feasible; longer ones are tried first.
    length = 1.0
    candidate = np.empty(n)
    while length > 1e-6:
        feasible = True
        for i in range(n):
            candidate[i] = split[i] + length * direction[i]
            if positive and not candidate[i] > 0.0:
                feasible = False
                break
        if feasible:
            for i in range(n):
                slack[i, i] = matrix[i, i] - candidate[i]
            if cholesky_factor(slack, factor):
                break
        length *= 0.5
    else:
        return False
    if length < 1.0:
        # Stay off the boundary of the cone.
        length *= 0.9
    for i in range(n):
        split[i] += length * direction[i]
    return True


def interior_split(matrix: FloatArray, split: FloatArray, positive: bool) -> FloatArray:
    """Return a strictly feasible split near a feasible one: the barrier's starting point."""
    shrunk = INTERIOR_SHARE * split
    if not positive:
        # The split may be 0 on a singular matrix; it may also be negative.
        shrunk -= INTERIOR_STEP * np.diagonal(matrix)
    return np.asarray(shrunk)
