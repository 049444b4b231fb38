"""Bounds of many joint programs over one Hessian matrix, as those of the rows of a layer, all at once.

Their split cannot be shared: the best one of a row is poor for the next. Everything else can
(`formulations.relaxations.one_hessian`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from formulations.errors import ArgumentError, ShapeError
from formulations.incumbents import IncumbentPool
from formulations.preparation import prepare_for
from formulations.problem import SPLIT_LARGEST, BlockProblem
from formulations.relaxations.bounds import in_clusters, lower_bound
from formulations.relaxations.certificate import RelaxationCertificate
from formulations.relaxations.cluster_split import CLUSTER
from formulations.relaxations.first_order import StopRule
from formulations.relaxations.one_hessian import fits_one_hessian, relax_over_hessian
from formulations.relaxations.perspective import PerspectiveCertificate
from formulations.solution import BlockSolution, Limits, SolveStats

PROGRAM = "joint"
METHOD = "lower_bound"


def lower_bounds(
    problems: Sequence[BlockProblem],
    *,
    limits: Limits | None = None,
    incumbents: Sequence[BlockSolution] | None = None,
) -> list[BlockSolution]:
    """Bound the joint programs of blocks that have one Hessian matrix in common.

    Each as `lower_bound` bounds one with its diagonal split optimised, in a fraction of the time. Rows of at
    most 600 weights of which that leaves more than 2 % open are then bounded one by one with a split in
    clusters of four weights; `lower_bound` alone goes on to eight.

    Parameters
    ----------
    problems : sequence of BlockProblem
        With the same `hessian` and `damping`; weights, gradients and counts are their own.
    limits : Limits, optional
        `time_limit` and `iteration_limit` (steps of ADMM) are for all of them together; what is proved by
        then is valid. `rel_gap` decides which bound proves an incumbent optimal.
    incumbents : sequence of BlockSolution, optional
        A set of each; results are never worse, and how far it is from the bound weighs the barrier.

    Returns
    -------
    list of BlockSolution
        With bound and certificate, in the order of `problems`.

    Raises
    ------
    ArgumentError
        If the blocks do not share a Hessian matrix, or there are more or fewer incumbents than blocks.
    NotPositiveDefiniteError
        If ``H`` is singular.

    Notes
    -----
    O(n^3) once, O(n^3) a row and change of its split, in single precision, and O(n^2) a row and step;
    clusters take some five times as long as all that. A support that is no count, and a count of none or
    all, is bounded by itself.
    """
    limits, started = limits or Limits(), time.perf_counter()
    _check(problems, incumbents)
    pools = [
        IncumbentPool(problem, PROGRAM, None if incumbents is None else incumbents[number])
        for number, problem in enumerate(problems)
    ]
    together = [number for number, problem in enumerate(problems) if fits_one_hessian(problem)]
    found: dict[int, BlockSolution] = {}
    if together:
        rows = [problems[number] for number in together]
        solved = _together(rows, [pools[number] for number in together], limits, started)
        found = dict(zip(together, solved, strict=True))
    for number, problem in enumerate(problems):
        if number not in found:
            known = None if incumbents is None else incumbents[number]
            left = limits.left(started)
            found[number] = lower_bound(problem, PROGRAM, limits=left, incumbent=known, diagonal_split=True)
    return [found[number] for number in range(len(problems))]


def _check(problems: Sequence[BlockProblem], incumbents: Sequence[BlockSolution] | None) -> None:
    if incumbents is not None and len(incumbents) != len(problems):
        found = f"{len(incumbents)} for {len(problems)} blocks"
        raise ShapeError("incumbents", found, "pass one for each block, or None")
    for number, problem in enumerate(problems):
        first = problems[0].hessian
        if problem.hessian is None or first is None:
            remedy = "pass blocks with a Hessian matrix, and others to `lower_bound` one by one"
            raise ArgumentError("problems", f"block {number} has rows", remedy)
        same = problem.hessian is first or np.array_equal(problem.hessian, first)
        if not same or problem.damping != problems[0].damping:
            remedy = "pass blocks of one Hessian and damping together"
            raise ArgumentError("problems", f"block {number} has another Hessian than the first", remedy)


def _together(
    problems: list[BlockProblem], pools: list[IncumbentPool], limits: Limits, started: float
) -> list[BlockSolution]:
    """Bound blocks that keep a count of their weights, neither none nor all."""
    prepare_for(problems[0], METHOD, PROGRAM)
    stop = StopRule(limits, started, math.inf)
    found = relax_over_hessian(problems, pools, stop, limits.rel_gap)
    each = zip(problems, pools, found, strict=True)
    return [_certified(*row, limits, stop, started) for row in each]


def _certified(
    problem: BlockProblem,
    pool: IncumbentPool,
    plain: PerspectiveCertificate,
    limits: Limits,
    stop: StopRule,
    started: float,
) -> BlockSolution:
    """Return the best set that is known and what is proved, in clusters where that pays."""
    certificate: RelaxationCertificate = plain
    if problem.n <= SPLIT_LARGEST:
        certificate = in_clusters(problem, pool, stop, plain, size=CLUSTER)
    bound = certificate.lower_bound(problem)
    return pool.solution(
        method=METHOD,
        rel_gap=limits.rel_gap,
        bound=bound,
        limit=stop.limit,
        certificate=certificate if math.isfinite(bound) else None,
        stats=SolveStats(seconds=time.perf_counter() - started, iterations=stop.steps),
    )
