"""Numba kernels of the perspective relaxation of the joint program with a diagonal split.

With ``M = Q + D``, ``D`` diagonal and positive, ``Q`` positive semidefinite, the relaxation is

    min_u  1/2 u.Q u - l.u + 1/2 min { sum_i D_i u_i^2 / z_i : 0 <= z <= 1, sum z <= s }

and the last term is half the squared s-support norm of ``t = sqrt(D) u`` (Argyriou, Foygel & Srebro
2012). Every ``u`` gives a lower bound: with ``g = l - Q u``,

    1/2 u.Q u - l.v <= ...  so that  optimum >= -1/2 u.Q u - 1/2 (sum of the s largest g_i^2 / D_i).
"""

from __future__ import annotations

import numpy as np

from formulations.compiled import compiled
from formulations.factorisation import cholesky_factor, solve_factored
from formulations.problem import FloatArray, IntArray

NEWTON_PERIOD = 4
"""ADMM steps between two Newton steps on the active sets."""
WARM_NEWTON_STEPS = 4
"""Newton steps tried from the warm start before any ADMM step."""
OVER_RELAXATION = 1.7
"""Over-relaxation of ADMM, in (1, 2)."""


@compiled
def prox_support_norm(
    point: FloatArray, size: int, step: float, order: IntArray, image: FloatArray
) -> tuple[int, int]:
    """Proximal map of ``step / 2`` times the squared `size`-support norm, by one sort.

    `order` receives the indices by decreasing magnitude. Of them, the first ``left`` are kept whole
    (``z = 1``), those in ``[left, right)`` share the rest (``0 < z < 1``), the others are zero;
    ``(left, right)`` is returned. O(n log n).
    """
    n = point.size
    if size >= n:
        for i in range(n):
            image[i] = point[i] / (1.0 + step)
            order[i] = i
        return n, n
    magnitude = np.abs(point)
    order[:] = np.argsort(-magnitude)
    if size <= 0:
        image[:] = 0.0
        return 0, 0
    # Moreau: prox(x) = x - step * v with v the prox of the conjugate, half the sum of the s
    # largest squares; v is pooled where shrinking the first s would break the order.
    shrink = 1.0 + 1.0 / step
    left, right = size, size
    level = 0.0
    last, following = magnitude[order[size - 1]], magnitude[order[size]]
    if last / shrink < following:
        left, right = size - 1, size + 1
        total, weight = last + following, shrink + 1.0
        level = total / weight
        moved = True
        while moved:
            moved = False
            while left > 0 and magnitude[order[left - 1]] / shrink < level:
                left -= 1
                total += magnitude[order[left]]
                weight += shrink
                level = total / weight
                moved = True
            while right < n and magnitude[order[right]] > level:
                total += magnitude[order[right]]
                weight += 1.0
                right += 1
                level = total / weight
                moved = True
    for q in range(n):
        i = order[q]
        if q < left:
            image[i] = point[i] / (1.0 + step)
        elif q < right:
            image[i] = magnitude[i] - level if point[i] >= 0.0 else level - magnitude[i]
        else:
            image[i] = 0.0
    return left, right


@compiled
def largest_sum(values: FloatArray, count: int) -> float:
    """Sum of the `count` largest of `values`."""
    n = values.size
    if count <= 0:
        return 0.0
    if count >= n:
        return float(values.sum())
    return float(np.partition(values, n - count)[n - count :].sum())


@compiled
def dual_value(u: FloatArray, product: FloatArray, linear: FloatArray, split: FloatArray, size: int) -> float:
    """The lower bound that `u` proves; `product` = ``Q u``."""
    residual = linear - product
    return -0.5 * float(np.dot(u, product)) - 0.5 * largest_sum(residual * residual / split, size)


