"""One node of the selection program: reduce, relax, fix, improve the shift, choose a branch."""

from __future__ import annotations

import numpy as np

from formulations.branch_and_bound.node_rules import REDUCED_AGAIN, RULES, WORTH_A_ROUND, NodeRules, settle
from formulations.branch_and_bound.outcomes import BRANCH, CLOSED, LEAF
from formulations.cells import cell_range, n_cells, size_left
from formulations.compiled import INDICES, INTEGER, MATRIX, REAL, SIZE, VECTOR, compiled, entry
from formulations.factorisation import cholesky_factor, inverse_from_factor
from formulations.problem import BoolArray, FloatArray, IntArray
from formulations.reduction import FREE, KEPT, PRUNED, reduce_selection
from formulations.relaxations.capped_simplex_kernels import (
    METRIC_FLOOR,
    METRIC_SHARE,
    linearisation_rounding,
    shift_slopes,
    solve_capped_simplex,
)
from formulations.relaxations.diagonal_split import LAPACK_FROM, barrier_step
from formulations.support import Size
from formulations.swap_kernels import swap_selection

INSIDE = 1e-7
"""An entry at least this far from 0 and 1 counts as fractional."""


@entry(MATRIX, VECTOR, SIZE, INDICES, VECTOR, VECTOR, REAL, RULES)
@compiled
def evaluate_selection(
    matrix: FloatArray,
    linear: FloatArray,
    n_prune: Size,
    status: IntArray,
    split: FloatArray,
    warm: FloatArray,
    cutoff: float,
    rules: NodeRules,
) -> tuple[int, float, int, bool]:
    """Bound one node of the selection form; `status`, `split` and `warm` are updated in place.

    Returns
    -------
    outcome : int
        BRANCH, CLOSED (bound reached the cutoff, or infeasible) or LEAF (all decided).
    bound : float
        Lower bound of the node; infinity if infeasible.
    index : int
        Index to branch on.
    keep_first : bool
        Whether the relaxation prefers to keep it.
    """
    best = -np.inf
    rounds = 0
    while True:
        pruned = np.nonzero(status == PRUNED)[0]
        free = np.nonzero(status == FREE)[0]
        count = size_left(n_prune, status == PRUNED, free)
        m = free.size
        possible, open_cells, moved = settle(count, free, status, PRUNED, KEPT)
        if not possible:
            return CLOSED, np.inf, -1, False
        if open_cells == 0:
            return LEAF, best, -1, False
        if moved:
            continue
        reduced, reduced_linear, constant = reduce_selection(matrix, linear, pruned, free)
        metric = np.empty(m)
        for p in range(m):
            metric[p] = METRIC_SHARE * (reduced[p, p] + METRIC_FLOOR)
        local = split[free]
        start = warm[free]
        while True:
            smooth = reduced.copy()
            for p in range(m):
                smooth[p, p] -= local[p]
            shifted = reduced_linear + 0.5 * local
            value, start, slope, _ = solve_capped_simplex(
                smooth, shifted, count, metric, start, cutoff - constant, rules.steps, rules.tolerance
            )
            bound = value + constant - linearisation_rounding(smooth, shifted, start, slope, count)
            gained = bound - best
            if gained > 0.0:
                best = bound
                for p in range(m):
                    warm[free[p]] = start[p]
                    split[free[p]] = local[p]
            if best >= cutoff or value + constant >= cutoff:
                return CLOSED, best, -1, False
            fixed = fix_in_cells(slope, count, bound, cutoff, free, status) if rules.fixing else 0
            if fixed >= max(1.0, REDUCED_AGAIN * m):
                break
            gap = cutoff - best
            if rounds >= rules.split_rounds or (rounds > rules.patience and gained < WORTH_A_ROUND * gap):
                if fixed > 0 and np.count_nonzero(status == FREE) < 2:
                    break
                index, keep_first = branch_selection(smooth, start, count, gap, free, status)
                return BRANCH, best, index, keep_first
            rounds += 1
            slopes = shift_slopes(start)
            barrier_step(reduced, local, slopes, rules.barrier_share * gap / m, rules.positive_split)


