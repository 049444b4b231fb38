"""One node of the joint program: reduce, relax, fix, improve the split, choose a branch."""

from __future__ import annotations

import numpy as np

from formulations.branch_and_bound.node_rules import REDUCED_AGAIN, RULES, WORTH_A_ROUND, NodeRules, settle
from formulations.branch_and_bound.outcomes import BRANCH, CLOSED, FAILED, LEAF
from formulations.cells import cell_range, n_cells, size_left
from formulations.compiled import INDICES, INTEGER, MATRIX, REAL, SIZE, VECTOR, compiled, entry
from formulations.factorisation import cholesky_factor, inverse_from_factor
from formulations.problem import BoolArray, FloatArray, IntArray
from formulations.reduction import FREE, KEPT, PRUNED, reduce_joint
from formulations.relaxations.diagonal_split import LAPACK_FROM, barrier_step
from formulations.relaxations.perspective_kernels import (
    dual_rounding,
    indefinite_rounding,
    solve_perspective,
    split_slopes,
)
from formulations.relaxations.support_norm import prox_support_norm
from formulations.support import Size
from formulations.swap_kernels import swap_joint, sweep


@entry(MATRIX, VECTOR, SIZE, INDICES, VECTOR, VECTOR, REAL, RULES, VECTOR)
@compiled
def evaluate_joint(
    matrix: FloatArray,
    linear: FloatArray,
    n_keep: Size,
    status: IntArray,
    split: FloatArray,
    warm: FloatArray,
    cutoff: float,
    rules: NodeRules,
    reach: FloatArray,
) -> tuple[int, float, int, bool]:
    """Bound one node of the joint form; `status`, `split` and `warm` are updated in place.

    `reach` is that of the form's rounding, its minimum without the form's constant.

    Returns
    -------
    outcome : int
        BRANCH, CLOSED (bound reached the cutoff, or infeasible), LEAF (all decided) or FAILED.
    bound : float
        Lower bound of the node without the form's constant; infinity if infeasible.
    index : int
        Index to branch on.
    keep_first : bool
        Whether the relaxation prefers to keep it.
    """
    best = -np.inf
    rounds = 0
    while True:
        kept = np.nonzero(status == KEPT)[0]
        free = np.nonzero(status == FREE)[0]
        size = size_left(n_keep, status == KEPT, free)
        m = free.size
        possible, open_cells, moved = settle(size, free, status, KEPT, PRUNED)
        if not possible:
            return CLOSED, np.inf, -1, False
        if open_cells == 0:
            return LEAF, best, -1, False
        if moved:
            continue
        definite, reduced, reduced_linear, constant = reduce_joint(matrix, linear, kept, free)
        if not definite:
            return FAILED, best, -1, False
        local = split[free]
        start = warm[free]
        while True:
            root = np.sqrt(local)
            smooth = np.empty((m, m))
            for p in range(m):
                for q in range(m):
                    smooth[p, q] = reduced[p, q] / (root[p] * root[q])
                smooth[p, p] -= 1.0
            value, point, residual, _ = solve_perspective(
                smooth,
                reduced_linear / root,
                size,
                start * root,
                cutoff - constant,
                rules.steps,
                rules.tolerance,
            )
            bound = value + constant - dual_rounding(smooth, reduced_linear / root, point, residual, size)
            bound -= indefinite_rounding(reduced_linear / root, point, residual, constant, reach)
            start = point / root
            gained = bound - best
            if gained > 0.0:
                best = bound
                for p in range(m):
                    warm[free[p]] = start[p]
                    split[free[p]] = local[p]
            if best >= cutoff or value + constant >= cutoff:
                return CLOSED, best, -1, False
            fixed = fix_in_cells(residual, size, bound, cutoff, free, status) if rules.fixing else 0
            if fixed >= max(1.0, REDUCED_AGAIN * m):
                break
            gap = cutoff - best
            if rounds >= rules.split_rounds or (rounds > rules.patience and gained < WORTH_A_ROUND * gap):
                if fixed > 0 and np.count_nonzero(status == FREE) < 2:
                    break
                index, keep_first = branch_joint(smooth, point, residual, size, gap, free, status)
                return BRANCH, best, index, keep_first
            rounds += 1
            slopes = split_slopes(start, point, residual, size)
            barrier_step(reduced, local, slopes, rules.barrier_share * gap / m, rules.positive_split)


@compiled
def fix_joint(
    residual: FloatArray, size: int, bound: float, cutoff: float, free: IntArray, status: IntArray
) -> int:
    """Decide the free indices whose other value would lift the bound to the cutoff; how many.

    The bound is ``c - 1/2 (sum of the `size` largest h_i^2)``; forcing ``i`` out of the largest (or
    in) exchanges it with the next one.
    """
    m = free.size
    value = 0.5 * residual * residual
    order = np.argsort(-value)
    last_in, first_out = value[order[size - 1]], value[order[size]]
    fixed = 0
    for q in range(m):
        i = order[q]
        if q < size:
            if bound + value[i] - first_out >= cutoff:
                status[free[i]] = KEPT
                fixed += 1
        elif bound + last_in - value[i] >= cutoff:
            status[free[i]] = PRUNED
            fixed += 1
    return fixed


@compiled
def fix_in_cells(
    residual: FloatArray, size: Size, bound: float, cutoff: float, free: IntArray, status: IntArray
) -> int:
    """`fix_joint` in each cell that has a free index; how many were decided."""
    fixed = 0
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, free.size)
        if stop > first:
            fixed += fix_joint(residual[first:stop], count, bound, cutoff, free[first:stop], status)
    return fixed


