"""Outer approximation for both programs: cuts on a mixed-integer linear master that HiGHS solves.

Both programs minimise a convex function of the binaries alone (`formulations.cut_planes`). The master
``min t`` over planes below that function, ``sum x = count`` and ``x`` binary, is solved again after
each round of planes (multi-tree): first as a linear program, at fractional points, then as a
mixed-integer one, at the sets it proposes. Its dual bound is a bound on the program, and starts from
the certified bound of the root relaxation. Planes at fractional points use the plain diagonal split; the
split that makes the root bound best was measured to make those masters harder. A set gets two planes,
one from either split: together they need far fewer rounds where the damping is small.

Sources: Duran and Grossmann (1986); Bertsimas and Van Parys (2020).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse import csr_matrix

from formulations.cut_planes import Cut, CutSource, cut_sources
from formulations.incumbents import Heuristic, IncumbentPool, offer_searched, swap_search
from formulations.milp import DUAL_TOLERANCE, Milp, MilpControls, MilpResult, run_milp
from formulations.models.scaling import scale_block
from formulations.preparation import prepare_for
from formulations.problem import SPLIT_LARGEST, BlockProblem, BoolArray, FloatArray, check_program
from formulations.relaxations.bounds import root_bounds
from formulations.solution import BlockSolution, Limit, Limits, TracePoint
from formulations.solvers.conclusion import CONSTANT_ERROR, Outcome, conclude, known_set, only_set
from formulations.support import counts_of

METHOD = "outer_approximation"
LP_ROUNDS = 60
"""Most rounds of cuts at fractional points."""
LP_PRECISION = 0.01
"""Share of the open gap to which the planes are to describe the relaxation at its optimum."""
SMALLEST_UNIT = 1e-6
"""Least unit of the master's objective, against cuts with huge slopes."""
LOOSE_GAP = 0.2
"""Share of the open gap at which an early master may stop: its cuts matter, not its proof."""


