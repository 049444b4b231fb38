"""Numba kernels of the perspective relaxation of the joint program with a diagonal split.

With ``M = Q + D``, ``D`` diagonal and positive, ``Q`` positive semidefinite, the relaxation is

    min_u  1/2 u.Q u - l.u + 1/2 min { sum_i D_i u_i^2 / z_i : 0 <= z <= 1, sum z <= s }

and the last term is half the squared s-support norm of ``t = sqrt(D) u`` (Argyriou, Foygel & Srebro
2012). Every ``u`` gives a lower bound: with ``g = l - Q u``,

    optimum >= -1/2 u.Q u - 1/2 (sum of the s largest g_i^2 / D_i).
"""

from __future__ import annotations

import numpy as np

from formulations.compiled import INTEGER, MATRIX, REAL, VECTOR, compiled, entry
from formulations.factorisation import cholesky_factor, solve_factored
from formulations.problem import FloatArray, IntArray
from formulations.relaxations.support_norm import copy_into, largest_sum, prox_support_norm

NEWTON_PERIOD = 6
"""ADMM steps between two active-set climbs."""
NEWTON_MISSES = 4
"""Newton steps in a row that may fail to lift the bound before a climb is given up."""
PATIENCE = 8
"""Climbs in a row that may bring next to nothing before the relaxation is left as it is."""
UNLIKE = 1e3
"""Two points whose rounding errors differ by more than this factor are compared by what they prove."""
ROUNDOFF = 1.2e-16
"""A little above the unit roundoff of float64."""
ZERO = 0
SHARED = 1
WHOLE = 2
OVER_RELAXATION = 1.7
"""Over-relaxation of ADMM, in (1, 2)."""


@compiled
def dual_value(u: FloatArray, product: FloatArray, linear: FloatArray, split: FloatArray, size: int) -> float:
    """Return the lower bound that `u` proves; `product` = ``Q u``."""
    residual = linear - product
    return -0.5 * float(np.dot(u, product)) - 0.5 * largest_sum(residual * residual / split, size)


@compiled
def dual_rounding(
    smooth: FloatArray, linear: FloatArray, point: FloatArray, residual: FloatArray, size: int
) -> float:
    """Bound on the rounding error of `dual_value` in scaled coordinates; O(n).

    ``|Q_ij| <= a_i a_j`` with ``a_i = sqrt(Q_ii)``, so an inner product of ``Q`` with ``t`` errs by at most
    ``gamma a_i sum_j a_j |t_j|``.
    """
    n = linear.size
    gamma = ROUNDOFF * (n + 16.0)
    reach = 0.0
    for i in range(n):
        reach += np.sqrt(max(smooth[i, i], 0.0)) * abs(point[i])
    terms = np.empty(n)
    for i in range(n):
        error = np.sqrt(max(smooth[i, i], 0.0)) * reach + abs(linear[i]) + abs(residual[i])
        terms[i] = error * (abs(residual[i]) + gamma * error)
    return 1.01 * gamma * (reach * reach + largest_sum(terms, size))


@compiled
def indefinite_rounding(
    linear: FloatArray, point: FloatArray, residual: FloatArray, constant: float, reach: FloatArray
) -> float:
    """Return what a point far from every good set may lose where rounding has made ``Q`` indefinite; O(n).

    ``Q`` may be indefinite by ``gamma (|u|_1 + |v|_1)^2 / 2`` between a good set's point ``u`` and the
    relaxation's ``v``. The form's allowance covers ``u``, and ``v`` if its quadratic value is as good;
    here ``|v|_1`` is bounded by that value, as in `dense_forms.joint_form`.
    """
    quadratic = constant
    for i in range(point.size):
        quadratic += point[i] * (0.5 * (point[i] - linear[i] - residual[i]))
    above = max(quadratic - reach[3], 0.0)
    size = reach[1] + reach[2] * np.sqrt(2.0 * above)
    return float(reach[0] * size * size)


