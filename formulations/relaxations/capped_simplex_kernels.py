"""Numba kernels of the continuous relaxation of the selection program after a diagonal shift.

On binary ``y`` the form ``1/2 y.A y + c.y`` equals ``1/2 y.B y + q.y`` with ``B = A - diag(u)`` and
``q = c + u / 2``. With ``B`` positive semidefinite the relaxation is convex over the capped simplex
``{0 <= y <= 1, sum y = k}``, and every ``y`` gives a lower bound: with ``r = B y + q``,

    optimum >= -1/2 y.B y + (sum of the k smallest r_i).

Source of the shift: Hammer & Rubin (1970); Billionnet, Elloumi & Plateau (2009).
"""

from __future__ import annotations

import numpy as np

from formulations.compiled import compiled
from formulations.factorisation import cholesky_factor, solve_factored
from formulations.problem import FloatArray

NEWTON_PERIOD = 4
"""ADMM steps between two Newton steps on the active sets."""
WARM_NEWTON_STEPS = 4
"""Newton steps tried from the warm start before any ADMM step."""
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


@compiled
def smallest_sum(values: FloatArray, count: int) -> float:
    """Sum of the `count` smallest of `values`."""
    n = values.size
    if count <= 0:
        return 0.0
    if count >= n:
        return float(values.sum())
    return float(np.partition(values, count - 1)[:count].sum())


@compiled
def newton_simplex(
    smooth: FloatArray, linear: FloatArray, count: int, guess: FloatArray, point: FloatArray
) -> tuple[bool, float]:
    """Minimiser with the entries of `guess` at 0 or 1 held there and the sum held at `count`.

    Returns whether `point` was written, and the relaxation's value there if it is feasible, else
    infinity. One linear system in the entries strictly inside.
    """
    n = guess.size
    inside = np.nonzero((guess > ON_BOUND) & (guess < 1.0 - ON_BOUND))[0]
    size = inside.size
    if size < 2:
        return False, np.inf
    rest = float(count)
    for i in range(n):
        point[i] = 1.0 if guess[i] >= 1.0 - ON_BOUND else 0.0
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
        return False, np.inf
    particular = solve_factored(factor, target)
    along = solve_factored(factor, np.ones(size))
    multiplier = (rest - particular.sum()) / along.sum()
    feasible = True
    for p in range(size):
        value = particular[p] + multiplier * along[p]
        if not np.isfinite(value):
            return False, np.inf
        feasible = feasible and -1e-9 <= value <= 1.0 + 1e-9
        point[inside[p]] = value
    if not feasible:
        return True, np.inf
    return True, 0.5 * np.dot(point, np.dot(smooth, point)) + np.dot(linear, point)


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

    Newton steps on the active sets from the start; then over-relaxed ADMM in the norm of `metric`
    with Newton steps between. Stops when the bound reaches `cutoff`, when primal and dual values
    agree to `tolerance` times the distance to the cutoff, or after `max_steps`.

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
    product = np.dot(smooth, start)
    best_point = start.copy()
    best_slope = product + linear
    best = -0.5 * np.dot(start, product) + smallest_sum(best_slope, count)
    guess = np.empty(n)
    newton = start.copy()
    for _ in range(WARM_NEWTON_STEPS):
        if best >= cutoff:
            return best, best_point, best_slope, 0
        project_capped_simplex(newton - (product + linear) / metric, metric, count, guess)
        solved_sets, primal = newton_simplex(smooth, linear, count, guess, newton)
        if not solved_sets:
            break
        product = np.dot(smooth, newton)
        value = -0.5 * np.dot(newton, product) + smallest_sum(product + linear, count)
        improved = value > best
        if improved:
            best = value
            best_point[:] = newton
            best_slope = product + linear
        scale = cutoff - best if cutoff < np.inf else abs(best)
        if primal - best < tolerance * scale:
            return best, best_point, best_slope, 0
        if not improved:
            break
    shifted = smooth.copy()
    for i in range(n):
        shifted[i, i] += metric[i]
    inverse = np.linalg.inv(shifted)
    project_capped_simplex(best_point, metric, count, guess)
    dual = -best_slope / metric
    steps = 0
    while steps < max_steps and best < cutoff:
        steps += 1
        right_side = metric * (guess - dual) - linear
        solved = np.dot(inverse, right_side)
        product = right_side - metric * solved
        value = -0.5 * np.dot(solved, product) + smallest_sum(product + linear, count)
        if value > best:
            best = value
            best_point[:] = solved
            best_slope = product + linear
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * guess
        project_capped_simplex(relaxed + dual, metric, count, guess)
        dual += relaxed - guess
        if steps % NEWTON_PERIOD == 2 or steps == max_steps:
            solved_sets, primal = newton_simplex(smooth, linear, count, guess, newton)
            if not solved_sets:
                continue
            product = np.dot(smooth, newton)
            value = -0.5 * np.dot(newton, product) + smallest_sum(product + linear, count)
            if value > best:
                best = value
                best_point[:] = newton
                best_slope = product + linear
            scale = cutoff - best if cutoff < np.inf else abs(best)
            if primal - best < tolerance * scale:
                break
    return best, best_point, best_slope, steps


@compiled
def shift_slopes(point: FloatArray) -> FloatArray:
    """Supergradient of the bound in the shift, ``1/2 y_i (1 - y_i)``, with a floor."""
    slopes = np.empty(point.size)
    for i in range(point.size):
        inside = min(max(point[i], 0.0), 1.0)
        slopes[i] = 0.5 * inside * (1.0 - inside)
    return np.maximum(slopes, max(SLOPE_FLOOR * slopes.max(), 1e-12))
