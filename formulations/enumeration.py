"""Brute force over all sets of the support: the oracle of the tests, for n up to about 24."""

from __future__ import annotations

import math
import time

import numpy as np

from formulations.compiled import CUBE, INDEX_ROWS, INDICES, INTEGER, MATRIX, VECTOR, compiled, entry
from formulations.dense_forms import DenseForm, dense_form, folded_form
from formulations.errors import UnsupportedProblemError
from formulations.group_search import every_set
from formulations.incumbents import IncumbentPool
from formulations.preparation import prepare_for
from formulations.problem import BlockProblem, BoolArray, FloatArray, IntArray, check_program
from formulations.relaxations.only_set import has_one_set, only_set_certificate
from formulations.solution import BlockSolution, Limit, Limits, SolveStats
from formulations.support import Size, Support, counts_of

CHUNK = 2_000_000
"""Elementary operations between two looks at the clock (a few milliseconds)."""


def enumerate_optimum(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits | None = None,
    incumbent: BlockSolution | None = None,
    max_sets: float = 2e9,
) -> BlockSolution:
    """Solve a program by visiting every set of the support.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    limits : Limits, optional
        Only `time_limit` and `rel_gap` are looked at.
    incumbent : BlockSolution, optional
        Warm start; the result is never worse.
    max_sets : float, default 2e9
        Refuse blocks with more sets than this.

    Returns
    -------
    BlockSolution
        With a bound that is the least value of the recursion less the rounding allowance: OPTIMAL if
        that meets the objective to `rel_gap`, FEASIBLE with `Limit.GAP` if rounding leaves more.
        Ctrl-C returns the best set seen with `Limit.INTERRUPTED`.

    Raises
    ------
    UnsupportedProblemError
        If there are more than `max_sets` sets.
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.

    Notes
    -----
    Depth-first over sets in lexicographic order; a prefix is extended from its parent and never
    updated in place, so that no error builds up. Selection adds one column of ``A`` a prefix, O(n);
    joint keeps one more weight by a Schur complement, O(n^2), and the last two levels of the
    recursion cost O(n) and O(1) a set. Sets of groups in the joint program are solved one by one.
    """
    check_program(program)
    limits = limits or Limits()
    prepare_for(problem, "enumeration", program)
    started = time.perf_counter()
    sets = problem.sets.n_sets(problem.n)
    if sets > max_sets:
        # Too many to be a float, perhaps.
        what = f"n_prune = {problem.n_prune}" if problem.support is None else f"{problem.support}"
        found = f"about 1e{math.log10(sets):.0f} sets (n = {problem.n}, {what})"
        raise UnsupportedProblemError(
            "problem", found, f"enumerate at most {max_sets:.3g} or use branch_and_bound"
        )
    pool = IncumbentPool(problem, program, incumbent)
    if has_one_set(problem):
        pool.offer(np.full(problem.n, problem.n_prune == 0))
        certificate = only_set_certificate(problem, program)
        return pool.solution(
            method="enumeration",
            rel_gap=limits.rel_gap,
            bound=certificate.lower_bound(problem),
            finished=True,
            certificate=certificate,
            stats=SolveStats(seconds=time.perf_counter() - started, nodes=1),
        )
    form = dense_form(problem, program)
    support = problem.sets
    if program == "joint" and support.unit is not None:
        keep, least, limit = _visit_groups(form, support, limits.time_limit, started)
    else:
        keep, least, limit = _visit_all(form, program, support, limits.time_limit, started)
    if keep is not None:
        pool.offer(keep)
    pool.offer_magnitude_if_empty()
    finished = limit is None
    bound = -math.inf
    allowance = form.rounding.allowance(pool.objective / form.scale)
    if finished and math.isfinite(allowance):
        bound = (least + form.constant - allowance) * form.scale
    return pool.solution(
        method="enumeration",
        rel_gap=limits.rel_gap,
        bound=bound,
        finished=finished,
        limit=limit,
        stats=SolveStats(seconds=time.perf_counter() - started, nodes=sets if finished else 0),
    )


def _visit_groups(
    form: DenseForm, support: Support, time_limit: float | None, started: float
) -> tuple[BoolArray | None, float, Limit | None]:
    """Solve the joint program for every set of groups; what `_visit_all` returns."""
    best: BoolArray | None = None
    least = math.inf
    try:
        for value, keep in every_set(form.matrix, form.linear, support):
            if time_limit is not None and time.perf_counter() - started >= time_limit:
                return best, least, Limit.TIME
            if value < least:
                best, least = keep, value
    except KeyboardInterrupt:
        return best, least, Limit.INTERRUPTED
    return best, least, None


def _ranges(size: Size, n: int) -> tuple[IntArray, IntArray]:
    """Return the first and the last unit that may come at each place of a set in increasing order."""
    start = np.array([0, n]) if isinstance(size, int) else size.start
    count = counts_of(size)
    first = np.repeat(start[:-1], count)
    left = np.concatenate([np.arange(each, 0, -1) for each in count.tolist()])
    return first, np.repeat(start[1:], count) - left


