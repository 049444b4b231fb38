"""`branch_and_bound`: incumbents, root, tree, and an honest account of what was proved."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from formulations.branch_and_bound.root import solve_from_root
from formulations.branch_and_bound.subproblems import Subproblems
from formulations.branch_and_bound.tree import Search
from formulations.dense_forms import DenseForm, dense_form, folded_form
from formulations.errors import ArgumentError
from formulations.incumbents import Heuristic, IncumbentPool, descend, greedy_keep, kicked, offer_searched
from formulations.preparation import prepare_for
from formulations.problem import SPLIT_LARGEST, BlockProblem, BoolArray, check_program
from formulations.relaxations.bounds import lower_bound
from formulations.relaxations.only_set import has_one_set, only_set_certificate
from formulations.solution import BlockSolution, Limit, Limits, SolveStats
from formulations.support import Groups

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
    heuristic: Heuristic | None = None,
) -> BlockSolution:
    """Solve a program to proven optimality by branch and bound.

    For any support: where so many of every few are kept, a cell that has all it may keep or prune decides the
    rest of it; groups are decided whole. Each node drops its pruned weights and eliminates its kept ones by a
    Schur complement, bounds what is left by the perspective relaxation (joint) or the capped simplex
    (selection) under a diagonal split that barrier Newton steps improve, fixes every weight whose other
    value would lift the bound to the incumbent, and branches where the relaxation is estimated to rise most
    in both children. Where a count of 160 to 600 weights with an ``H`` of full rank is kept and more than 2 %
    is open after the root, the split has a block for every four weights instead, down to nodes of 32.

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
    heuristic : callable, optional
        ``heuristic(problem, program, *, limits, incumbent)`` returns a `BlockSolution`, or None where it
        cannot keep to the limits. On a block of more than 600 weights it is called twice after the first
        bound, in the time that is left: with `incumbent`, and with the set that the relaxation rounds to.

    Returns
    -------
    BlockSolution
        OPTIMAL if the gap asked for was met, else FEASIBLE with the limit that came (`Limit.GAP` where
        the search is complete and rounding leaves more) and the bound so far; `certificate` proves the
        root bound of the whole block, the rest of `bound` rests on the search. Where the gap was not met
        `bound` is at least what `lower_bound` proves in the time that was left to it (all of it on blocks of
        more than 600 weights) and what the incumbent's certificate proves. Ctrl-C returns incumbent and
        bound with `Limit.INTERRUPTED`.

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
    prepare_for(problem, "branch_and_bound", program)
    started = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    first: BlockSolution | None = None
    try:
        if has_one_set(problem) and limits.time_limit != 0.0:
            return _only_set(pool, limits, started)
        first = _first_bound(pool, limits, started)
        starts = () if first is None else (incumbent, first)
        searched = offer_searched(heuristic, pool, starts, limits, started)
        # The dense form of a large block takes longer than its first bound.
        ahead = 0.0 if first is None else first.stats.seconds
        form = None if limits.out_of_time(started, ahead) else dense_form(problem, program)
    except KeyboardInterrupt:
        return _without_tree(pool, limits, started, Limit.INTERRUPTED, first)
    limit = Limit.TIME if form is None else _first_incumbents(form, pool, limits, started, swaps, searched)
    if form is None or limit is not None:
        return _without_tree(pool, limits, started, limit, first)
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
    if first is not None:
        tree.prove(first.certificate)
        tree.floored = True
    tree.record()
    if math.isfinite(tree.allowance):
        tree, limit = solve_from_root(tree, problem, reduction=reduction, swaps=swaps)
    else:
        # No factorisation can be relied upon, and no bound of a node: there is none to search from.
        limit = tree.run()
    tree.prove(None if incumbent is None else incumbent.certificate)
    tree.record()
    return _account(tree, limit)


def _first_bound(pool: IncumbentPool, limits: Limits, started: float) -> BlockSolution | None:
    """Return what `lower_bound` makes of a large block, whose dense form and greedy set take longer."""
    if pool.problem.n <= SPLIT_LARGEST or limits.out_of_time(started):
        return None
    # The bound comes before any set, so that it has all the time that `lower_bound` would have.
    limits = replace(limits.left(started), iteration_limit=None)
    first = lower_bound(pool.problem, pool.program, limits=limits)
    pool.offer_magnitude_if_empty()
    assert first.keep is not None
    pool.offer(first.keep)
    return first


