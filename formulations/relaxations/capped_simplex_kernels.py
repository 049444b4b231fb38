"""Numba kernels of the continuous relaxation of the selection program after a diagonal shift.

On binary ``y`` the form ``1/2 y.A y + c.y`` equals ``1/2 y.B y + q.y`` with ``B = A - diag(u)`` and
``q = c + u / 2``. With ``B`` positive semidefinite the relaxation is convex over the capped simplex
``{0 <= y <= 1, sum y = k}``, and every ``y`` gives a lower bound: with ``r = B y + q``,

    optimum >= -1/2 y.B y + (sum of the k smallest r_i).

Source of the shift: Hammer & Rubin (1970); Billionnet, Elloumi & Plateau (2009).
"""

from __future__ import annotations

import numpy as np

from formulations.compiled import INTEGER, MATRIX, REAL, VECTOR, compiled, entry
from formulations.factorisation import cholesky_factor, solve_factored
from formulations.problem import FloatArray, IntArray
from formulations.relaxations.perspective_kernels import ROUNDOFF, rises
from formulations.relaxations.support_norm import copy_into, largest_sum

NEWTON_PERIOD = 6
"""ADMM steps between two active-set climbs."""
NEWTON_MISSES = 4
"""Newton steps in a row that may fail to lift the bound before a climb is given up."""
PATIENCE = 8
"""Climbs in a row that may bring next to nothing before the relaxation is left as it is."""
AT_ZERO = 0
AT_ONE = 1
INSIDE = 2
OVER_RELAXATION = 1.7
"""Over-relaxation of ADMM, in (1, 2)."""
BISECTIONS = 60
METRIC_SHARE = 0.25
METRIC_FLOOR = 0.01
"""ADMM works in the norm ``METRIC_SHARE * (A_ii + METRIC_FLOOR)``, with mean ``A_ii`` about 1."""
SLOPE_FLOOR = 1e-3
"""Least slope in the shift relative to the largest: without it the barrier problem is unbounded."""
ON_BOUND = 1e-9
"""An entry this close to 0 or 1 counts as there."""


@entry(VECTOR, VECTOR, INTEGER, VECTOR)
@compiled
def project_capped_simplex(point: FloatArray, metric: FloatArray, count: int, image: FloatArray) -> None:
    """Projection onto ``{0 <= y <= 1, sum y = count}`` in the norm ``sum_i metric_i y_i^2``.

    The image is ``clip(point - theta / metric, 0, 1)``; ``theta`` by bisection, then exactly on the
    entries strictly inside. O(n) a bisection.
    """
    n = point.size
    low, high = np.inf, -np.inf
    for i in range(n):
        low = min(low, (point[i] - 1.0) * metric[i])
        high = max(high, point[i] * metric[i])
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        total = 0.0
        for i in range(n):
            total += min(max(point[i] - middle / metric[i], 0.0), 1.0)
        if total > count:
            low = middle
        else:
            high = middle
    theta = 0.5 * (low + high)
    for i in range(n):
        image[i] = min(max(point[i] - theta / metric[i], 0.0), 1.0)


@entry(VECTOR, INTEGER)
@compiled
def smallest_sum(values: FloatArray, count: int) -> float:
    """Sum of the `count` smallest of `values`."""
    return -largest_sum(-values, count)


@compiled
def linearisation_rounding(
    smooth: FloatArray, linear: FloatArray, point: FloatArray, slope: FloatArray, count: int
) -> float:
    """Bound on the rounding error of the linearisation bound, and on an indefinite rounded ``B``; O(n).

    ``|B_ij| <= a_i a_j`` with ``a_i = sqrt(B_ii)``; a ``B`` that is semidefinite up to rounding costs
    ``1/2 gamma (sum_i a_i |y_i - v_i|)^2`` at the binary points ``v``.
    """
    n = linear.size
    gamma = ROUNDOFF * (n + 16.0)
    root = np.empty(n)
    reach = 0.0
    for i in range(n):
        root[i] = np.sqrt(max(smooth[i, i], 0.0))
        reach += root[i] * abs(point[i])
    terms = root * reach + np.abs(linear) + np.abs(slope)
    both = reach + largest_sum(root, count)
    return 1.01 * gamma * (reach * reach + largest_sum(terms, count) + both * both)


