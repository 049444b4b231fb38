"""`branch_and_bound`: incumbents, root, tree, and an honest account of what was proved."""

from __future__ import annotations

import math
import time

import numpy as np

from formulations.branch_and_bound.root import solve_from_root
from formulations.branch_and_bound.subproblems import Subproblems
from formulations.branch_and_bound.tree import Search
from formulations.dense_forms import DenseForm, dense_form
from formulations.errors import ArgumentError
from formulations.incumbents import IncumbentPool, descend, greedy_keep, kicked
from formulations.preparation import prepare
from formulations.problem import BlockProblem, check_program
from formulations.relaxations.only_set import has_one_set, only_set_certificate
from formulations.solution import BlockSolution, Certificate, Limit, Limits, SolveStats

SEARCHES = ("best", "depth")
KICKS = 10
"""Perturbed descents before the root."""
KICK_SHARE_OF_TIME = 0.1
"""Share of the time limit that these may take."""


def branch_and_bound(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits | None = None,
    incumbent: BlockSolution | None = None,
    search: str = "best",
    fixing: bool = True,
    reduction: bool = True,
    diagonal_split: bool = True,
    swaps: bool = True,
) -> BlockSolution:
    """Solve a program to proven optimality by branch and bound.

    Each node drops its pruned weights and eliminates its kept ones by a Schur complement, bounds what
    is left by the perspective relaxation (joint) or the capped simplex (selection) under a diagonal
    split that barrier Newton steps improve, fixes every weight whose other value would lift the bound
    to the incumbent, and branches where the relaxation is estimated to rise most in both children.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    limits : Limits, optional
        `time_limit` and `node_limit` are looked at between nodes, `rel_gap` closes nodes.
    incumbent : BlockSolution, optional
        Warm start; the result is never worse.
    search : {"best", "depth"}, default "best"
        Best bound first with diving, or depth first (least memory, poor bound when stopped).
    fixing : bool, default True
        Fix weights by the bound in every node.
    reduction : bool, default True
        After the root, continue on the block that its fixings leave.
    diagonal_split : bool, default True
        Improve the split of ``H``; else the damping is the split.
    swaps : bool, default True
        Swap descents before the root and inside nodes; else greedy and leaves only.

    Returns
    -------
    BlockSolution
        OPTIMAL if the gap asked for was met, else FEASIBLE with the limit that came (`Limit.GAP` where
        the search is complete and rounding leaves more) and the bound so far; `certificate` proves the
        root bound of the whole block, the rest of `bound` rests on the search. Ctrl-C returns incumbent
        and bound with `Limit.INTERRUPTED`.

    Raises
    ------
    ArgumentError
        If `search` is unknown.
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.

    Notes
    -----
    Deterministic for a seed unless a time limit comes. O(n^3) a node at worst, usually far less
    after fixing. Bounds are lowered by a proven allowance for all rounding, so that a `rel_gap` below
    about 1e-9 may not be met.
    """
    check_program(program)
    if search not in SEARCHES:
        raise ArgumentError("search", f"{search!r}", 'use "best" or "depth"')
    limits = limits or Limits()
    prepare("branch_and_bound", program)
    started = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    if limits.time_limit == 0.0:
        pool.offer_magnitude_if_empty()
        return pool.solution(method="branch_and_bound", limit=Limit.TIME)
    try:
        if has_one_set(problem):
            return _only_set(pool, limits, started)
        form = dense_form(problem, program)
    except KeyboardInterrupt:
        pool.offer_magnitude_if_empty()
        return pool.solution(method="branch_and_bound", limit=Limit.INTERRUPTED)
    limit = _first_incumbents(form, pool, limits, started, swaps)
    tree = Search(
        subproblems=whole_block(problem, program, form, fixing=fixing, diagonal_split=diagonal_split),
        pool=pool,
        limits=limits,
        scale=form.scale,
        rounding=form.rounding,
        started=started,
        depth_first=search == "depth",
        improve_period=25 if swaps else 0,
    )
    tree.record()
    certificate: Certificate | None = None
    # Without an allowance for rounding no bound can be proved, and no factorisation relied upon.
    if limit is None and math.isfinite(tree.allowance):
        limit, certificate = solve_from_root(tree, problem, reduction=reduction, swaps=swaps)
    tree.record()
    return _account(tree, limit, certificate)


def _first_incumbents(
    form: DenseForm, pool: IncumbentPool, limits: Limits, started: float, swaps: bool
) -> Limit | None:
    """Greedy and, with `swaps`, descents from it, from the warm start and from perturbed sets."""
    program = pool.program
    try:
        starts = [] if pool.keep is None else [pool.keep]
        starts.append(greedy_keep(form, pool.problem.n_prune, program))
        for start in starts:
            pool.offer(start)
        if not swaps:
            return None
        share = None if limits.time_limit is None else KICK_SHARE_OF_TIME * limits.time_limit
        budget = Limits(time_limit=share)
        for start in starts:
            pool.offer(descend(form, start, program, budget, started)[0])
        generator = np.random.default_rng(limits.seed)
        for _ in range(KICKS):
            assert pool.keep is not None
            keep, _, stopped = descend(form, kicked(pool.keep, generator), program, budget, started)
            pool.offer(keep)
            if stopped is not None:
                break
    except KeyboardInterrupt:
        pool.offer_magnitude_if_empty()
        return Limit.INTERRUPTED
    return None


def whole_block(
    problem: BlockProblem, program: str, form: DenseForm, *, fixing: bool, diagonal_split: bool
) -> Subproblems:
    """Return the subproblems of a block in which nothing is decided."""
    return Subproblems(
        program=program,
        form=form,
        matrix=form.matrix,
        linear=form.linear,
        constant=form.constant,
        count=problem.n_keep if program == "joint" else problem.n_prune,
        index=np.arange(problem.n),
        decided_kept=np.zeros(problem.n, dtype=np.bool_),
        fixing=fixing,
        diagonal_split=diagonal_split,
    )


def _only_set(pool: IncumbentPool, limits: Limits, started: float) -> BlockSolution:
    """Return the solution where all or no weights are pruned."""
    problem = pool.problem
    pool.offer(np.full(problem.n, problem.n_prune == 0))
    certificate = only_set_certificate(problem, pool.program)
    return pool.solution(
        method="branch_and_bound",
        rel_gap=limits.rel_gap,
        bound=certificate.lower_bound(problem),
        finished=True,
        certificate=certificate,
        stats=SolveStats(seconds=time.perf_counter() - started),
    )


def _account(tree: Search, limit: Limit | None, certificate: Certificate | None) -> BlockSolution:
    """Return the solution, OPTIMAL only if its bound meets the incumbent to the gap asked for."""
    message = "" if math.isfinite(tree.allowance) else "H is singular to rounding: no bound"
    return tree.pool.solution(
        method="branch_and_bound",
        rel_gap=tree.limits.rel_gap,
        bound=tree.bound * tree.scale,
        finished=True,
        limit=limit,
        certificate=certificate,
        stats=SolveStats(
            seconds=time.perf_counter() - tree.started,
            nodes=tree.nodes,
            message=message,
            extra={"open_after_root": tree.open_after_root},
        ),
        trace=tuple(tree.trace),
    )