def _visit_all(
    form: DenseForm, program: str, support: Support, time_limit: float | None, started: float
) -> tuple[BoolArray | None, float, Limit | None]:
    """Run the kernel in chunks: the best set seen (None if none), its value, what came before the end."""
    joint = program == "joint"
    matrix, linear = (form.matrix, form.linear) if joint else folded_form(form, support)
    n = linear.size
    first, last = _ranges((support.kept if joint else support.pruned)(form.linear.size), n)
    size = first.size
    places = np.stack((np.zeros(size, dtype=np.int64), first, last))
    places[0, 0] = first[0]
    best = np.full(size, -1, dtype=np.int64)
    # depth of the search, then value of the best set
    depth = np.zeros(1, dtype=np.int64)
    value = np.array([np.inf])
    prefix_value = np.zeros(size)
    gradient = np.zeros((size, n))
    gradient[0] = linear
    schur = np.zeros((size if joint else 0, n, n))
    if joint:
        schur[0] = matrix
    limit: Limit | None = None
    try:
        while depth[0] >= 0:
            if time_limit is not None and time.perf_counter() - started >= time_limit:
                limit = Limit.TIME
                break
            if joint:
                _advance_joint(schur, gradient, prefix_value, places, best, depth, value, CHUNK)
            else:
                _advance_selection(matrix, gradient, prefix_value, places, best, depth, value, CHUNK)
    except KeyboardInterrupt:
        limit = Limit.INTERRUPTED
    if best[0] < 0:
        return None, float(value[0]), limit
    chosen = np.zeros(n, dtype=np.bool_)
    chosen[best] = True
    return support.spread(chosen if joint else ~chosen), float(value[0]), limit


@entry(MATRIX, MATRIX, VECTOR, INDEX_ROWS, INDICES, INDICES, VECTOR, INTEGER)
@compiled
def _advance_selection(
    matrix: FloatArray,
    gradient: FloatArray,
    prefix_value: FloatArray,
    places: IntArray,
    best: IntArray,
    depth: IntArray,
    value: FloatArray,
    budget: int,
) -> None:
    """Visit prefixes of the pruned set until `budget` operations are spent or all is seen.

    The rows of `places` are cursor, first and last: ``cursor[d]`` is the next candidate at depth ``d``, so
    that ``cursor[d] - 1`` is the one chosen there, from ``first[d]`` to ``last[d]``;
    ``gradient[d] = c + A y`` for the first ``d`` chosen.
    """
    n = matrix.shape[0]
    cursor, first, last = places[0], places[1], places[2]
    size = cursor.size
    d = depth[0]
    while d >= 0 and budget > 0:
        if d == size - 1:
            for j in range(cursor[d], last[d] + 1):
                candidate = prefix_value[d] + gradient[d, j] + 0.5 * matrix[j, j]
                if candidate < value[0]:
                    value[0] = candidate
                    for q in range(d):
                        best[q] = cursor[q] - 1
                    best[d] = j
            budget -= n
            d -= 1
            continue
        j = cursor[d]
        if j > last[d]:
            d -= 1
            continue
        cursor[d] = j + 1
        prefix_value[d + 1] = prefix_value[d] + gradient[d, j] + 0.5 * matrix[j, j]
        for i in range(j + 1, n):
            gradient[d + 1, i] = gradient[d, i] + matrix[j, i]
        cursor[d + 1] = max(j + 1, first[d + 1])
        budget -= n
        d += 1
    depth[0] = d


@entry(CUBE, MATRIX, VECTOR, INDEX_ROWS, INDICES, INDICES, VECTOR, INTEGER)
@compiled
def _advance_joint(
    schur: FloatArray,
    residual: FloatArray,
    prefix_value: FloatArray,
    places: IntArray,
    best: IntArray,
    depth: IntArray,
    value: FloatArray,
    budget: int,
) -> None:
    """Visit prefixes of the kept set; ``schur[d]`` is ``M`` with the first ``d`` kept eliminated."""
    n = schur.shape[1]
    cursor, first, last = places[0], places[1], places[2]
    size = cursor.size
    d = depth[0]
    while d >= 0 and budget > 0:
        if d == size - 1:
            for j in range(cursor[d], last[d] + 1):
                candidate = prefix_value[d] - 0.5 * residual[d, j] ** 2 / schur[d, j, j]
                if candidate < value[0]:
                    value[0] = candidate
                    for q in range(d):
                        best[q] = cursor[q] - 1
                    best[d] = j
            budget -= n
            d -= 1
            continue
        j = cursor[d]
        if j > last[d]:
            d -= 1
            continue
        cursor[d] = j + 1
        pivot = schur[d, j, j]
        prefix_value[d + 1] = prefix_value[d] - 0.5 * residual[d, j] ** 2 / pivot
        diagonal_only = d + 2 == size
        for i in range(j + 1, n):
            factor = schur[d, j, i] / pivot
            residual[d + 1, i] = residual[d, i] - factor * residual[d, j]
            stop = i + 1 if diagonal_only else n
            for q in range(i, stop):
                schur[d + 1, i, q] = schur[d, i, q] - factor * schur[d, j, q]
        budget -= n if diagonal_only else n * n
        cursor[d + 1] = max(j + 1, first[d + 1])
        d += 1
    depth[0] = d
