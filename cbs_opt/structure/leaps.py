"""Leaps and bounds: the proved optimum of a small group program, by depth-first search over what goes.

For groups that own one input of every reader. A node has removed R, fixed some as kept, and has t more to
remove among the free ones F. Two matrices a reader say all about it: ``S = G^-1`` after the elimination of
R, and ``M = W^T B W``; taking i out is one sweep of each. What is still to come costs at least

- the t-th smallest saliency ``1/2 M_ii / S_ii``, since f grows with the set, and
- the sum of the t smallest ``1/2 M_ii / D_ii`` for a diagonal ``D >= S``: ``[S_TT]^-1 >= [D_TT]^-1``, and S
  only shrinks as groups go.

A group whose removal would lift either to the best value is kept. Source: Furnival and Wilson, "Regressions
by Leaps and Bounds", Technometrics 1974, with the second bound added.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from cbs_opt.structure.selection import GroupProgram
from formulations.compiled import INDEX_ROWS, INDICES, INTEGER, MATRIX, VECTOR, compiled, entry, make_ready
from formulations.errors import NotPositiveDefiniteError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

STACK = numba.float64[:, :, :, ::1]
FREE, KEPT, GONE = 0, 1, 2
LARGEST = 64
"""Groups of a set that is searched at most."""
NODES = 20_000
"""Nodes between two looks at the clock."""
SPLIT_STEPS = 150
"""Steps of the ascent that looks for D."""
SAFETY = 1e-9
"""Share of the best value that is given to rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Proved:
    """The best set that was found, (n_groups,) True = kept, its value, and what no set is below."""

    keep: BoolArray
    loss: float
    bound: float


def applies(program: GroupProgram) -> bool:
    """Return whether a program is small, and its groups are single inputs."""
    return program.n_groups <= LARGEST and all(reader.columns.shape[1] == 1 for reader in program.readers)


def search(program: GroupProgram, keep: BoolArray, seconds: float) -> Proved:
    """Return the optimum of a program with as many groups as `keep` has, or the best within a time.

    `keep` is where the search begins: the better it is, the more is cut off. Time grows exponentially; a
    layer of 40 neurons of which half go takes some million nodes, a few microseconds each. Compilation does
    not count. Raises `NotPositiveDefiniteError` if a Gram matrix is singular to rounding.
    """
    prepare()
    p, left = program.n_groups, int((~keep).sum())
    start, matrices, moments = program.loss(keep), [], []
    for reader, inverse in zip(program.readers, program.inverse, strict=True):
        own = reader.columns[:, 0]
        matrices.append(np.asarray(inverse[np.ix_(own, own)], dtype=np.float64))
        if np.linalg.eigvalsh(matrices[-1])[0] <= 0.0:
            raise NotPositiveDefiniteError("gram", "a matrix that is singular to rounding", "damp it more")
        moments.append(reader.weight[:, own].T @ reader.outputs @ reader.weight[:, own])
    scatter = np.zeros((p + 1, len(matrices), p, p))
    moment = np.zeros_like(scatter)
    scatter[0], moment[0] = np.stack(matrices), np.stack(moments)
    split = np.stack([_split(s, np.diag(m), left) for s, m in zip(matrices, moments, strict=True)])
    value, floor = np.zeros(p + 1), np.zeros(p + 1)
    status = np.zeros((p + 1, p), dtype=np.int64)
    to_go, branch = np.full(p + 1, left), np.full(p + 1, -1)
    best, chosen = np.array([start]), np.where(keep, KEPT, GONE)
    depth, end = 0, time.perf_counter() + seconds
    while depth >= 0:
        depth = explore(
            scatter, moment, split, value, floor, status, to_go, branch, best, chosen, depth, NODES
        )
        if time.perf_counter() > end:
            break
    bound = float(best[0]) * (1.0 - SAFETY)
    if depth >= 0:
        waiting = [floor[place] for place in range(depth) if branch[place] >= 0]
        bound = float(min(bound, *waiting, floor[depth]))
    found = chosen != GONE
    return Proved(keep=found, loss=program.loss(found), bound=bound)


def prepare() -> None:
    """Compile the search, or load it from disk; once an installation that takes some ten seconds."""
    make_ready((explore,), "leaps and bounds over groups")


def _split(matrix: FloatArray, moment: FloatArray, left: int) -> FloatArray:
    """Return a diagonal D >= S for which the `left` smallest m / D add up to much, by ascent on its shape."""
    shape, best = np.log(np.diag(matrix)), -np.inf
    found = np.diag(matrix)
    for step in range(SPLIT_STEPS):
        scale = np.exp(0.5 * shape)
        values, vectors = np.linalg.eigh(matrix / scale[:, None] / scale)
        diagonal = np.exp(shape) * values[-1] * (1.0 + SAFETY)
        total = float(np.sort(moment / diagonal)[:left].sum())
        if total > best:
            best, found = total, diagonal
        pull = vectors[:, -1] ** 2
        shape = shape + 0.5 / (1.0 + 0.02 * step) * (pull - pull.mean())
    return found


