"""Bounds of many joint programs over one Hessian matrix, as those of the rows of a layer, all at once.

Their split cannot be shared: the best one of a row is poor for the next. Everything else can. Together the
rows are one block whose channels all have the same matrix, so that one eigendecomposition and products of
matrices serve all steps of ADMM, and each row has its own split, count and certificate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from formulations.channels import ChannelTerm
from formulations.errors import ArgumentError, ShapeError
from formulations.incumbents import IncumbentPool
from formulations.preparation import prepare_for
from formulations.problem import BlockProblem, FloatArray
from formulations.relaxations.bounds import in_clusters, lower_bound
from formulations.relaxations.certificate import RelaxationCertificate
from formulations.relaxations.certified import provable_split
from formulations.relaxations.channel_relaxation import JointChannels, search_by_channels
from formulations.relaxations.cluster_split import CLUSTER
from formulations.relaxations.first_order import StopRule
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.relaxations.only_set import has_one_set
from formulations.relaxations.perspective import PerspectiveCertificate, round_joint
from formulations.solution import BlockSolution, Limits, SolveStats, Subject
from formulations.support import Cells

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
    together = [
        number
        for number, problem in enumerate(problems)
        if problem.support is None and not has_one_set(problem) and bool(problem.weights.any())
    ]
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
    first, many, n = problems[0], len(problems), problems[0].n
    assert first.hessian is not None
    prepare_for(first, METHOD, PROGRAM)
    term = ChannelTerm(
        moments=(first.hessian,),
        start=np.arange(many + 1) * n,
        moment=np.zeros(many, dtype=np.int64),
        scale=np.ones(many),
        inputs=np.tile(np.arange(n), many),
    )
    block = BlockProblem(
        weights=np.concatenate([problem.weights for problem in problems]),
        rows=np.zeros((0, many * n)),
        channels=term,
        damping=first.damping,
        gradient=np.concatenate([problem.gradient_or_zero for problem in problems]),
        n_prune=sum(problem.n_prune for problem in problems),
    )
    counts = np.array([problem.n_keep for problem in problems])
    program = JointChannels(block, Cells(term.start, counts))
    start = np.concatenate([np.zeros(n) if pool.weights is None else pool.weights for pool in pools])
    values = [pool.objective for pool in pools]
    enough = np.array(
        [value - limits.rel_gap * abs(value) if value < math.inf else value for value in values]
    )
    stop = StopRule(limits, started, math.inf)
    search = search_by_channels(block, program, start, stop, cutoffs=enough)
    points, splits = search.point.reshape(many, n), search.split.reshape(many, n)
    each = zip(problems, pools, points, splits, strict=True)
    return [_certified(*row, limits, stop, started) for row in each]


def _certified(
    problem: BlockProblem,
    pool: IncumbentPool,
    point: FloatArray,
    split: FloatArray,
    limits: Limits,
    stop: StopRule,
    started: float,
) -> BlockSolution:
    """Return the better of the incumbent and the set that a point rounds to, with what the point proves."""
    split = provable_split(problem, split)
    residual = problem.linear_term() - (problem.hessian_product(point) - split * point)
    pool.offer(round_joint(residual / np.sqrt(np.maximum(split, np.finfo(np.float64).tiny)), problem.n_keep))
    certificate: RelaxationCertificate = PerspectiveCertificate(
        subject=Subject.of(problem, PROGRAM),
        point=point,
        split=split,
        **asdict(fisher_shape(problem, rank=False)),
    )
    certificate = in_clusters(problem, pool, stop, certificate, size=CLUSTER)
    bound = certificate.lower_bound(problem)
    return pool.solution(
        method=METHOD,
        rel_gap=limits.rel_gap,
        bound=bound,
        limit=stop.limit,
        certificate=certificate if math.isfinite(bound) else None,
        stats=SolveStats(seconds=time.perf_counter() - started, iterations=stop.steps),
    )