@compiled
def branch_joint(
    smooth: FloatArray,
    point: FloatArray,
    residual: FloatArray,
    size: Size,
    gap: float,
    free: IntArray,
    status: IntArray,
) -> tuple[int, bool]:
    """Index to branch on, and whether to keep it first.

    For each fractional index the rise of the relaxation in both children is computed as if no other
    index changed its active set: with ``N`` the inverse of the relaxation's system, pruning costs
    ``1/2 x_i^2 / N_ii`` and keeping is a rank-one change of the system. The product of both, each
    capped by the gap, is the score.
    """
    m = free.size
    order = np.empty(m, dtype=np.int64)
    image = np.empty(m)
    active, begin, shares = active_sets(point + residual, size, order, image)
    left, right = begin[0], begin[-1]
    chosen, keep_first = -1, True
    if right > left and shares.min() > 0:
        system = np.empty((right, right))
        sign = np.zeros(right)
        x = np.empty(right)
        for p in range(right):
            x[p] = image[active[p]]
            if p >= left:
                sign[p] = 1.0 if image[active[p]] >= 0.0 else -1.0
        for p in range(right):
            for q in range(right):
                system[p, q] = smooth[active[p], active[q]]
        for cell in range(shares.size):
            for p in range(begin[cell], begin[cell + 1]):
                for q in range(begin[cell], begin[cell + 1]):
                    system[p, q] += sign[p] * sign[q] / shares[cell]
        for p in range(right):
            system[p, p] += 1.0 if p < left else 1e-12
        factor = np.zeros((right, right))
        if cholesky_factor(system, factor):
            inverse = np.linalg.inv(system).T if right >= LAPACK_FROM else inverse_from_factor(factor)
            best = -1.0
            for cell in range(shares.size):
                share = shares[cell]
                own = np.zeros(right)
                for p in range(begin[cell], begin[cell + 1]):
                    own[p] = sign[p]
                along = np.dot(inverse, own)
                total = np.dot(own, along)
                level = np.dot(own, x) / share
                for p in range(begin[cell], begin[cell + 1]):
                    if status[free[active[p]]] != FREE:
                        continue
                    down = 0.5 * x[p] * x[p] / inverse[p, p]
                    rest = level - abs(x[p])
                    bend = share * share * inverse[p, p] - 2.0 * share * sign[p] * along[p] + total
                    up = 0.5 * share * share * rest * rest / (share * (share - 1.0) + bend)
                    score = max(min(down, gap), 1e-4 * gap) * max(min(up, gap), 1e-4 * gap)
                    if score > best:
                        best = score
                        chosen = active[p]
                        keep_first = down >= up
    if chosen < 0:
        # Nothing fractional: the free index nearest to the threshold.
        magnitude = np.abs(residual)
        nearest = np.inf
        for cell in range(n_cells(size)):
            first, stop, count = cell_range(size, cell, m)
            if stop == first:
                continue
            own = magnitude[first:stop]
            threshold = own[np.argsort(-own)[count - 1]]
            for i in range(first, stop):
                if status[free[i]] == FREE and abs(magnitude[i] - threshold) < nearest:
                    nearest = abs(magnitude[i] - threshold)
                    chosen = i
                    keep_first = magnitude[i] >= threshold
    return free[chosen], keep_first


@compiled
def active_sets(
    both: FloatArray, size: Size, order: IntArray, image: FloatArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Whole entries, then the shared ones of each cell that has some.

    Returns them, where the shared ones of each such cell begin among them, and the units that these share.
    """
    m = both.size
    cells = n_cells(size)
    active = np.empty(m, dtype=np.int64)
    begin = np.zeros(cells + 1, dtype=np.int64)
    shares = np.zeros(cells, dtype=np.int64)
    ends = np.zeros((cells, 2), dtype=np.int64)
    whole = 0
    for cell in range(cells):
        first, stop, count = cell_range(size, cell, m)
        left, right = prox_support_norm(both[first:stop], count, 1.0, order[first:stop], image[first:stop])
        ends[cell, 0], ends[cell, 1] = left, right
        for q in range(left):
            active[whole] = first + order[first + q]
            whole += 1
    begin[0] = whole
    used = 0
    for cell in range(cells):
        first, stop, count = cell_range(size, cell, m)
        left, right = ends[cell]
        if right == left:
            continue
        place = begin[used]
        for q in range(left, right):
            active[place] = first + order[first + q]
            place += 1
        shares[used] = count - left
        used += 1
        begin[used] = place
    return active, begin[: used + 1], shares[: max(used, 1)]


@entry(MATRIX, VECTOR, SIZE, INDICES, VECTOR, INTEGER)
@compiled
def improve_joint(
    matrix: FloatArray, linear: FloatArray, n_keep: Size, status: IntArray, warm: FloatArray, max_swaps: int
) -> BoolArray:
    """Round a node's relaxation to its largest free entries and descend by swaps inside the node."""
    kept = np.nonzero(status == KEPT)[0]
    free = np.nonzero(status == FREE)[0]
    keep: BoolArray = status == KEPT
    size = size_left(n_keep, status == KEPT, free)
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, free.size)
        if count < 0 or count > stop - first:
            return keep
    definite, reduced, reduced_linear, _ = reduce_joint(matrix, linear, kept, free)
    if not definite:
        return keep
    magnitude = np.abs(warm[free])
    rounded = np.zeros(free.size, dtype=np.bool_)
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, free.size)
        order = np.argsort(-magnitude[first:stop])
        for q in range(count):
            rounded[first + order[q]] = True
            sweep(reduced, reduced_linear, first + order[q], 1.0)
    swap_joint(reduced, reduced_linear, rounded, max_swaps, size)
    for q in range(free.size):
        keep[free[q]] = rounded[q]
    return keep