@entry(STACK, STACK, MATRIX, VECTOR, VECTOR, INDEX_ROWS, INDICES, INDICES, VECTOR, INDICES, INTEGER, INTEGER)
@compiled
def explore(
    scatter: FloatArray,
    moment: FloatArray,
    split: FloatArray,
    value: FloatArray,
    floor: FloatArray,
    status: NDArray[np.int64],
    to_go: NDArray[np.int64],
    branch: NDArray[np.int64],
    best: FloatArray,
    chosen: NDArray[np.int64],
    depth: int,
    nodes: int,
) -> int:
    """Go on with the search for so many nodes; return the depth that it stands at, -1 at its end.

    Arrays of the first axis p + 1 hold a node for each depth: `scatter`, `moment` (p + 1, readers, p, p),
    `value` what went costs, `floor` its bound, `status` (p + 1, p) of groups, `to_go` how many still go,
    `branch` the group whose removal is explored beneath it, -1 if none waits to be kept.
    """
    p = status.shape[1]
    free, saliency, least = np.zeros(p, np.int64), np.zeros(p), np.zeros(p)
    for _ in range(nodes):
        if depth < 0:
            break
        closed = False
        while True:
            n = _scores(scatter[depth], moment[depth], split, status[depth], free, saliency, least)
            left = to_go[depth]
            if left == 0 or n <= left:
                break
            order = np.argsort(least[:n])
            total = 0.0
            for place in range(left):
                total += least[order[place]]
            last = least[order[left - 1]]
            bound = value[depth] + max(total, np.sort(saliency[:n])[left - 1])
            floor[depth] = max(floor[depth], bound)
            limit = best[0] * (1.0 - SAFETY)
            closed = bound >= limit
            if closed:
                break
            fixed = 0
            for place in range(n):
                with_it = max(saliency[place], total + max(least[place] - last, 0.0))
                if value[depth] + with_it >= limit:
                    status[depth, free[place]] = KEPT
                    fixed += 1
            if fixed == 0:
                break
        if not closed and to_go[depth] > 0 and n > to_go[depth]:
            index = free[np.argmax(saliency[:n])]
            branch[depth] = index
            _descend(scatter, moment, value, status, depth, index)
            to_go[depth + 1], branch[depth + 1] = to_go[depth] - 1, -1
            floor[depth + 1] = floor[depth]
            depth += 1
            continue
        if not closed and n >= to_go[depth]:
            _leaf(scatter[depth], moment[depth], value[depth], status[depth], to_go[depth], best, chosen)
        depth -= 1
        while depth >= 0 and branch[depth] < 0:
            depth -= 1
        if depth >= 0:
            status[depth, branch[depth]] = KEPT
            branch[depth] = -1
    return depth


@compiled
def _scores(
    scatter: FloatArray,
    moment: FloatArray,
    split: FloatArray,
    status: NDArray[np.int64],
    free: NDArray[np.int64],
    saliency: FloatArray,
    least: FloatArray,
) -> int:
    """Write the free groups of a node, their saliencies and least costs; return how many there are."""
    n = 0
    for index in range(status.size):
        if status[index] == FREE:
            free[n], saliency[n], least[n] = index, 0.0, 0.0
            for reader in range(scatter.shape[0]):
                gain = 0.5 * max(moment[reader, index, index], 0.0)
                saliency[n] += gain / scatter[reader, index, index]
                least[n] += gain / split[reader, index]
            n += 1
    return n


@compiled
def _descend(
    scatter: FloatArray,
    moment: FloatArray,
    value: FloatArray,
    status: NDArray[np.int64],
    depth: int,
    index: int,
) -> None:
    """Write the node in which a group more went to the next depth."""
    scatter[depth + 1] = scatter[depth]
    moment[depth + 1] = moment[depth]
    status[depth + 1] = status[depth]
    status[depth + 1, index] = GONE
    value[depth + 1] = value[depth] + _sweep(scatter[depth + 1], moment[depth + 1], index)


@compiled
def _sweep(scatter: FloatArray, moment: FloatArray, index: int) -> float:
    """Take a group out of the matrices of all readers, in place; return what that costs."""
    cost = 0.0
    for reader in range(scatter.shape[0]):
        pivot = scatter[reader, index, index]
        column, pull = scatter[reader, index].copy(), moment[reader, index].copy()
        own = pull[index]
        cost += 0.5 * max(own, 0.0) / pivot
        for row in range(column.size):
            share = column[row] / pivot
            for other in range(column.size):
                back = column[other] / pivot
                moment[reader, row, other] += share * back * own - share * pull[other] - pull[row] * back
                scatter[reader, row, other] -= share * column[other]
    return cost


@compiled
def _leaf(
    scatter: FloatArray,
    moment: FloatArray,
    value: float,
    status: NDArray[np.int64],
    left: int,
    best: FloatArray,
    chosen: NDArray[np.int64],
) -> None:
    """Take the one set that a node has left, if it is better."""
    total = value
    if left > 0:
        matrices, moments = scatter.copy(), moment.copy()
        for index in range(status.size):
            if status[index] == FREE:
                total += _sweep(matrices, moments, index)
    if total < best[0]:
        best[0] = total
        for index in range(status.size):
            gone = status[index] == GONE or (status[index] == FREE and left > 0)
            chosen[index] = GONE if gone else KEPT