@compiled
def newton_simplex(
    smooth: FloatArray, linear: FloatArray, count: int, place: IntArray, point: FloatArray
) -> tuple[bool, float]:
    """Minimiser with the entries placed at 0 or 1 held there and the sum held at `count`.

    Returns whether `point` was written, and the multiplier of the sum: the slope common to the
    entries inside. One linear system in those.
    """
    n = place.size
    inside = np.nonzero(place == INSIDE)[0]
    size = inside.size
    if size == 0:
        return False, 0.0
    rest = float(count)
    for i in range(n):
        point[i] = 1.0 if place[i] == AT_ONE else 0.0
        rest -= point[i]
    slope = linear + np.dot(smooth, point)
    system = np.empty((size, size))
    target = np.empty(size)
    for p in range(size):
        source = smooth[inside[p]]
        target[p] = -slope[inside[p]]
        for q in range(p + 1):
            system[p, q] = source[inside[q]]
        system[p, p] += 1e-13 * (1.0 + system[p, p])
    factor = np.empty((size, size))
    if not cholesky_factor(system, factor):
        return False, 0.0
    particular = solve_factored(factor, target)
    along = solve_factored(factor, np.ones(size))
    weight = (rest - particular.sum()) / along.sum()
    if not np.isfinite(weight):
        return False, 0.0
    for p in range(size):
        point[inside[p]] = particular[p] + weight * along[p]
    return True, weight


@compiled
def move_places(point: FloatArray, slope: FloatArray, multiplier: float, place: IntArray) -> int:
    """Primal-dual active-set move: hold what left the box, free what wants to enter; how many."""
    moved = 0
    tolerance = 1e-10 * (1.0 + abs(multiplier))
    for i in range(point.size):
        if place[i] == INSIDE:
            if point[i] < -ON_BOUND:
                place[i] = AT_ZERO
                moved += 1
            elif point[i] > 1.0 + ON_BOUND:
                place[i] = AT_ONE
                moved += 1
        elif (place[i] == AT_ZERO and slope[i] < multiplier - tolerance) or (
            place[i] == AT_ONE and slope[i] > multiplier + tolerance
        ):
            place[i] = INSIDE
            moved += 1
    return moved


@compiled
def places_of(guess: FloatArray, place: IntArray) -> None:
    """Name the entries of a point of the box that lie at 0, at 1 and inside."""
    for i in range(guess.size):
        place[i] = INSIDE
        if guess[i] <= ON_BOUND:
            place[i] = AT_ZERO
        elif guess[i] >= 1.0 - ON_BOUND:
            place[i] = AT_ONE


@compiled
def climb_simplex(
    smooth: FloatArray,
    linear: FloatArray,
    count: int,
    place: IntArray,
    best: float,
    best_point: FloatArray,
    best_slope: FloatArray,
    cutoff: float,
) -> tuple[float, float, bool]:
    """Newton steps on moving active sets while they lead on; best bound, its rounding, whether optimal.

    `best_point` and `best_slope` are replaced when the bound rises. Where the active entries are more than
    the rank, a Newton point may be so large that its value is nothing but rounding: see `rises`.
    """
    best_error = linearisation_rounding(smooth, linear, best_point, best_slope, count)
    newton = np.empty(linear.size)
    misses = 0
    while misses < NEWTON_MISSES:
        solved, multiplier = newton_simplex(smooth, linear, count, place, newton)
        if not solved:
            return best, best_error, False
        product = np.dot(smooth, newton)
        slope = product + linear
        value = -0.5 * np.dot(newton, product) + smallest_sum(slope, count)
        misses += 1
        error = linearisation_rounding(smooth, linear, newton, slope, count)
        if rises(value, error, best, best_error):
            misses = 0
            best, best_error = value, error
            copy_into(best_point, newton)
            copy_into(best_slope, slope)
        if best >= cutoff or move_places(newton, slope, multiplier, place) == 0:
            return best, best_error, True
    return best, best_error, False