@compiled
def newton_support(
    smooth: FloatArray,
    linear: FloatArray,
    size: int,
    place: IntArray,
    sign: FloatArray,
    point: FloatArray,
) -> tuple[bool, float]:
    """Minimiser for fixed active sets, in scaled coordinates (``D = I``).

    WHOLE entries have ``z = 1``, SHARED ones split what is left of `size` and keep their `sign`, the
    others are zero. Returns whether `point` was written, and the level: the magnitude of the residual
    common to the shared entries. One linear system in the non-zeros.
    """
    whole = np.nonzero(place == WHOLE)[0]
    shared = np.nonzero(place == SHARED)[0]
    left, right = whole.size, whole.size + shared.size
    units = size - left
    if right == 0 or units < 0 or (units == 0) != (shared.size == 0):
        return False, 0.0
    order = np.concatenate((whole, shared))
    system = np.empty((right, right))
    target = np.empty(right)
    share = 1.0 / units if units > 0 else 0.0
    for p in range(right):
        i = order[p]
        source = smooth[i]
        target[p] = linear[i]
        if p < left:
            for q in range(p + 1):
                system[p, q] = source[order[q]]
            system[p, p] += 1.0
        else:
            for q in range(left):
                system[p, q] = source[order[q]]
            for q in range(left, p + 1):
                system[p, q] = source[order[q]] + share * sign[i] * sign[order[q]]
            system[p, p] += 1e-13 * (1.0 + source[i])
    factor = np.empty((right, right))
    if not cholesky_factor(system, factor):
        return False, 0.0
    solution = solve_factored(factor, target)
    point[:] = 0.0
    level = 0.0
    for p in range(right):
        point[order[p]] = solution[p]
        if p >= left:
            level += share * sign[order[p]] * solution[p]
    return bool(np.isfinite(level)), level


@compiled
def move_support(
    point: FloatArray, residual: FloatArray, level: float, size: int, place: IntArray, sign: FloatArray
) -> int:
    """Primal-dual active-set move between whole, shared and zero entries; how many moved."""
    n = point.size
    whole, shared = 0, 0
    smallest = np.inf
    for i in range(n):
        if place[i] == WHOLE:
            whole += 1
            smallest = min(smallest, abs(residual[i]))
        elif place[i] == SHARED:
            shared += 1
    if shared == 0:
        # No level yet: between the smallest whole entry and the largest zero one.
        largest = 0.0
        for i in range(n):
            if place[i] == ZERO:
                largest = max(largest, abs(residual[i]))
        if largest <= smallest * (1.0 + 1e-12):
            return 0
        level = 0.5 * (smallest + largest)
    moved = 0
    high, low = level * (1.0 + 1e-10), level * (1.0 - 1e-10)
    for i in range(n):
        if place[i] == SHARED:
            part = sign[i] * point[i]
            if part < -1e-10 * level:
                place[i] = ZERO
                moved += 1
            elif part > high:
                place[i] = WHOLE
                whole += 1
                moved += 1
        elif (place[i] == ZERO and abs(residual[i]) > high) or (place[i] == WHOLE and abs(residual[i]) < low):
            whole -= 1 if place[i] == WHOLE else 0
            place[i] = SHARED
            sign[i] = 1.0 if residual[i] >= 0.0 else -1.0
            moved += 1
    while whole >= size:
        # Leave a unit to share: the smallest whole entries give theirs up.
        weakest = -1
        for i in range(n):
            if place[i] == WHOLE and (weakest < 0 or abs(residual[i]) < abs(residual[weakest])):
                weakest = i
        place[weakest] = SHARED
        sign[weakest] = 1.0 if residual[weakest] >= 0.0 else -1.0
        whole -= 1
        moved += 1
    return moved


@compiled
def rises(value: float, error: float, best: float, best_error: float) -> bool:
    """Whether a value lifts the best bound; where rounding errors are unlike, each value less its own."""
    if max(error, best_error) > UNLIKE * min(error, best_error):
        return bool(value - error > best - best_error)
    return bool(value > best)


@compiled
def climb_support(
    smooth: FloatArray,
    linear: FloatArray,
    size: int,
    place: IntArray,
    sign: FloatArray,
    best: float,
    best_point: FloatArray,
    best_residual: FloatArray,
    cutoff: float,
) -> tuple[float, float, bool]:
    """Newton steps on moving active sets while they lead on; best bound, its rounding, whether optimal.

    `best_point` and `best_residual` are replaced when the bound rises. Where the active entries are more than
    the rank, a Newton point may be so large that its value is nothing but rounding: see `rises`.
    """
    best_error = dual_rounding(smooth, linear, best_point, best_residual, size)
    newton = np.empty(linear.size)
    ones = np.ones(linear.size)
    misses = 0
    while misses < NEWTON_MISSES:
        solved, level = newton_support(smooth, linear, size, place, sign, newton)
        if not solved:
            return best, best_error, False
        product = np.dot(smooth, newton)
        residual = linear - product
        value = dual_value(newton, product, linear, ones, size)
        misses += 1
        error = dual_rounding(smooth, linear, newton, residual, size)
        if rises(value, error, best, best_error):
            misses = 0
            best, best_error = value, error
            copy_into(best_point, newton)
            copy_into(best_residual, residual)
        if best >= cutoff or move_support(newton, residual, level, size, place, sign) == 0:
            return best, best_error, True
    return best, best_error, False


