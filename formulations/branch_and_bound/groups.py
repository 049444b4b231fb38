"""One node of the joint program on groups that are kept or pruned whole: what `joint` does for weights."""

from __future__ import annotations

import math

import numpy as np

from formulations.branch_and_bound.node_rules import REDUCED_AGAIN, WORTH_A_ROUND, NodeRules
from formulations.branch_and_bound.outcomes import BRANCH, CLOSED, FAILED, LEAF
from formulations.problem import FloatArray, IntArray
from formulations.reduction import FREE, KEPT, PRUNED, reduce_joint
from formulations.relaxations.diagonal_split import barrier_step
from formulations.relaxations.group_norm import ascend_groups, group_slopes, shrink_groups
from formulations.relaxations.perspective_kernels import dual_rounding, indefinite_rounding
from formulations.support import Groups


def evaluate_groups(
    matrix: FloatArray,
    linear: FloatArray,
    support: Groups,
    status: IntArray,
    split: FloatArray,
    warm: FloatArray,
    cutoff: float,
    rules: NodeRules,
    reach: FloatArray,
) -> tuple[int, float, int, bool]:
    """Bound one node; arguments and result as for `joint.evaluate_joint`, all of a group decided alike."""
    best = -math.inf
    rounds = 0
    while True:
        free = np.flatnonzero(status == FREE)
        here = _open_groups(support, free, status)
        if here is None:
            possible = int(support.unit_keep(status == KEPT).sum()) == support.n_keep
            return (LEAF, best, -1, False) if possible else (CLOSED, math.inf, -1, False)
        definite, reduced, reduced_linear, constant = reduce_joint(
            matrix, linear, np.flatnonzero(status == KEPT), free
        )
        if not definite:
            return FAILED, best, -1, False
        local, start = split[free], warm[free]
        while True:
            root = np.sqrt(local)
            smooth = reduced / root[:, None] / root[None, :]
            smooth[np.diag_indices(free.size)] -= 1.0
            scaled = reduced_linear / root
            value, point, residual = ascend_groups(
                smooth, scaled, here, start * root, cutoff - constant, rules.steps, rules.tolerance
            )
            # The rounding of all groups is more than that of those that are kept.
            bound = value + constant - dual_rounding(smooth, scaled, point, residual, free.size)
            bound -= indefinite_rounding(scaled, point, residual, constant, reach)
            start = point / root
            gained = bound - best
            if gained > 0.0:
                best = bound
                warm[free], split[free] = start, local
            if best >= cutoff or value + constant >= cutoff:
                return CLOSED, best, -1, False
            fixed = _fix(residual, here, bound, cutoff, free, status) if rules.fixing else 0
            if fixed >= max(1.0, REDUCED_AGAIN * here.n_groups):
                break
            gap = cutoff - best
            if rounds >= rules.split_rounds or (rounds > rules.patience and gained < WORTH_A_ROUND * gap):
                if fixed > 0 and not (status == FREE).any():
                    break
                index, keep_first = _branch(point, residual, here, status[free] == FREE)
                return BRANCH, best, int(free[index]), keep_first
            rounds += 1
            slopes = group_slopes(start, point, residual, here)
            barrier_step(reduced, local, slopes, rules.barrier_share * gap / free.size, True)


def _open_groups(support: Groups, free: IntArray, status: IntArray) -> Groups | None:
    """Return the groups still to choose among; None once they have one way left or none, which is taken."""
    left = support.n_keep - int(support.unit_keep(status == KEPT).sum())
    labels = support.unit[free]
    n_groups = int(np.unique(labels).size)
    if 0 < left < n_groups:
        return Groups(labels, left)
    status[free] = KEPT if left > 0 else PRUNED
    return None


def _fix(
    residual: FloatArray, here: Groups, bound: float, cutoff: float, free: IntArray, status: IntArray
) -> int:
    """Decide the groups whose other value would lift the bound to the cutoff; how many."""
    value = 0.5 * here.folded(residual * residual)
    order = np.argsort(-value, kind="stable")
    last_in, first_out = value[order[here.n_keep - 1]], value[order[here.n_keep]]
    inside = np.zeros(value.size, dtype=np.bool_)
    inside[order[: here.n_keep]] = True
    rise = np.where(inside, value - first_out, last_in - value)
    decided = bound + rise >= cutoff
    now = np.where(inside, KEPT, PRUNED)
    chosen = here.spread(decided)
    status[free[chosen]] = here.spread(now)[chosen]
    return int(decided.sum())


def _branch(point: FloatArray, residual: FloatArray, here: Groups, free: np.ndarray) -> tuple[int, bool]:
    """Return a weight of the group to branch on, and whether to keep it first.

    The group whose share is farthest from 0 and 1, weighed by what it adds to the bound.
    """
    shares = shrink_groups(point + residual, here, 1.0)[1]
    value = here.folded(residual * residual)
    score = np.minimum(shares, 1.0 - shares) * value + 1e-9 * value
    score[~here.unit_keep(free)] = -1.0
    group = int(np.argmax(score))
    return int(np.flatnonzero(here.unit == group)[0]), bool(shares[group] >= 0.5)