@entry(MATRIX, VECTOR, INTEGER, VECTOR, VECTOR, REAL, INTEGER, REAL)
@compiled
def solve_capped_simplex(
    smooth: FloatArray,
    linear: FloatArray,
    count: int,
    metric: FloatArray,
    start: FloatArray,
    cutoff: float,
    max_steps: int,
    tolerance: float,
) -> tuple[float, FloatArray, FloatArray, int]:
    """Maximise the linearisation bound over ``y``.

    A primal-dual active-set method from the sets of the start; where it cycles, over-relaxed ADMM in
    the norm of `metric` proposes other sets. Stops when the bound reaches `cutoff`, at the optimum,
    when ADMM gains less than `tolerance` times the distance to the cutoff, or after `max_steps`.

    Returns
    -------
    bound : float
    point : (n,) float64 array
        The point that proves the bound.
    slope : (n,) float64 array
        ``B y + q`` there.
    steps : int
    """
    n = linear.size
    best_point = start.copy()
    product = np.dot(smooth, start)
    best_slope = product + linear
    best = -0.5 * np.dot(start, product) + smallest_sum(best_slope, count)
    if best >= cutoff:
        return best, best_point, best_slope, 0
    guess = np.empty(n)
    place = np.empty(n, dtype=np.int64)
    project_capped_simplex(best_point, metric, count, guess)
    places_of(guess, place)
    best, error, done = climb_simplex(smooth, linear, count, place, best, best_point, best_slope, cutoff)
    if done:
        return best, best_point, best_slope, 0
    shifted = smooth.copy()
    for i in range(n):
        shifted[i, i] += metric[i]
    inverse = np.linalg.inv(shifted)
    project_capped_simplex(best_point, metric, count, guess)
    dual = -best_slope / metric
    steps = 0
    stalled = 0
    previous = best
    while steps < max_steps and best < cutoff:
        steps += 1
        right_side = metric * (guess - dual) - linear
        solved = np.dot(inverse, right_side)
        product = right_side - metric * solved
        slope = product + linear
        value = -0.5 * np.dot(solved, product) + smallest_sum(slope, count)
        if rises(value, linearisation_rounding(smooth, linear, solved, slope, count), best, error):
            # The product above rests on an inverse, and is as inexact; a bound needs a true one.
            product = np.dot(smooth, solved)
            slope = product + linear
            value = -0.5 * np.dot(solved, product) + smallest_sum(slope, count)
            blur = linearisation_rounding(smooth, linear, solved, slope, count)
            if rises(value, blur, best, error):
                best, error = value, blur
                copy_into(best_point, solved)
                copy_into(best_slope, slope)
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * guess
        project_capped_simplex(relaxed + dual, metric, count, guess)
        dual += relaxed - guess
        if steps % NEWTON_PERIOD == 0 or steps == max_steps:
            places_of(guess, place)
            best, error, done = climb_simplex(
                smooth, linear, count, place, best, best_point, best_slope, cutoff
            )
            scale = cutoff - best if cutoff < np.inf else abs(best)
            stalled = stalled + 1 if best - previous < tolerance * scale else 0
            previous = best
            if done or stalled >= PATIENCE:
                break
    return best, best_point, best_slope, steps


@entry(VECTOR)
@compiled
def shift_slopes(point: FloatArray) -> FloatArray:
    """Supergradient of the bound in the shift, ``1/2 y_i (1 - y_i)``, with a floor."""
    slopes = np.empty(point.size)
    for i in range(point.size):
        inside = min(max(point[i], 0.0), 1.0)
        slopes[i] = 0.5 * inside * (1.0 - inside)
    return np.maximum(slopes, max(SLOPE_FLOOR * slopes.max(), 1e-12))
