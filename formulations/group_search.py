"""Joint program on groups of weights that are kept or pruned whole: greedy elimination, exchanges, every set.

A group's cost and gain are those of its weights together: small dense systems where single weights have one
division. The selection program needs none of this: summed over groups, it is one with a count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from formulations.problem import BoolArray, FloatArray, IntArray
from formulations.solution import never
from formulations.support import Support

GAIN = 1e-11
"""An exchange counts when it gains more than this share of what the group that leaves costs."""


def members(support: Support) -> list[IntArray]:
    """Return the weights of each group."""
    unit = support.unit
    assert unit is not None
    return [np.flatnonzero(unit == group) for group in range(support.n_units(unit.size))]


def solved(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """Return ``M^-1 right`` of a small definite matrix; in its range where rounding made it singular."""
    if matrix.size == 0:
        return right
    try:
        return np.asarray(cho_solve(cho_factor(matrix, check_finite=False), right, check_finite=False))
    except LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        used = values > matrix.shape[0] * np.finfo(np.float64).eps * np.abs(values).max()
        inside = vectors[:, used]
        return np.asarray(inside @ ((inside.T @ right).T / values[used]).T)


def quadratic_gain(matrix: FloatArray, vector: FloatArray) -> float:
    """Return ``1/2 v.M^-1 v`` of a small definite matrix."""
    return 0.5 * float(vector @ solved(matrix, vector))


def greedy_groups(
    inverse: FloatArray, minimiser: FloatArray, support: Support, stopped: Callable[[], bool] = never
) -> BoolArray:
    """Return the kept set of greedy OBS on whole groups; O(n^2) for each weight that goes.

    Parameters
    ----------
    inverse, minimiser : (n, n) and (n,) float64 arrays
        ``M^-1`` and ``M^-1 l``; changed in place.
    support : Support
        One with groups.
    stopped : callable
        Asked between groups; what is left then goes at once, by its cost.
    """
    groups = members(support)
    left = list(range(len(groups)))
    most = int(support.n_units(minimiser.size)) - int(support.pruned(minimiser.size))  # type: ignore[arg-type]
    while len(left) > most:
        costs = [quadratic_gain(inverse[np.ix_(g, g)], minimiser[g]) for g in (groups[q] for q in left)]
        order = np.argsort(costs, kind="stable")
        going = order[: len(left) - most] if stopped() else order[:1]
        for q in sorted(going.tolist(), reverse=True):
            index = groups[left.pop(q)]
            pivot, rows = inverse[np.ix_(index, index)], inverse[index].copy()
            minimiser -= rows.T @ solved(pivot, minimiser[index])
            inverse -= rows.T @ solved(pivot, rows)
    keep = np.zeros(minimiser.size, dtype=np.bool_)
    for q in left:
        keep[groups[q]] = True
    return keep


def swap_groups(table: FloatArray, state: FloatArray, keep: BoolArray, support: Support) -> int:
    """Exchange the kept and the pruned group that gain most, in `keep` alone; 1, or 0 if none gains.

    `table` and `state` are the swept tableau of `incumbents.joint_tableau`: with ``C = M_KK^-1``, dropping
    ``i`` costs ``1/2 u_i.C_ii^-1 u_i``, and entering ``j`` afterwards gains ``1/2 r.S^-1 r`` with
    ``r = r_j + T_ji C_ii^-1 u_i`` and ``S = S_jj + T_ji C_ii^-1 T_ij``.
    """
    groups = members(support)
    inside = [group for group in groups if keep[group[0]]]
    outside = [group for group in groups if not keep[group[0]]]
    best = 0.0
    pair: tuple[IntArray, IntArray] | None = None
    for out in inside:
        pivot = -table[np.ix_(out, out)]
        step = solved(pivot, state[out])
        cost = 0.5 * float(state[out] @ step)
        for into in outside:
            across = table[np.ix_(into, out)]
            schur = table[np.ix_(into, into)] + across @ solved(pivot, across.T)
            change = cost - quadratic_gain(schur, state[into] + across @ step)
            if change < -GAIN * cost and change < best:
                best, pair = change, (out, into)
    if pair is None:
        return 0
    keep[pair[0]], keep[pair[1]] = False, True
    return 1


def every_set(matrix: FloatArray, linear: FloatArray, support: Support) -> Iterator[tuple[float, BoolArray]]:
    """Yield the form value ``-1/2 l_K.M_KK^-1 l_K`` and the kept set of every choice of groups."""
    groups = members(support)
    kept = support.kept(linear.size)
    assert isinstance(kept, int)
    for chosen in combinations(range(len(groups)), kept):
        keep = np.zeros(linear.size, dtype=np.bool_)
        for q in chosen:
            keep[groups[q]] = True
        index = np.flatnonzero(keep)
        yield -quadratic_gain(matrix[np.ix_(index, index)], linear[index]), keep