@dataclass
class _Search:
    """State of one solve: the cuts, the best set and the proved bound (scaled units)."""

    problem: BlockProblem
    sources: list[CutSource]
    scale: float
    limits: Limits
    began: float
    best: BlockSolution
    bound: float = -math.inf
    cuts: list[Cut] = field(default_factory=list)
    visited: set[bytes] = field(default_factory=set)
    nodes: int = 0
    rounds: int = 0
    interrupted: bool = False
    trace: list[TracePoint] = field(default_factory=list)

    @property
    def value(self) -> float:
        """Objective of the best set."""
        assert self.best.objective is not None
        return self.best.objective / self.scale

    @property
    def unit(self) -> float:
        """Unit of ``t`` in the master, of the order of the optimum: tolerances are absolute."""
        return max(abs(self.value), SMALLEST_UNIT)

    @property
    def wanted_gap(self) -> float:
        """Absolute gap at which the search is done."""
        return self.limits.rel_gap * max(abs(self.value), 1e-12 / self.scale)

    @property
    def done(self) -> bool:
        """Whether the bound has met the best set."""
        return self.value - self.bound <= self.wanted_gap

    @property
    def error(self) -> float:
        """How far tolerances and rounding may lift a bound of the master."""
        largest = max((self._size(cut) for cut in self.cuts), default=0.0)
        return self.unit * DUAL_TOLERANCE * (self.best.keep.size + 1.0) + CONSTANT_ERROR * largest  # type: ignore[union-attr]

    def _size(self, cut: Cut) -> float:
        """Size of the terms that cancel in the value of a cut."""
        return abs(cut.constant) + self.count * float(np.abs(cut.slopes).max(initial=0.0))

    @property
    def count(self) -> int:
        """How many binaries are 1; the most of them where sets differ in size."""
        problem = self.problem
        return problem.n_keep if self.one_means_kept else problem.sets.most_pruned(problem.n)

    @property
    def one_means_kept(self) -> bool:
        """Whether a 1 keeps its weight or prunes it."""
        return self.best.program == "joint"

    def seconds_left(self) -> float | None:
        """Seconds until the time limit, None without one."""
        limit = self.limits.time_limit
        return None if limit is None else limit - (time.perf_counter() - self.began)

    def stopped(self) -> Limit | None:
        """Return the limit that has been reached, if one has."""
        left = self.seconds_left()
        if self.interrupted:
            return Limit.INTERRUPTED
        if left is not None and left <= 0.0:
            return Limit.TIME
        if self.limits.node_limit is not None and self.nodes >= self.limits.node_limit:
            return Limit.NODE
        if self.limits.iteration_limit is not None and self.rounds >= self.limits.iteration_limit:
            return Limit.ITERATION
        return None

    def add(self, cut: Cut) -> None:
        """Add a cut and the bound that it proves on its own."""
        self.cuts.append(cut)
        support = self.problem.support
        if support is None:
            cheapest = float(np.partition(cut.slopes, self.count - 1)[: self.count].sum())
        elif self.one_means_kept:
            cheapest = -support.largest_sum(-cut.slopes)
        else:
            cheapest = -support.largest_pruned_sum(-cut.slopes)
        self.raise_bound(cut.constant + cheapest - CONSTANT_ERROR * self._size(cut))

    def raise_bound(self, bound: float) -> None:
        """Take over a proved bound and note the progress."""
        if bound <= self.bound:
            return
        self.bound = bound
        seconds = time.perf_counter() - self.began
        self.trace.append(
            TracePoint(
                seconds=seconds,
                nodes=self.nodes,
                objective=self.best.objective,
                bound=min(bound, self.value) * self.scale,
            )
        )

    def visit(self, point: FloatArray) -> bool:
        """Add the cut of the set that `point` proposes, and its objective; False if it is not new."""
        keep = self.keep_of(point)
        key = np.packbits(keep).tobytes()
        if key in self.visited:
            return False
        self.visited.add(key)
        proposed = conclude(self.problem, self.best, self.limits, self.began, Outcome(candidates=[keep]))
        if proposed.objective < self.best.objective:  # type: ignore[operator]
            self.best = proposed
        ones = keep if self.one_means_kept else ~keep
        for source in self.sources:
            self.add(source.cut(ones.astype(np.float64), self.bound))
        return True

    def keep_of(self, point: FloatArray) -> BoolArray:
        """Kept set of the support that is nearest to `point`."""
        if self.problem.support is not None:
            return self.problem.support.best_mean(point if self.one_means_kept else -point)
        chosen = np.zeros(point.size, dtype=np.bool_)
        chosen[np.argsort(-point, kind="stable")[: self.count]] = True
        return chosen if self.one_means_kept else ~chosen


