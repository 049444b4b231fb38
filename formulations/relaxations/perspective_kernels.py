"""Numba kernels of the perspective relaxation of the joint program with a diagonal split.

With ``M = Q + D``, ``D`` diagonal and positive, ``Q`` positive semidefinite, the relaxation is

    min_u  1/2 u.Q u - l.u + 1/2 min { sum_i D_i u_i^2 / z_i : 0 <= z <= 1, sum z <= s }

and the last term is half the squared s-support norm of ``t = sqrt(D) u`` (Argyriou, Foygel & Srebro
2012). Every ``u`` gives a lower bound: with ``g = l - Q u``,

    optimum >= -1/2 u.Q u - 1/2 (sum of the s largest g_i^2 / D_i).

Where so many are kept in each of several cells, norm and sum are those of each cell, added up; `size` is a
number or `formulations.support.Cells`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from formulations.cells import cell_range, n_cells
from formulations.compiled import INDICES, INTEGER, MATRIX, REAL, SIZE, VECTOR, BySize, compiled, entry
from formulations.factorisation import cholesky_factor, solve_factored
from formulations.problem import FloatArray, IntArray
from formulations.relaxations.ascent import (
    BEST,
    BLUR,
    CLIMBING,
    ENDED,
    GIVEN_UP,
    MISSES,
    NEWTON_MISSES,
    ONGOING,
    OPTIMAL,
    OVER_RELAXATION,
    PHASE,
    SPLITTING,
    STEPS,
    TO_THE_END,
    end_climb,
    end_step,
    rises,
)
from formulations.relaxations.support_norm import copy_into, held_sum, prox_support_norm
from formulations.support import Size

ROUNDOFF = 1.2e-16
"""A little above the unit roundoff of float64."""
ZERO = 0
SHARED = 1
WHOLE = 2


@compiled
def dual_value(
    u: FloatArray, product: FloatArray, linear: FloatArray, split: FloatArray, size: Size
) -> float:
    """Return the lower bound that `u` proves; `product` = ``Q u``."""
    residual = linear - product
    return -0.5 * float(np.dot(u, product)) - 0.5 * held_sum(residual * residual / split, size)


@compiled
def dual_rounding(
    smooth: FloatArray, linear: FloatArray, point: FloatArray, residual: FloatArray, size: Size
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
    return 1.01 * gamma * (reach * reach + held_sum(terms, size))


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
    size: Size,
    place: IntArray,
    sign: FloatArray,
    point: FloatArray,
) -> tuple[bool, FloatArray]:
    """Minimiser for fixed active sets, in scaled coordinates (``D = I``).

    WHOLE entries have ``z = 1``, SHARED ones split what is left of `size` and keep their `sign`, the
    others are zero. Returns whether `point` was written, and the level of each cell: the magnitude of the
    residual common to its shared entries. One linear system in the non-zeros.
    """
    whole = np.nonzero(place == WHOLE)[0]
    shared = np.nonzero(place == SHARED)[0]
    left, right = whole.size, whole.size + shared.size
    levels = np.zeros(n_cells(size))
    shares = np.zeros(n_cells(size))
    # Where the shared entries of a cell begin among all of them.
    begin = np.zeros(n_cells(size) + 1, dtype=np.int64)
    for cell in range(n_cells(size)):
        first, stop, units = cell_range(size, cell, place.size)
        begin[cell + 1] = begin[cell]
        for i in range(first, stop):
            units -= 1 if place[i] == WHOLE else 0
            begin[cell + 1] += 1 if place[i] == SHARED else 0
        if units < 0 or (units == 0) != (begin[cell + 1] == begin[cell]):
            return False, levels
        shares[cell] = 1.0 / units if units > 0 else 0.0
    if right == 0:
        return False, levels
    order = np.concatenate((whole, shared))
    system = np.empty((right, right))
    target = np.empty(right)
    cell = 0
    for p in range(right):
        i = order[p]
        source = smooth[i]
        target[p] = linear[i]
        if p < left:
            for q in range(p + 1):
                system[p, q] = source[order[q]]
            system[p, p] += 1.0
        else:
            while p - left >= begin[cell + 1]:
                cell += 1
            share = shares[cell]
            own = left + begin[cell]
            for q in range(own):
                system[p, q] = source[order[q]]
            for q in range(own, p + 1):
                system[p, q] = source[order[q]] + share * sign[i] * sign[order[q]]
            system[p, p] += 1e-13 * (1.0 + source[i])
    factor = np.empty((right, right))
    if not cholesky_factor(system, factor):
        return False, levels
    solution = solve_factored(factor, target)
    point[:] = 0.0
    for p in range(right):
        point[order[p]] = solution[p]
    finite = True
    for cell in range(n_cells(size)):
        for p in range(left + begin[cell], left + begin[cell + 1]):
            levels[cell] += shares[cell] * sign[order[p]] * solution[p]
        finite = finite and bool(np.isfinite(levels[cell]))
    return finite, levels


@compiled
def move_support(
    point: FloatArray, residual: FloatArray, level: float, size: int, place: IntArray, sign: FloatArray
) -> int:
    """Primal-dual active-set move between whole, shared and zero entries of one cell; how many moved."""
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
def move_supports(
    point: FloatArray, residual: FloatArray, levels: FloatArray, size: Size, place: IntArray, sign: FloatArray
) -> int:
    """`move_support` in each cell; how many moved."""
    moved = 0
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, point.size)
        moved += move_support(
            point[first:stop],
            residual[first:stop],
            levels[cell],
            count,
            place[first:stop],
            sign[first:stop],
        )
    return moved


@compiled
def name_places(
    point: FloatArray, size: Size, order: IntArray, image: FloatArray, place: IntArray, sign: FloatArray
) -> None:
    """Active sets of the proximal map of ``1/2`` the squared support norm at `point`."""
    place[:] = ZERO
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, point.size)
        left, right = prox_support_norm(point[first:stop], count, 1.0, order[first:stop], image[first:stop])
        for q in range(right):
            i = first + order[first + q]
            place[i] = WHOLE if q < left else SHARED
            sign[i] = 1.0 if image[i] >= 0.0 else -1.0


class PerspectiveAscent(NamedTuple):
    """State of an ascent of the dual bound, in scaled coordinates; its arrays are written in place.

    Attributes
    ----------
    smooth, linear, size
        ``Q``, ``l`` and the number of weights to keep, of all or in each cell.
    cutoff : float
        A bound that is good enough.
    tolerance : float
        Share of the distance to the cutoff that ADMM has to gain between two climbs.
    max_steps : int
        Most steps of ADMM.
    point, residual : (n,) float64 arrays
        The point that proves the best bound, and ``l - Q t`` there.
    shrunk, dual : (n,) float64 arrays
        Of ADMM.
    order, place : (n,) int64 arrays
    sign : (n,) float64 array
        Active sets.
    figures : (3,) float64 array
        `ascent.BEST` and its neighbours.
    counts : (4,) int64 array
        `ascent.PHASE` and its neighbours.
    """

    smooth: FloatArray
    linear: FloatArray
    size: Size
    cutoff: float
    tolerance: float
    max_steps: int
    point: FloatArray
    residual: FloatArray
    shrunk: FloatArray
    dual: FloatArray
    order: IntArray
    place: IntArray
    sign: FloatArray
    figures: FloatArray
    counts: IntArray


ASCENT = BySize(
    *(
        types.NamedTuple(  # type: ignore[no-untyped-call]
            (
                *(MATRIX, VECTOR, size, REAL, REAL, INTEGER),
                *(VECTOR, VECTOR, VECTOR, VECTOR, INDICES, INDICES, VECTOR, VECTOR, INDICES),
            ),
            PerspectiveAscent,
        )
        for size in SIZE
    )
)
"""Its type in a kernel."""


@compiled
def newton_step(ascent: PerspectiveAscent) -> int:
    """One Newton step on the active sets, which move on from there; what becomes of the climb.

    Point and residual are replaced when the bound rises.
    """
    newton = np.empty(ascent.linear.size)
    solved, levels = newton_support(
        ascent.smooth, ascent.linear, ascent.size, ascent.place, ascent.sign, newton
    )
    if not solved:
        return GIVEN_UP
    product = np.dot(ascent.smooth, newton)
    residual = ascent.linear - product
    value = dual_value(newton, product, ascent.linear, np.ones(newton.size), ascent.size)
    ascent.counts[MISSES] += 1
    blur = dual_rounding(ascent.smooth, ascent.linear, newton, residual, ascent.size)
    if rises(ascent.figures, value, blur):
        ascent.counts[MISSES] = 0
        ascent.figures[BEST], ascent.figures[BLUR] = value, blur
        copy_into(ascent.point, newton)
        copy_into(ascent.residual, residual)
    if ascent.figures[BEST] >= ascent.cutoff:
        return OPTIMAL
    if move_supports(newton, residual, levels, ascent.size, ascent.place, ascent.sign) == 0:
        return OPTIMAL
    return ONGOING if ascent.counts[MISSES] < NEWTON_MISSES else GIVEN_UP


@compiled
def admm_step(ascent: PerspectiveAscent, inverse: FloatArray) -> None:
    """One step of over-relaxed ADMM on the splitting quadratic / support norm; `inverse` = ``(Q + I)^-1``."""
    linear, shrunk, dual, ones = ascent.linear, ascent.shrunk, ascent.dual, np.ones(ascent.linear.size)
    right_side = linear + shrunk - dual
    solved = np.dot(inverse, right_side)
    product = right_side - solved
    residual = linear - product
    value = dual_value(solved, product, linear, ones, ascent.size)
    blur = dual_rounding(ascent.smooth, linear, solved, residual, ascent.size)
    if rises(ascent.figures, value, blur):
        # The product above rests on an inverse, and is as inexact as that; a bound needs a true one.
        product = np.dot(ascent.smooth, solved)
        residual = linear - product
        value = dual_value(solved, product, linear, ones, ascent.size)
        blur = dual_rounding(ascent.smooth, linear, solved, residual, ascent.size)
        if rises(ascent.figures, value, blur):
            ascent.figures[BEST], ascent.figures[BLUR] = value, blur
            copy_into(ascent.point, solved)
            copy_into(ascent.residual, residual)
    relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * shrunk
    target = relaxed + dual
    name_places(target, ascent.size, ascent.order, shrunk, ascent.place, ascent.sign)
    dual += relaxed - shrunk


@entry(MATRIX, VECTOR, SIZE, VECTOR, REAL, INTEGER, REAL)
@compiled
def begin_perspective(
    smooth: FloatArray,
    linear: FloatArray,
    size: Size,
    start: FloatArray,
    cutoff: float,
    max_steps: int,
    tolerance: float,
) -> PerspectiveAscent:
    """State before the first step, with the bound that `start` proves; O(n^2)."""
    n = linear.size
    product = np.dot(smooth, start)
    residual = linear - product
    ascent = PerspectiveAscent(
        smooth,
        linear,
        size,
        cutoff,
        tolerance,
        max_steps,
        start.copy(),
        residual,
        np.empty(n),
        np.empty(n),
        np.empty(n, dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.ones(n),
        np.empty(3),
        np.zeros(4, dtype=np.int64),
    )
    ascent.figures[BEST] = dual_value(start, product, linear, np.ones(n), size)
    ascent.figures[BLUR] = dual_rounding(smooth, linear, start, residual, size)
    if ascent.figures[BEST] >= cutoff:
        ascent.counts[PHASE] = ENDED
    else:
        name_places(start + residual, size, ascent.order, ascent.shrunk, ascent.place, ascent.sign)
    return ascent


@entry(ASCENT, MATRIX, INTEGER)
@compiled
def advance_perspective(ascent: PerspectiveAscent, inverse: FloatArray, work: int) -> None:
    """At most `work` steps of Newton's method or ADMM; fewer at the end, or where `inverse` is wanted.

    A primal-dual active-set method from the sets of the start; where it cycles, ADMM proposes other sets.
    Ends when the bound reaches the cutoff, at the optimum, when ADMM gains too little, or after
    `max_steps` of it. An empty `inverse` is one that has not been needed so far.
    """
    counts = ascent.counts
    for _ in range(work):
        if counts[PHASE] == CLIMBING:
            outcome = newton_step(ascent)
            if outcome == ONGOING:
                continue
            if counts[STEPS] == 0:
                copy_into(ascent.shrunk, ascent.point)
                copy_into(ascent.dual, ascent.residual)
            end_climb(ascent.figures, counts, outcome, ascent.cutoff, ascent.tolerance, ascent.max_steps)
        elif counts[PHASE] == SPLITTING and inverse.size > 0:
            admm_step(ascent, inverse)
            end_step(ascent.figures, counts, ascent.cutoff, ascent.max_steps)
        else:
            return


@entry(ASCENT)
@compiled
def invert_perspective(ascent: PerspectiveAscent) -> FloatArray:
    """``(Q + I)^-1`` for the steps of ADMM; O(n^3)."""
    shifted = ascent.smooth.copy()
    for i in range(shifted.shape[0]):
        shifted[i, i] += 1.0
    return np.linalg.inv(shifted)  # type: ignore[return-value]


@entry(MATRIX, VECTOR, SIZE, VECTOR, REAL, INTEGER, REAL)
@compiled
def solve_perspective(
    smooth: FloatArray,
    linear: FloatArray,
    size: Size,
    start: FloatArray,
    cutoff: float,
    max_steps: int,
    tolerance: float,
) -> tuple[float, FloatArray, FloatArray, int]:
    """Maximise the dual bound in scaled coordinates ``t = sqrt(D) u`` (so ``D = I``), to its end.

    Returns
    -------
    bound : float
    point : (n,) float64 array
        The point that proves the bound.
    residual : (n,) float64 array
        ``l - Q t`` there.
    steps : int
    """
    ascent = begin_perspective(smooth, linear, size, start, cutoff, max_steps, tolerance)
    advance_perspective(ascent, np.empty((0, 0)), TO_THE_END)
    if ascent.counts[PHASE] != ENDED:
        advance_perspective(ascent, invert_perspective(ascent), TO_THE_END)
    return ascent.figures[BEST], ascent.point, ascent.residual, ascent.counts[STEPS]


@entry(VECTOR, VECTOR, VECTOR, SIZE)
@compiled
def split_slopes(u: FloatArray, point: FloatArray, residual: FloatArray, size: Size) -> FloatArray:
    """Supergradient of the bound in the split, ``1/2 u_i^2 (1 / z_i - 1)``."""
    m = u.size
    order = np.empty(m, dtype=np.int64)
    image = np.empty(m)
    both = point + residual
    slopes = np.zeros(m)
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, m)
        left, right = prox_support_norm(both[first:stop], count, 1.0, order[first:stop], image[first:stop])
        level = 0.0
        for q in range(left, right):
            level += abs(image[first + order[first + q]])
        level /= max(count - left, 1)
        for q in range(left, right):
            i = first + order[first + q]
            slopes[i] = 0.5 * u[i] * u[i] * max(level / max(abs(image[i]), 1e-12 * level) - 1.0, 0.0)
    return slopes
