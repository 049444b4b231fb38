"""Good sets on one dense block: greedy elimination and 1-swap local search for both programs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from formulations.dense_forms import DenseForm, dense_form, folded_form
from formulations.errors import ArgumentError, ShapeError
from formulations.group_search import greedy_groups, swap_groups
from formulations.loss import solved_weights, step_loss, trivial_bound
from formulations.preparation import prepare_for
from formulations.problem import BlockProblem, BoolArray, FloatArray, check_program
from formulations.solution import (
    BlockSolution,
    Certificate,
    Limit,
    Limits,
    SolveStats,
    Termination,
    TracePoint,
    never,
    stated_support,
    status_of,
)
from formulations.support import Support
from formulations.swap_kernels import (
    NO_CELLS,
    prune_joint,
    prune_selection,
    swap_joint,
    swap_selection,
    sweep,
)

ELEMENTS_A_LOOK = 20_000_000
"""Entries of a matrix that greedy elimination updates between two looks at the clock (some milliseconds)."""
SWAPS_PER_CALL = 16
"""Swaps between two looks at the clock; the joint tableau is rebuilt as often against drift."""
Heuristic = Callable[..., BlockSolution | None]
"""``heuristic(problem, program, *, limits, incumbent)``: a solution no worse than `incumbent`, where there is
one; None where it cannot keep to the limits."""


class IncumbentPool:
    """The best set so far of one solve, every offer evaluated by `formulations.loss`.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    incumbent : BlockSolution, optional
        Warm start; the pool never gets worse than it.

    Raises
    ------
    ShapeError
        If the warm start belongs to a block of another size.
    ArgumentError
        If the warm start is no set of the support.
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular to rounding: decided here for every method.
    """

    def __init__(self, problem: BlockProblem, program: str, incumbent: BlockSolution | None = None) -> None:
        self.problem = problem
        self.program = check_program(program)
        if program == "joint":
            problem.require_definite()
        self.keep: BoolArray | None = None
        self.weights: FloatArray | None = None
        self.objective = float("inf")
        if incumbent is not None and not isinstance(incumbent, BlockSolution):
            remedy = "pass a BlockSolution, or None"
            raise ArgumentError("incumbent", f"a {type(incumbent).__name__}", remedy)
        if incumbent is not None and incumbent.keep is not None:
            self.offer(checked_incumbent(problem, incumbent))

    def offer(self, keep: BoolArray) -> bool:
        """Take `keep` if the support has it and it is better than what is here; whether it was taken."""
        if not self.problem.allows(keep):
            return False
        weights = solved_weights(self.problem, keep, self.program)
        value = step_loss(self.problem, weights - self.problem.weights)
        if self.keep is not None and not value < self.objective:
            return False
        self.keep, self.weights = keep.copy(), weights
        self.objective = value
        return True

    def offer_magnitude_if_empty(self) -> None:
        """Have at least the set that removes the smallest weights."""
        if self.keep is None:
            self.offer(magnitude_keep(self.problem))

    def solution(
        self,
        *,
        method: str,
        rel_gap: float | None = None,
        bound: float = -math.inf,
        finished: bool = False,
        limit: Limit | None = None,
        certificate: Certificate | None = None,
        stats: SolveStats | None = None,
        trace: tuple[TracePoint, ...] = (),
    ) -> BlockSolution:
        """Return the pool's best set as a `BlockSolution`, with the status that the gap allows.

        Parameters
        ----------
        method : str
        rel_gap : float, optional
            The gap asked of a method that bounds; None for one that does not.
        bound : float
            Proved bound, minus infinity if there is none. One above the objective is lowered to it.
        finished : bool
            The method has come to its end: a gap that is left is stated as `Limit.GAP`, and a bound below
            that of a loss model that is never negative is raised to it.
        limit, certificate, stats, trace
            Fields of the solution.
        """
        assert self.keep is not None
        proved: float | None = None
        termination = Termination.FEASIBLE
        if rel_gap is not None:
            trivial = trivial_bound(self.problem) if finished and math.isfinite(bound) else None
            bound = min(bound if trivial is None else max(bound, trivial), self.objective)
            proved = bound if math.isfinite(bound) else None
            termination = status_of(self.objective, proved, rel_gap)
        if termination is Termination.OPTIMAL:
            limit = None
        elif finished and limit is None:
            limit = Limit.GAP
        return BlockSolution(
            keep=self.keep,
            weights=self.weights,
            objective=self.objective,
            bound=proved,
            termination=termination,
            limit=limit,
            program=self.program,
            method=method,
            support=stated_support(self.problem),
            rel_gap=rel_gap if termination is Termination.OPTIMAL else None,
            certificate=certificate,
            stats=stats or SolveStats(),
            trace=trace,
        )


def checked_incumbent(problem: BlockProblem, incumbent: BlockSolution) -> BoolArray:
    """Return the kept set of a warm start, refused unless it fits the block."""
    if incumbent.keep is None:
        raise ArgumentError("incumbent", "it has no set", "pass a solution with one, or None")
    if incumbent.keep.shape != (problem.n,):
        raise ShapeError("incumbent", f"{incumbent.keep.size} weights", f"pass one of {problem.n}")
    if not problem.allows(incumbent.keep):
        pruned = problem.n - int(incumbent.keep.sum())
        asked = f"prune {problem.n_prune}" if problem.support is None else f"keep {problem.support}"
        raise ArgumentError("incumbent", f"prunes {pruned} weights", asked)
    return incumbent.keep


def magnitude_keep(problem: BlockProblem) -> BoolArray:
    """Keep the weights of largest magnitude, in total where they are kept in groups; ties by index."""
    if problem.support is not None:
        return problem.support.best(np.abs(problem.weights))
    keep = np.ones(problem.n, dtype=np.bool_)
    keep[np.argsort(np.abs(problem.weights), kind="stable")[: problem.n_prune]] = False
    return keep


def greedy(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits | None = None,
    incumbent: BlockSolution | None = None,
) -> BlockSolution:
    """Remove one weight after another, each time the one that costs least.

    Where the support keeps so many of every few, only weights of cells that have not lost all theirs yet are
    looked at; groups go whole. Joint is greedy OBS with exact downdates of the inverse; selection keeps
    ``A y`` up to date.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    limits : Limits, optional
        `time_limit`, looked at between steps: what is left to remove then goes at once. With one of 0 the
        warm start or the smallest weights come back.
    incumbent : BlockSolution, optional
        Warm start; the result is never worse.

    Returns
    -------
    BlockSolution
        FEASIBLE, without a bound.

    Raises
    ------
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.

    Notes
    -----
    O(n^3) joint, O(n k) selection after the dense form. Source: Hassibi & Stork (1993).
    """
    limits = limits or Limits()
    check_program(program)
    prepare_for(problem, "greedy_obs", program)
    started = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    stopped = partial(limits.out_of_time, started)
    if not stopped():
        form = dense_form(problem, program)
        pool.offer(greedy_keep(form, problem.n_prune, program, stopped, problem.support))
    limit = Limit.TIME if stopped() else None
    pool.offer_magnitude_if_empty()
    stats = SolveStats(seconds=time.perf_counter() - started)
    return pool.solution(method="greedy_obs", limit=limit, stats=stats)


def greedy_keep(
    form: DenseForm,
    n_prune: int,
    program: str,
    stopped: Callable[[], bool] = never,
    support: Support | None = None,
) -> BoolArray:
    """Kept set of the greedy elimination on a dense form.

    Once `stopped` says so, what is left to remove in the joint program goes at once, by its cost then.
    """
    n = form.linear.size
    size = n_prune if support is None else support.pruned(n)
    if program == "selection":
        matrix, linear = folded_form(form, support)
        keep = np.asarray(~prune_selection(matrix, linear, size))
        return keep if support is None else support.spread(keep)
    if n == 0:
        return np.zeros(0, dtype=np.bool_)
    if stopped():
        return _without_cheapest(form.linear**2, np.zeros(n, dtype=np.bool_), n_prune, support)
    inverse: FloatArray = np.linalg.inv(form.matrix).astype(np.float64)
    inverse = 0.5 * (inverse + inverse.T)
    minimiser = inverse @ form.linear
    pruned = np.zeros(n, dtype=np.bool_)
    if support is not None and support.unit is not None:
        return greedy_groups(inverse, minimiser, support, stopped)
    period = max(1, ELEMENTS_A_LOOK // (n * n))
    for done in range(0, n_prune, period):
        if stopped():
            return _without_cheapest(minimiser**2 / np.diagonal(inverse), pruned, n_prune - done, support)
        prune_joint(inverse, minimiser, pruned, min(period, n_prune - done), size)
    return ~pruned


def _without_cheapest(costs: FloatArray, pruned: BoolArray, count: int, support: Support | None) -> BoolArray:
    """Return the kept set once the `count` cheapest of the weights that are not pruned go too."""
    if support is not None:
        # What is pruned already is the cheapest.
        return support.best(np.where(pruned, -1.0, costs))
    keep = ~pruned
    keep[np.argsort(np.where(pruned, np.inf, costs), kind="stable")[:count]] = False
    return keep


def swap_search(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits | None = None,
    incumbent: BlockSolution | None = None,
    restarts: int = 0,
) -> BlockSolution:
    """Best-improvement 1-swap local search from the warm start (or the greedy set).

    A swap is one kept for one pruned weight, of the same cell where the support keeps so many of every few;
    where it keeps groups, one group for another.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    limits : Limits, optional
        `time_limit`, `iteration_limit` (swaps in all) and `seed`.
    incumbent : BlockSolution, optional
        Start of the search; the greedy set without one.
    restarts : int, default 0
        Further descents, each from the best set with a few random swaps.

    Returns
    -------
    BlockSolution
        FEASIBLE, without a bound. Without a limit no swap improves it by more than rounding.

    Raises
    ------
    ArgumentError
        If `restarts` is negative.
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.

    Notes
    -----
    A step evaluates all ``k (n - k)`` swaps in O(1) each: selection from ``v = c + A y``, joint from
    the swept tableau of ``H`` (Beale, Kendall & Mann 1967); then one O(n) or two O(n^2) updates.
    """
    if restarts < 0:
        raise ArgumentError("restarts", f"{restarts}", "pass 0 or more")
    limits = limits or Limits()
    check_program(program)
    prepare_for(problem, "swap_search", program)
    started = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    swaps = 0
    limit: Limit | None = Limit.TIME
    stopped = partial(limits.out_of_time, started)
    if not stopped():
        form = dense_form(problem, program)
        start = pool.keep
        if start is None:
            start = greedy_keep(form, problem.n_prune, program, stopped, problem.support)
        pool.offer(start)
        generator = np.random.default_rng(limits.seed)
        for attempt in range(restarts + 1):
            best = pool.keep
            assert best is not None
            keep = start if attempt == 0 else kicked(best, generator, support=problem.support)
            keep, steps, limit = descend(form, keep, program, limits, started, swaps, support=problem.support)
            swaps += steps
            pool.offer(keep)
            if limit is not None:
                break
    pool.offer_magnitude_if_empty()
    stats = SolveStats(seconds=time.perf_counter() - started, iterations=swaps)
    return pool.solution(method="swap_search", limit=limit, stats=stats)


def offer_searched(
    heuristic: Heuristic | None,
    pool: IncumbentPool,
    starts: tuple[BlockSolution | None, ...],
    limits: Limits,
    started: float,
) -> bool:
    """Offer the pool what a heuristic makes of each start in the time that is left; whether it made anything.

    None is the start that the heuristic has of its own. Raises `KeyboardInterrupt` where one came within it.
    """
    if heuristic is None:
        return False
    searched = False
    for start in starts:
        if limits.out_of_time(started):
            break
        left = replace(limits.left(started), iteration_limit=None)
        found = heuristic(pool.problem, pool.program, limits=left, incumbent=start)
        if found is None:
            continue
        assert found.keep is not None
        pool.offer(found.keep)
        if found.limit is Limit.INTERRUPTED:
            raise KeyboardInterrupt
        searched = True
    return searched


def kicked(
    keep: BoolArray, generator: np.random.Generator, share: float = 0.05, *, support: Support | None = None
) -> BoolArray:
    """Return a copy of `keep` with a few random kept and pruned weights exchanged."""
    if support is not None:
        return _kicked_inside(keep, generator, share, support)
    kept, pruned = np.flatnonzero(keep), np.flatnonzero(~keep)
    count = min(kept.size, pruned.size, max(2, round(share * min(kept.size, pruned.size))))
    changed = keep.copy()
    changed[generator.choice(kept, count, replace=False)] = False
    changed[generator.choice(pruned, count, replace=False)] = True
    return changed


def _kicked_inside(
    keep: BoolArray, generator: np.random.Generator, share: float, support: Support
) -> BoolArray:
    """Return a set of the support that differs from `keep` by a few random exchanges of units."""
    units = support.unit_keep(keep).copy()
    start = support.cell_starts(keep.size)
    few = max(2, round(share * min(int(units.sum()), int((~units).sum()))))
    for _ in range(few if units.any() else 0):
        leave = int(generator.choice(np.flatnonzero(units)))
        cell = int(np.searchsorted(start, leave, side="right")) - 1
        others = start[cell] + np.flatnonzero(~units[start[cell] : start[cell + 1]])
        if others.size:
            units[leave], units[int(generator.choice(others))] = False, True
    return support.spread(units)


def descend(
    form: DenseForm,
    keep: BoolArray,
    program: str,
    limits: Limits,
    started: float,
    swaps_done: int = 0,
    *,
    support: Support | None = None,
) -> tuple[BoolArray, int, Limit | None]:
    """Swap until no swap improves or a limit comes: the set, the swaps made, the limit.

    Where ``H`` is close to singular the gains that a sweep carries along are rounding, and swaps may go round
    in a circle: a call that leaves no lower value, computed afresh, is undone and ends the search.
    """
    size = NO_CELLS if support is None else support.kept(keep.size)
    tied = None if support is None or support.unit is None else support
    matrix, linear = form.matrix, form.linear
    if tied is not None and program == "selection":
        # In units a support of groups is a count.
        matrix, linear = folded_form(form, tied)
        keep = tied.unit_keep(keep)
    keep = keep.copy()
    swaps = 0
    limit: Limit | None = None
    least, best = math.inf, keep
    while True:
        allowed = SWAPS_PER_CALL
        if limits.iteration_limit is not None:
            allowed = min(allowed, limits.iteration_limit - swaps_done - swaps)
        if allowed <= 0:
            limit = Limit.ITERATION
            break
        if limits.out_of_time(started):
            limit = Limit.TIME
            break
        value, table, state = _valued(matrix, linear, keep, program)
        if not value < least:
            keep = best
            break
        least, best = value, keep.copy()
        if program == "selection":
            pruned = ~keep
            made = swap_selection(matrix, linear, pruned, allowed, size)
            keep = ~pruned
        elif tied is not None:
            # One exchange: the tableau is made anew for the next.
            allowed = 1
            made = swap_groups(table, state, keep, tied)
        else:
            made = swap_joint(table, state, keep, allowed, size)
        swaps += made
        if made < allowed:
            break
    return (tied.spread(keep) if tied is not None and program == "selection" else keep), swaps, limit


def _valued(
    matrix: FloatArray, linear: FloatArray, keep: BoolArray, program: str
) -> tuple[float, FloatArray, FloatArray]:
    """Return the form value of a set, and what the next swaps of the joint program start from.

    The value is infinite where the matrix of what is kept is singular: nothing says which exchange gains.
    """
    if program == "selection":
        chosen = np.flatnonzero(~keep)
        value = 0.5 * float(matrix[np.ix_(chosen, chosen)].sum()) + float(linear[chosen].sum())
        return value, matrix, linear
    try:
        table, state = joint_tableau(matrix, linear, keep)
    except np.linalg.LinAlgError:
        return math.inf, matrix, linear
    return -0.5 * float(linear[keep] @ state[keep]), table, state


def joint_tableau(matrix: FloatArray, linear: FloatArray, keep: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Return the symmetric swept tableau of ``M`` over the kept set, and its state vector.

    ``T_KK = -M_KK^-1``, ``T_KP = M_KK^-1 M_KP``, ``T_PP = M_PP - M_PK M_KK^-1 M_KP``; the state holds
    the minimiser on kept entries and the residual ``l - M u`` on pruned ones.
    """
    kept, pruned = np.flatnonzero(keep), np.flatnonzero(~keep)
    if 4 * kept.size < keep.size:
        table, state = matrix.copy(), linear.copy()
        for index in kept:
            sweep(table, state, int(index), 1.0)
        return table, state
    table, state = np.empty_like(matrix), np.empty_like(linear)
    inverse = np.linalg.inv(matrix[np.ix_(kept, kept)])
    inverse = 0.5 * (inverse + inverse.T)
    cross = matrix[np.ix_(kept, pruned)]
    carried = inverse @ cross
    table[np.ix_(kept, kept)] = -inverse
    table[np.ix_(kept, pruned)] = carried
    table[np.ix_(pruned, kept)] = carried.T
    table[np.ix_(pruned, pruned)] = matrix[np.ix_(pruned, pruned)] - cross.T @ carried
    state[kept] = inverse @ linear[kept]
    state[pruned] = linear[pruned] - cross.T @ state[kept]
    return table, state