def outer_approximation(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits | None = None,
    incumbent: BlockSolution | None = None,
    heuristic: Heuristic | None = None,
) -> BlockSolution:
    """Solve a program to proven optimality by outer approximation on HiGHS.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    limits : Limits, optional
        `iteration_limit` counts masters solved; `node_limit` their nodes together.
    incumbent : BlockSolution, optional
        Warm start, improved by swaps; the greedy set without one.
    heuristic : callable, optional
        As of `branch_and_bound`; where it finds sets, they stand in place of those of swaps.

    Returns
    -------
    BlockSolution
        With the bound of the last master, lowered by HiGHS's tolerances. Ctrl-C returns the best set and the
        bound so far with `Limit.INTERRUPTED`.

    Raises
    ------
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.
    ArgumentError
        If the incumbent does not fit the block.
    """
    check_program(program)
    prepare_for(problem, METHOD, program)
    began = time.perf_counter()
    limits = limits or Limits()
    if program == "joint":
        problem.require_definite()
    # The greedy set of a large block takes longer than what comes after it.
    quick = replace(limits, time_limit=0.0) if problem.n > SPLIT_LARGEST else limits
    known = known_set(problem, program, METHOD, quick, incumbent)
    if problem.n_prune in (0, problem.n):
        return only_set(problem, known, limits, began)
    if limits.out_of_time(began):
        return conclude(problem, known, limits, began, Outcome(limit=Limit.TIME))
    try:
        known, roots = _root(problem, known, limits, began, heuristic, incumbent)
    except KeyboardInterrupt:
        return conclude(problem, known, limits, began, Outcome(limit=Limit.INTERRUPTED))
    floor = max(roots, key=lambda root: -math.inf if root.bound is None else root.bound)
    # The planes of a large block take longer than its first bound.
    ahead = roots[0].stats.seconds if problem.n > SPLIT_LARGEST else 0.0
    if limits.out_of_time(began, ahead):
        bound, evidence = floor.bound, floor.certificate
        return conclude(
            problem, known, limits, began, Outcome(bound=bound, certificate=evidence, limit=Limit.TIME)
        )
    search = _prepared(problem, known, roots, limits, began)
    remark = ""
    try:
        if search.sources:
            _linear_phase(search)
            remark = _integer_phase(search)
    except KeyboardInterrupt:
        search.interrupted = True
    limit = None if search.done else search.stopped()
    proved = search.bound * search.scale if math.isfinite(search.bound) else None
    if proved is not None and floor.bound is not None:
        # The way to scaled units and back is not exact.
        proved = max(proved, floor.bound)
    return conclude(
        problem,
        search.best,
        limits,
        began,
        Outcome(
            bound=proved,
            slack=search.error * search.scale,
            finished=limit is None,
            limit=limit,
            stats={
                "nodes": search.nodes,
                "iterations": search.rounds,
                "message": remark,
                "extra": {"cuts": len(search.cuts)},
            },
            trace=tuple(search.trace),
            certificate=floor.certificate,
        ),
    )


def _root(
    problem: BlockProblem,
    known: BlockSolution,
    limits: Limits,
    began: float,
    heuristic: Heuristic | None,
    incumbent: BlockSolution | None,
) -> tuple[BlockSolution, list[BlockSolution]]:
    """Return the known set improved, and `root_bounds`, whichever is quicker first."""
    program = known.program
    # Masters are what `iteration_limit` counts.
    limits = replace(limits, iteration_limit=None)
    if problem.n > SPLIT_LARGEST:
        roots = list(root_bounds(problem, program, limits=limits.left(began), incumbent=known))
        start = _best((known, *roots))
        pool = IncumbentPool(problem, program, known)
        if offer_searched(heuristic, pool, (incumbent, start), limits, began):
            best = pool.solution(method=METHOD)
        else:
            best = swap_search(problem, program, limits=limits.left(began, 0.5), incumbent=start)
    else:
        best = swap_search(problem, program, limits=limits.left(began), incumbent=known)
        roots = list(root_bounds(problem, program, limits=limits.left(began), incumbent=best))
    return known_set(problem, program, METHOD, limits, _best((best, *roots))), roots


def _best(solutions: Iterable[BlockSolution]) -> BlockSolution:
    """Return the solution of least objective, the first of equals."""
    return min(solutions, key=lambda solution: float(solution.objective))  # type: ignore[arg-type]


def _prepared(
    problem: BlockProblem, known: BlockSolution, roots: list[BlockSolution], limits: Limits, began: float
) -> _Search:
    """Seed the cuts with the set, and with the relaxation of the root that knows a set where there is one."""
    program = known.program
    block = scale_block(problem)
    search = _Search(
        problem=problem,
        sources=cut_sources(problem, block, program, roots[-1].certificate),
        scale=block.objective_scale,
        limits=limits,
        began=began,
        best=known,
    )
    for root in roots:
        if root.bound is not None:
            search.raise_bound(root.bound / search.scale)
    assert known.keep is not None
    search.visit((known.keep if search.one_means_kept else ~known.keep).astype(np.float64))
    return search