@compiled
def name_places(
    point: FloatArray, size: int, order: IntArray, image: FloatArray, place: IntArray, sign: FloatArray
) -> None:
    """Active sets of the proximal map of ``1/2`` the squared support norm at `point`."""
    left, right = prox_support_norm(point, size, 1.0, order, image)
    place[:] = ZERO
    for q in range(right):
        i = order[q]
        place[i] = WHOLE if q < left else SHARED
        sign[i] = 1.0 if image[i] >= 0.0 else -1.0


@entry(MATRIX, VECTOR, INTEGER, VECTOR, REAL, INTEGER, REAL)
@compiled
def solve_perspective(
    smooth: FloatArray,
    linear: FloatArray,
    size: int,
    start: FloatArray,
    cutoff: float,
    max_steps: int,
    tolerance: float,
) -> tuple[float, FloatArray, FloatArray, int]:
    """Maximise the dual bound in scaled coordinates ``t = sqrt(D) u`` (so ``D = I``).

    A primal-dual active-set method from the sets of the start; where it cycles, over-relaxed ADMM on
    the splitting quadratic / support norm proposes other sets. Stops when the bound reaches `cutoff`,
    at the optimum, when ADMM gains less than `tolerance` times the distance to the cutoff, or after
    `max_steps`.

    Returns
    -------
    bound : float
    point : (n,) float64 array
        The point that proves the bound.
    residual : (n,) float64 array
        ``l - Q t`` there.
    steps : int
    """
    n = linear.size
    ones = np.ones(n)
    product = np.dot(smooth, start)
    best_point = start.copy()
    best_residual = linear - product
    best = dual_value(start, product, linear, ones, size)
    if best >= cutoff:
        return best, best_point, best_residual, 0
    order = np.empty(n, dtype=np.int64)
    shrunk = np.empty(n)
    place = np.empty(n, dtype=np.int64)
    sign = np.ones(n)
    name_places(best_point + best_residual, size, order, shrunk, place, sign)
    best, error, done = climb_support(
        smooth, linear, size, place, sign, best, best_point, best_residual, cutoff
    )
    if done:
        return best, best_point, best_residual, 0
    shifted = smooth.copy()
    for i in range(n):
        shifted[i, i] += 1.0
    inverse = np.linalg.inv(shifted)
    copy_into(shrunk, best_point)
    dual = best_residual.copy()
    steps = 0
    stalled = 0
    previous = best
    while steps < max_steps and best < cutoff:
        steps += 1
        right_side = linear + shrunk - dual
        solved = np.dot(inverse, right_side)
        product = right_side - solved
        residual = linear - product
        value = dual_value(solved, product, linear, ones, size)
        if rises(value, dual_rounding(smooth, linear, solved, residual, size), best, error):
            # The product above rests on an inverse, and is as inexact; a bound needs a true one.
            product = np.dot(smooth, solved)
            residual = linear - product
            value = dual_value(solved, product, linear, ones, size)
            blur = dual_rounding(smooth, linear, solved, residual, size)
            if rises(value, blur, best, error):
                best, error = value, blur
                copy_into(best_point, solved)
                copy_into(best_residual, residual)
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * shrunk
        target = relaxed + dual
        name_places(target, size, order, shrunk, place, sign)
        dual += relaxed - shrunk
        if steps % NEWTON_PERIOD == 0 or steps == max_steps:
            best, error, done = climb_support(
                smooth, linear, size, place, sign, best, best_point, best_residual, cutoff
            )
            scale = cutoff - best if cutoff < np.inf else abs(best)
            stalled = stalled + 1 if best - previous < tolerance * scale else 0
            previous = best
            if done or stalled >= PATIENCE:
                break
    return best, best_point, best_residual, steps


@entry(VECTOR, VECTOR, VECTOR, INTEGER)
@compiled
def split_slopes(u: FloatArray, point: FloatArray, residual: FloatArray, size: int) -> FloatArray:
    """Supergradient of the bound in the split, ``1/2 u_i^2 (1 / z_i - 1)``."""
    m = u.size
    order = np.empty(m, dtype=np.int64)
    image = np.empty(m)
    left, right = prox_support_norm(point + residual, size, 1.0, order, image)
    slopes = np.zeros(m)
    level = 0.0
    for q in range(left, right):
        level += abs(image[order[q]])
    level /= max(size - left, 1)
    for q in range(left, right):
        i = order[q]
        slopes[i] = 0.5 * u[i] * u[i] * max(level / max(abs(image[i]), 1e-12 * level) - 1.0, 0.0)
    return slopes
