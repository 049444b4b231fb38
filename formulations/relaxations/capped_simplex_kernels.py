"""Numba kernels of the continuous relaxation of the selection program after a diagonal shift.

On binary ``y`` the form ``1/2 y.A y + c.y`` equals ``1/2 y.B y + q.y`` with ``B = A - diag(u)`` and
``q = c + u / 2``. With ``B`` positive semidefinite the relaxation is convex over the capped simplex
``{0 <= y <= 1, sum y = k}``, and every ``y`` gives a lower bound: with ``r = B y + q``,

    optimum >= -1/2 y.B y + (sum of the k smallest r_i).

Where so many are pruned in each of several cells, each cell has its simplex and its sum; a size is a number
or `formulations.support.Cells`. Source of the shift: Hammer & Rubin (1970); Billionnet, Elloumi & Plateau
(2009).
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
from formulations.relaxations.perspective_kernels import ROUNDOFF
from formulations.relaxations.support_norm import copy_into, held_sum
from formulations.support import Size

AT_ZERO = 0
AT_ONE = 1
INSIDE = 2
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


@entry(VECTOR, VECTOR, SIZE, VECTOR)
@compiled
def project_simplices(point: FloatArray, metric: FloatArray, size: Size, image: FloatArray) -> None:
    """`project_capped_simplex` in each cell."""
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, point.size)
        project_capped_simplex(point[first:stop], metric[first:stop], count, image[first:stop])


@entry(VECTOR, SIZE)
@compiled
def smallest_sum(values: FloatArray, count: Size) -> float:
    """Sum of the `count` smallest of `values`, or of so many in each cell."""
    return -held_sum(-values, count)


@compiled
def linearisation_rounding(
    smooth: FloatArray, linear: FloatArray, point: FloatArray, slope: FloatArray, count: Size
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
    both = reach + held_sum(root, count)
    return 1.01 * gamma * (reach * reach + held_sum(terms, count) + both * both)


@compiled
def newton_simplex(
    smooth: FloatArray, linear: FloatArray, count: Size, place: IntArray, point: FloatArray
) -> tuple[bool, FloatArray]:
    """Minimiser with the entries placed at 0 or 1 held there and the sum of each cell held at `count`.

    Returns whether `point` was written, and the multiplier of each sum: the slope common to the
    entries inside, NaN in a cell that has none. One linear system in those, one more in the sums.
    """
    inside = np.nonzero(place == INSIDE)[0]
    size = inside.size
    multipliers = np.zeros(n_cells(count))
    if size == 0:
        return False, multipliers
    possible, rest, begin = hold_places(count, place, point)
    if not possible:
        return False, multipliers
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
        return False, multipliers
    particular = solve_factored(factor, target)
    if n_cells(count) == 1:
        along = solve_factored(factor, np.ones(size))
        weight = (rest[0] - particular.sum()) / along.sum()
        if not np.isfinite(weight):
            return False, multipliers
        for p in range(size):
            point[inside[p]] = particular[p] + weight * along[p]
        multipliers[0] = weight
        return True, multipliers
    solved = weigh_cells(factor, particular, rest, begin, multipliers)
    for p in range(size):
        point[inside[p]] = particular[p]
    return solved, multipliers


@compiled
def hold_places(count: Size, place: IntArray, point: FloatArray) -> tuple[bool, FloatArray, IntArray]:
    """Write 0 and 1 where they are held; what is left of each sum, and where each cell's inside begins.

    Comes back False if something is left of the sum of a cell that has nothing inside.
    """
    possible = True
    rest = np.empty(n_cells(count))
    begin = np.zeros(n_cells(count) + 1, dtype=np.int64)
    for cell in range(n_cells(count)):
        first, stop, chosen = cell_range(count, cell, place.size)
        rest[cell] = float(chosen)
        begin[cell + 1] = begin[cell]
        for i in range(first, stop):
            point[i] = 1.0 if place[i] == AT_ONE else 0.0
            rest[cell] -= point[i]
            begin[cell + 1] += 1 if place[i] == INSIDE else 0
        possible = possible and (begin[cell + 1] > begin[cell] or rest[cell] == 0.0)
    return possible, rest, begin


@compiled
def weigh_cells(
    factor: FloatArray, particular: FloatArray, rest: FloatArray, begin: IntArray, multipliers: FloatArray
) -> bool:
    """Add to `particular` what brings the sum of each cell to its rest, and name the multipliers.

    ``begin[c]`` is where cell ``c`` begins in `particular`; one that is empty has the multiplier NaN.
    """
    size = particular.size
    cells = np.nonzero(begin[1:] > begin[:-1])[0]
    along = np.empty((cells.size, size))
    system = np.empty((cells.size, cells.size))
    lacking = np.empty(cells.size)
    for p in range(cells.size):
        first, stop = begin[cells[p]], begin[cells[p] + 1]
        ones = np.zeros(size)
        ones[first:stop] = 1.0
        along[p] = solve_factored(factor, ones)
        lacking[p] = rest[cells[p]] - particular[first:stop].sum()
    for p in range(cells.size):
        for q in range(cells.size):
            system[p, q] = along[q, begin[cells[p]] : begin[cells[p] + 1]].sum()
    small = np.empty((cells.size, cells.size))
    if not cholesky_factor(system, small):
        return False
    weights = solve_factored(small, lacking)
    multipliers[:] = np.nan
    for p in range(cells.size):
        if not np.isfinite(weights[p]):
            return False
        multipliers[cells[p]] = weights[p]
        for i in range(size):
            particular[i] += weights[p] * along[p, i]
    return True


@compiled
def move_places(point: FloatArray, slope: FloatArray, multiplier: float, place: IntArray) -> int:
    """Primal-dual active-set move in one cell: hold what left the box, free what wants to enter; how many."""
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
def move_cells(
    point: FloatArray, slope: FloatArray, multipliers: FloatArray, size: Size, place: IntArray
) -> int:
    """`move_places` in each cell; how many moved.

    A cell with nothing inside has no multiplier: it is taken from between what is at 1 and what is at 0.
    """
    moved = 0
    for cell in range(n_cells(size)):
        first, stop, _ = cell_range(size, cell, point.size)
        multiplier = multipliers[cell]
        if np.isnan(multiplier):
            highest, lowest = -np.inf, np.inf
            for i in range(first, stop):
                if place[i] == AT_ONE:
                    highest = max(highest, slope[i])
                else:
                    lowest = min(lowest, slope[i])
            if not highest > lowest:
                continue
            multiplier = 0.5 * (highest + lowest)
        moved += move_places(point[first:stop], slope[first:stop], multiplier, place[first:stop])
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


class SimplexAscent(NamedTuple):
    """State of an ascent of the linearisation bound; its arrays are written in place.

    Attributes
    ----------
    smooth, linear, n_prune
        ``B``, ``q`` and the number of weights to prune, of all or in each cell.
    metric : (n,) float64 array
        ADMM works in its norm.
    cutoff : float
        A bound that is good enough.
    tolerance : float
        Share of the distance to the cutoff that ADMM has to gain between two climbs.
    max_steps : int
        Most steps of ADMM.
    point, slope : (n,) float64 arrays
        The point that proves the best bound, and ``B y + q`` there.
    guess, dual : (n,) float64 arrays
        Of ADMM.
    place : (n,) int64 array
        Active sets.
    figures : (3,) float64 array
        `ascent.BEST` and its neighbours.
    counts : (4,) int64 array
        `ascent.PHASE` and its neighbours.
    """

    smooth: FloatArray
    linear: FloatArray
    n_prune: Size
    metric: FloatArray
    cutoff: float
    tolerance: float
    max_steps: int
    point: FloatArray
    slope: FloatArray
    guess: FloatArray
    dual: FloatArray
    place: IntArray
    figures: FloatArray
    counts: IntArray


ASCENT = BySize(
    *(
        types.NamedTuple(  # type: ignore[no-untyped-call]
            (
                *(MATRIX, VECTOR, size, VECTOR, REAL, REAL, INTEGER),
                *(VECTOR, VECTOR, VECTOR, VECTOR, INDICES, VECTOR, INDICES),
            ),
            SimplexAscent,
        )
        for size in SIZE
    )
)
"""Its type in a kernel."""


@compiled
def newton_step(ascent: SimplexAscent) -> int:
    """One Newton step on the active sets, which move on from there; what becomes of the climb.

    Point and slope are replaced when the bound rises.
    """
    newton = np.empty(ascent.linear.size)
    solved, multipliers = newton_simplex(ascent.smooth, ascent.linear, ascent.n_prune, ascent.place, newton)
    if not solved:
        return GIVEN_UP
    product = np.dot(ascent.smooth, newton)
    slope = product + ascent.linear
    value = -0.5 * np.dot(newton, product) + smallest_sum(slope, ascent.n_prune)
    ascent.counts[MISSES] += 1
    blur = linearisation_rounding(ascent.smooth, ascent.linear, newton, slope, ascent.n_prune)
    if rises(ascent.figures, value, blur):
        ascent.counts[MISSES] = 0
        ascent.figures[BEST], ascent.figures[BLUR] = value, blur
        copy_into(ascent.point, newton)
        copy_into(ascent.slope, slope)
    if ascent.figures[BEST] >= ascent.cutoff:
        return OPTIMAL
    if move_cells(newton, slope, multipliers, ascent.n_prune, ascent.place) == 0:
        return OPTIMAL
    return ONGOING if ascent.counts[MISSES] < NEWTON_MISSES else GIVEN_UP


@compiled
def admm_step(ascent: SimplexAscent, inverse: FloatArray) -> None:
    """One step of over-relaxed ADMM; `inverse` = ``(B + diag(metric))^-1``."""
    linear, metric, guess, dual = ascent.linear, ascent.metric, ascent.guess, ascent.dual
    right_side = metric * (guess - dual) - linear
    solved = np.dot(inverse, right_side)
    product = right_side - metric * solved
    slope = product + linear
    value = -0.5 * np.dot(solved, product) + smallest_sum(slope, ascent.n_prune)
    blur = linearisation_rounding(ascent.smooth, linear, solved, slope, ascent.n_prune)
    if rises(ascent.figures, value, blur):
        # The product above rests on an inverse, and is as inexact as that; a bound needs a true one.
        product = np.dot(ascent.smooth, solved)
        slope = product + linear
        value = -0.5 * np.dot(solved, product) + smallest_sum(slope, ascent.n_prune)
        blur = linearisation_rounding(ascent.smooth, linear, solved, slope, ascent.n_prune)
        if rises(ascent.figures, value, blur):
            ascent.figures[BEST], ascent.figures[BLUR] = value, blur
            copy_into(ascent.point, solved)
            copy_into(ascent.slope, slope)
    relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * guess
    project_simplices(relaxed + dual, metric, ascent.n_prune, guess)
    dual += relaxed - guess


@entry(MATRIX, VECTOR, SIZE, VECTOR, VECTOR, REAL, INTEGER, REAL)
@compiled
def begin_simplex(
    smooth: FloatArray,
    linear: FloatArray,
    count: Size,
    metric: FloatArray,
    start: FloatArray,
    cutoff: float,
    max_steps: int,
    tolerance: float,
) -> SimplexAscent:
    """State before the first step, with the bound that `start` proves; O(n^2)."""
    n = linear.size
    product = np.dot(smooth, start)
    slope = product + linear
    ascent = SimplexAscent(
        smooth,
        linear,
        count,
        metric,
        cutoff,
        tolerance,
        max_steps,
        start.copy(),
        slope,
        np.empty(n),
        np.empty(n),
        np.empty(n, dtype=np.int64),
        np.empty(3),
        np.zeros(4, dtype=np.int64),
    )
    ascent.figures[BEST] = -0.5 * np.dot(start, product) + smallest_sum(slope, count)
    ascent.figures[BLUR] = linearisation_rounding(smooth, linear, start, slope, count)
    if ascent.figures[BEST] >= cutoff:
        ascent.counts[PHASE] = ENDED
    else:
        project_simplices(start, metric, count, ascent.guess)
        places_of(ascent.guess, ascent.place)
    return ascent


@entry(ASCENT, MATRIX, INTEGER)
@compiled
def advance_simplex(ascent: SimplexAscent, inverse: FloatArray, work: int) -> None:
    """At most `work` steps of Newton's method or ADMM; fewer at the end, or where `inverse` is wanted.

    A primal-dual active-set method from the sets of the start; where it cycles, over-relaxed ADMM in the
    norm of the metric proposes other sets. Ends when the bound reaches the cutoff, at the optimum, when
    ADMM gains too little, or after `max_steps` of it. An empty `inverse` is one not needed so far.
    """
    counts = ascent.counts
    for _ in range(work):
        if counts[PHASE] == CLIMBING:
            outcome = newton_step(ascent)
            if outcome == ONGOING:
                continue
            if counts[STEPS] == 0:
                project_simplices(ascent.point, ascent.metric, ascent.n_prune, ascent.guess)
                copy_into(ascent.dual, -ascent.slope / ascent.metric)
            end_climb(ascent.figures, counts, outcome, ascent.cutoff, ascent.tolerance, ascent.max_steps)
        elif counts[PHASE] == SPLITTING and inverse.size > 0:
            admm_step(ascent, inverse)
            end_step(ascent.figures, counts, ascent.cutoff, ascent.max_steps)
            if counts[PHASE] == CLIMBING:
                places_of(ascent.guess, ascent.place)
        else:
            return


@entry(ASCENT)
@compiled
def invert_simplex(ascent: SimplexAscent) -> FloatArray:
    """``(B + diag(metric))^-1`` for the steps of ADMM; O(n^3)."""
    shifted = ascent.smooth.copy()
    for i in range(shifted.shape[0]):
        shifted[i, i] += ascent.metric[i]
    return np.linalg.inv(shifted)  # type: ignore[return-value]


@entry(MATRIX, VECTOR, SIZE, VECTOR, VECTOR, REAL, INTEGER, REAL)
@compiled
def solve_capped_simplex(
    smooth: FloatArray,
    linear: FloatArray,
    count: Size,
    metric: FloatArray,
    start: FloatArray,
    cutoff: float,
    max_steps: int,
    tolerance: float,
) -> tuple[float, FloatArray, FloatArray, int]:
    """Maximise the linearisation bound over ``y``, to its end.

    Returns
    -------
    bound : float
    point : (n,) float64 array
        The point that proves the bound.
    slope : (n,) float64 array
        ``B y + q`` there.
    steps : int
    """
    ascent = begin_simplex(smooth, linear, count, metric, start, cutoff, max_steps, tolerance)
    advance_simplex(ascent, np.empty((0, 0)), TO_THE_END)
    if ascent.counts[PHASE] != ENDED:
        advance_simplex(ascent, invert_simplex(ascent), TO_THE_END)
    return ascent.figures[BEST], ascent.point, ascent.slope, ascent.counts[STEPS]


@entry(VECTOR)
@compiled
def shift_slopes(point: FloatArray) -> FloatArray:
    """Supergradient of the bound in the shift, ``1/2 y_i (1 - y_i)``, with a floor."""
    slopes = np.empty(point.size)
    for i in range(point.size):
        inside = min(max(point[i], 0.0), 1.0)
        slopes[i] = 0.5 * inside * (1.0 - inside)
    return np.maximum(slopes, max(SLOPE_FLOOR * slopes.max(), 1e-12))