def _linear_phase(search: _Search) -> None:
    """Cut at fractional points until the planes describe the relaxation.

    The points are drawn halfway towards the best point so far (in-out separation), which needs far
    fewer rounds than Kelley's corners. The phase ends when the function at that point is within a
    small share of the open gap of the master's value.
    """
    n, support = search.problem.n, search.problem.sets
    size = support.kept(n) if search.one_means_kept else support.pruned(n)
    centre = np.full(n, int(counts_of(size).sum()) / support.n_units(n))
    for _ in range(LP_ROUNDS):
        if search.done or search.stopped():
            break
        result = _solve_master(search, integer=False, rel_gap=0.0)
        if result.bound is None or result.point is None:
            # Infeasible once the planes meet the best set: the integer master draws the conclusion.
            break
        search.raise_bound(result.bound * search.unit - search.error)
        centre = 0.5 * (centre + result.point[:n])
        cut = search.sources[0].cut(centre, search.bound)
        search.add(cut)
        if cut.constant + cut.slopes @ centre - result.bound * search.unit < LP_PRECISION * (
            search.value - search.bound
        ):
            break


def _integer_phase(search: _Search) -> str:
    """Solve mixed-integer masters, loose at first, until the bound meets the best set.

    Returns what HiGHS said of a master that it could not solve, as where the terms of the planes differ by
    more orders of magnitude than its arithmetic holds. Set and bound stand without it.
    """
    n = search.problem.n
    share = LOOSE_GAP
    while not search.done and search.stopped() is None:
        proposals: list[FloatArray] = []
        open_gap = search.value - search.bound
        loose = share * open_gap / max(abs(search.value), 1e-12)
        result = _solve_master(
            search, integer=True, rel_gap=max(loose, 0.25 * search.limits.rel_gap), proposals=proposals
        )
        search.rounds += 1
        search.nodes += result.nodes
        if result.status == "Infeasible":
            # No set beats the best one by more than the wanted gap, which the master excluded.
            search.raise_bound(search.value - 0.5 * search.wanted_gap - search.error)
            return ""
        if result.bound is not None:
            search.raise_bound(result.bound * search.unit - search.error)
        if result.point is not None:
            proposals.append(result.point)
        fresh = [search.visit(point[:n]) for point in proposals[-10:]]
        if result.status not in (
            "Optimal",
            "Time limit reached",
            "Solution limit reached",
            "Interrupted by user",
        ):
            return f"HiGHS stopped with status {result.status!r}"
        if not any(fresh):
            if share == 0.0:
                return ""
            share = 0.0
    return ""


def _solve_master(
    search: _Search, *, integer: bool, rel_gap: float, proposals: list[FloatArray] | None = None
) -> MilpResult:
    """Solve ``min t`` over the cuts and the rows of the support, below the best set if `integer`."""
    n = search.problem.n
    slopes = np.array([cut.slopes for cut in search.cuts]) / search.unit
    # Every set pays at least what each cut says: t - slopes.x >= constant.
    cut_rows = np.hstack([-slopes, np.ones((len(search.cuts), 1))])
    least = np.array([cut.constant for cut in search.cuts]) / search.unit
    # The set is one of the support.
    equations = search.problem.sets.equations(n, search.one_means_kept)
    size_rows = np.zeros((len(equations), n + 1))
    for row, (index, value, _) in enumerate(equations):
        size_rows[row, index] = value
    right = np.array([right for _, _, right in equations])
    ceiling = (search.value - 0.5 * search.wanted_gap if integer else search.value) / search.unit
    floor = search.bound / search.unit
    milp = Milp(
        cost=np.append(np.zeros(n), 1.0),
        lower=np.append(np.zeros(n), floor),
        upper=np.append(np.ones(n), max(ceiling, floor)),
        integer=np.append(np.full(n, integer), False),
        matrix=csr_matrix(np.vstack([size_rows, cut_rows])),
        row_lower=np.append(right, least),
        row_upper=np.append(right, np.full(len(search.cuts), np.inf)),
    )
    nodes = search.limits.node_limit
    left = search.seconds_left()
    controls = MilpControls(
        seconds=None if left is None else max(left, 1e-3),
        rel_gap=rel_gap,
        node_limit=None if nodes is None else max(nodes - search.nodes, 1),
        threads=search.limits.threads,
        seed=search.limits.seed,
        on_point=None if proposals is None else proposals.append,
    )
    result = run_milp(milp, controls)
    search.interrupted |= result.interrupted
    return result