@compiled
def newton_point(
    smooth: FloatArray,
    linear: FloatArray,
    direction: FloatArray,
    order: IntArray,
    left: int,
    right: int,
    size: int,
    point: FloatArray,
) -> tuple[bool, float]:
    """Minimiser for fixed active sets, all in scaled coordinates (``D = I``).

    The first `left` of `order` are whole, those up to `right` share ``size - left`` units with the
    signs of `direction`, the others are zero. One linear system of `right` unknowns.

    Returns
    -------
    solved : bool
        Whether `point` was written.
    primal : float
        Its value in the relaxation if the shares it implies are in [0, 1], else infinity.
    """
    if right == 0 or size - left <= 0 < right - left:
        return False, np.inf
    system = np.empty((right, right))
    target = np.empty(right)
    sign = np.zeros(right)
    share = 1.0 / (size - left) if right > left else 0.0
    for p in range(left, right):
        sign[p] = 1.0 if direction[order[p]] >= 0.0 else -1.0
    for p in range(right):
        i = order[p]
        target[p] = linear[i]
        for q in range(p + 1):
            system[p, q] = smooth[i, order[q]] + share * sign[p] * sign[q]
        system[p, p] += 1.0 if p < left else 1e-13 * (1.0 + smooth[i, i])
    factor = np.empty((right, right))
    if not cholesky_factor(system, factor):
        return False, np.inf
    solution = solve_factored(factor, target)
    point[:] = 0.0
    for p in range(right):
        point[order[p]] = solution[p]
    level = share * np.dot(sign, solution)
    for p in range(left, right):
        part = sign[p] * solution[p]
        if part < -1e-9 * level or part > level * (1.0 + 1e-9):
            return True, np.inf
    return True, -0.5 * np.dot(target, solution)


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

    A few Newton steps on the active sets that the start suggests often end a warm solve. Otherwise
    over-relaxed ADMM on the splitting quadratic / support norm names the sets, and Newton jumps to
    the optimum once they are right. Stops when the bound reaches `cutoff`, when primal and dual
    values agree to `tolerance` times the distance to the cutoff, or after `max_steps`.
    At most one inverse, O(n^3), then O(n^2) a step.

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
    order = np.empty(n, dtype=np.int64)
    shrunk = np.empty(n)
    newton = start.copy()
    for _ in range(WARM_NEWTON_STEPS):
        if best >= cutoff:
            return best, best_point, best_residual, 0
        left, right = prox_support_norm(newton + (linear - product), size, 1.0, order, shrunk)
        solved_sets, primal = newton_point(smooth, linear, shrunk, order, left, right, size, newton)
        if not solved_sets:
            break
        product = np.dot(smooth, newton)
        value = dual_value(newton, product, linear, ones, size)
        improved = value > best
        if improved:
            best = value
            best_point[:] = newton
            best_residual = linear - product
        scale = cutoff - best if cutoff < np.inf else abs(best)
        if primal - best < tolerance * scale:
            return best, best_point, best_residual, 0
        if not improved:
            break
    shifted = smooth.copy()
    for i in range(n):
        shifted[i, i] += 1.0
    inverse = np.linalg.inv(shifted)
    shrunk[:] = best_point
    dual = best_residual.copy()
    steps = 0
    while steps < max_steps and best < cutoff:
        steps += 1
        right_side = linear + shrunk - dual
        solved = np.dot(inverse, right_side)
        product = right_side - solved
        value = dual_value(solved, product, linear, ones, size)
        if value > best:
            best = value
            best_point[:] = solved
            best_residual = linear - product
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * shrunk
        left, right = prox_support_norm(relaxed + dual, size, 1.0, order, shrunk)
        dual += relaxed - shrunk
        if steps % NEWTON_PERIOD == 2 or steps == max_steps:
            solved_sets, primal = newton_point(smooth, linear, shrunk, order, left, right, size, newton)
            if not solved_sets:
                continue
            product = np.dot(smooth, newton)
            value = dual_value(newton, product, linear, ones, size)
            if value > best:
                best = value
                best_point[:] = newton
                best_residual = linear - product
            scale = cutoff - best if cutoff < np.inf else abs(best)
            if primal - best < tolerance * scale:
                break
    return best, best_point, best_residual, steps


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