def _without_tree(
    pool: IncumbentPool, limits: Limits, started: float, limit: Limit | None, first: BlockSolution | None
) -> BlockSolution:
    """Return the solution of a search that ended before its root."""
    pool.offer_magnitude_if_empty()
    bound = None if first is None else first.bound
    return pool.solution(
        method="branch_and_bound",
        rel_gap=None if bound is None else limits.rel_gap,
        bound=-math.inf if bound is None else bound,
        limit=limit,
        certificate=first.certificate if first is not None else None,
        stats=SolveStats(seconds=time.perf_counter() - started),
    )


def _first_incumbents(
    form: DenseForm,
    pool: IncumbentPool,
    limits: Limits,
    started: float,
    swaps: bool,
    searched: bool,
) -> Limit | None:
    """Greedy and, with `swaps`, descents from it, from what is not `searched` yet and from perturbed sets."""
    program = pool.program
    try:
        starts = [] if pool.keep is None or searched else [pool.keep]
        if pool.keep is None or limits.time_limit is None or pool.problem.n <= SPLIT_LARGEST:
            starts.append(greedy_keep(form, pool.problem.n_prune, program, support=pool.problem.support))
        for start in starts:
            pool.offer(start)
        if swaps:
            share = None if limits.time_limit is None else KICK_SHARE_OF_TIME * limits.time_limit
            _descend_from(starts, form, pool, Limits(time_limit=share, seed=limits.seed))
    except KeyboardInterrupt:
        pool.offer_magnitude_if_empty()
        return Limit.INTERRUPTED
    return Limit.TIME if limits.out_of_time(started) else None


def _descend_from(starts: list[BoolArray], form: DenseForm, pool: IncumbentPool, limits: Limits) -> None:
    """Offer what descents from `starts` and from perturbed best sets come to, within limits of their own."""
    began = time.perf_counter()
    for start in starts:
        pool.offer(descend(form, start, pool.program, limits, began, support=pool.problem.support)[0])
    generator = np.random.default_rng(limits.seed)
    for _ in range(KICKS):
        assert pool.keep is not None
        start = kicked(pool.keep, generator, support=pool.problem.support)
        keep, _, stopped = descend(form, start, pool.program, limits, began, support=pool.problem.support)
        pool.offer(keep)
        if stopped is not None:
            break


def whole_block(
    problem: BlockProblem, program: str, form: DenseForm, *, fixing: bool, diagonal_split: bool
) -> Subproblems:
    """Return the subproblems of a block in which nothing is decided."""
    support, joint = problem.sets, program == "joint"
    matrix, linear = (form.matrix, form.linear) if joint else folded_form(form, problem.support)
    return Subproblems(
        program=program,
        form=form,
        matrix=matrix,
        linear=linear,
        constant=form.constant,
        count=(support.kept if joint else support.pruned)(problem.n),
        index=np.arange(linear.size),
        decided_kept=np.zeros(linear.size, dtype=np.bool_),
        support=problem.support,
        tied=support if joint and isinstance(support, Groups) else None,
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


def _account(tree: Search, limit: Limit | None) -> BlockSolution:
    """Return the solution, OPTIMAL only if its bound meets the incumbent to the gap asked for."""
    message = tree.message if limit is Limit.TIME else ""
    if not math.isfinite(tree.allowance):
        message = "H is singular to rounding: no node has a bound, only the whole block"
    return tree.pool.solution(
        method="branch_and_bound",
        rel_gap=tree.limits.rel_gap,
        bound=tree.bound,
        finished=True,
        limit=limit,
        certificate=tree.certificate,
        stats=SolveStats(
            seconds=time.perf_counter() - tree.started,
            nodes=tree.all_nodes,
            message=message,
            extra={"open_after_root": tree.open_after_root},
        ),
        trace=tuple(tree.trace),
    )