@compiled
def fix_selection(
    slope: FloatArray, count: int, bound: float, cutoff: float, free: IntArray, status: IntArray
) -> int:
    """Decide the free indices whose other value would lift the bound to the cutoff; how many.

    The bound is ``c + (sum of the `count` smallest slopes)``: forcing an index into the sum or out
    of it exchanges it with the last one in or the first one out.
    """
    order = np.argsort(slope)
    last_in, first_out = slope[order[count - 1]], slope[order[count]]
    fixed = 0
    for q in range(free.size):
        i = order[q]
        if q < count:
            if bound + first_out - slope[i] >= cutoff:
                status[free[i]] = PRUNED
                fixed += 1
        elif bound + slope[i] - last_in >= cutoff:
            status[free[i]] = KEPT
            fixed += 1
    return fixed


@compiled
def fix_in_cells(
    slope: FloatArray, size: Size, bound: float, cutoff: float, free: IntArray, status: IntArray
) -> int:
    """`fix_selection` in each cell that has a free index; how many were decided."""
    fixed = 0
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, free.size)
        if stop > first:
            fixed += fix_selection(slope[first:stop], count, bound, cutoff, free[first:stop], status)
    return fixed


@compiled
def branch_selection(
    smooth: FloatArray, point: FloatArray, count: Size, gap: float, free: IntArray, status: IntArray
) -> tuple[int, bool]:
    """Index to branch on, and whether to keep it first.

    With ``N`` the inverse of the relaxation's matrix on the fractional indices, projected on a zero
    sum of the index's own cell, moving ``y_i`` by ``delta`` costs ``1/2 delta^2 / N_ii`` if no other index
    changes its active set. The product of both children's costs, each capped by the gap, is the score.
    """
    m = free.size
    inside = np.nonzero((point > INSIDE) & (point < 1.0 - INSIDE))[0]
    size = inside.size
    chosen, keep_first = -1, True
    if size >= 2:
        system = np.empty((size, size))
        for p in range(size):
            for q in range(size):
                system[p, q] = smooth[inside[p], inside[q]]
            system[p, p] += 1e-12 * (1.0 + system[p, p])
        factor = np.zeros((size, size))
        if cholesky_factor(system, factor):
            inverse = np.linalg.inv(system).T if size >= LAPACK_FROM else inverse_from_factor(factor)
            best = -1.0
            begin = 0
            for cell in range(n_cells(count)):
                end = begin
                while end < size and inside[end] < cell_range(count, cell, m)[1]:
                    end += 1
                own = np.zeros(size)
                own[begin:end] = 1.0
                along = np.dot(inverse, own)
                total = along[begin:end].sum()
                for p in range(begin, end):
                    i = inside[p]
                    if status[free[i]] != FREE:
                        continue
                    spread = max(inverse[p, p] - along[p] * along[p] / total, 1e-300)
                    keep_cost = 0.5 * point[i] * point[i] / spread
                    prune_cost = 0.5 * (1.0 - point[i]) ** 2 / spread
                    score = max(min(keep_cost, gap), 1e-4 * gap) * max(min(prune_cost, gap), 1e-4 * gap)
                    if score > best:
                        best = score
                        chosen = i
                        keep_first = keep_cost <= prune_cost
                begin = end
    if chosen < 0:
        nearest = np.inf
        for i in range(m):
            if status[free[i]] == FREE and abs(point[i] - 0.5) < nearest:
                nearest = abs(point[i] - 0.5)
                chosen = i
        keep_first = point[chosen] <= 0.5
    return free[chosen], keep_first


@entry(MATRIX, VECTOR, SIZE, INDICES, VECTOR, INTEGER)
@compiled
def improve_selection(
    matrix: FloatArray, linear: FloatArray, n_prune: Size, status: IntArray, warm: FloatArray, max_swaps: int
) -> BoolArray:
    """Round a node's relaxation to its largest free entries and descend by swaps inside the node."""
    pruned = np.nonzero(status == PRUNED)[0]
    free = np.nonzero(status == FREE)[0]
    keep: BoolArray = status != PRUNED
    size = size_left(n_prune, status == PRUNED, free)
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, free.size)
        if count < 0 or count > stop - first:
            return keep
    reduced, reduced_linear, _ = reduce_selection(matrix, linear, pruned, free)
    nearest = -warm[free]
    chosen = np.zeros(free.size, dtype=np.bool_)
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, free.size)
        order = np.argsort(nearest[first:stop])
        for q in range(count):
            chosen[first + order[q]] = True
    swap_selection(reduced, reduced_linear, chosen, max_swaps, size)
    for q in range(free.size):
        keep[free[q]] = not chosen[q]
    return keep
