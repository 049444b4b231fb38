"""`lower_bound`: a proved bound on either program, with the certificate that proves it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from formulations.errors import UnsupportedProblemError
from formulations.incumbents import IncumbentPool
from formulations.preparation import prepare_for
from formulations.problem import SPLIT_LARGEST, BlockProblem, FloatArray, check_program
from formulations.relaxations.block_split import (
    MOST_ENTRIES,
    MOST_SUPPORTS,
    relax_in_blocks,
    takes_blocks,
)
from formulations.relaxations.capped_simplex import CappedSimplexCertificate, round_selection
from formulations.relaxations.certificate import RelaxationCertificate
from formulations.relaxations.channel_relaxation import relax_by_channels
from formulations.relaxations.cluster_split import (
    LARGEST_CLUSTER,
    ClusterSplitCertificate,
    most_clustered,
    relax_in_clusters,
    takes_clusters,
    worth_clusters,
)
from formulations.relaxations.first_order import StopRule
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.relaxations.linear import LINEAR_RELAXATIONS, relax_linear
from formulations.relaxations.matrix_free import GRAM_LARGEST, JointRows, SelectionRows, solve_rows
from formulations.relaxations.one_hessian import fits_one_hessian, relax_over_hessian
from formulations.relaxations.only_set import has_one_set, only_set_certificate
from formulations.relaxations.perspective import SPLIT_MARGIN, PerspectiveCertificate, round_joint
from formulations.relaxations.split_relaxation import relax_with_split
from formulations.relaxations.tightening import SPLIT_ROUNDS, tightened
from formulations.solution import BlockSolution, Limits, SolveStats, Subject
from formulations.support import counts_of

DENSE_LARGEST = 2000
"""Largest block for which ``H`` is formed although rows are given; from `SPLIT_LARGEST` on it is the second
step, from the point that the rows alone have led to."""
ONE_HESSIAN_LARGEST = 2048
"""Largest block with a Hessian matrix whose split is optimised, above `SPLIT_LARGEST` as of a channel."""
RowCertificate = PerspectiveCertificate | CappedSimplexCertificate
OWN_RELAXATION = {"joint": "perspective", "selection": "capped_simplex"}
IN_BLOCKS = "block_perspective"
IN_CLUSTERS = "cluster_perspective"


def lower_bound(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits | None = None,
    incumbent: BlockSolution | None = None,
    diagonal_split: bool | None = None,
    fix: bool = False,
    relaxation: str | None = None,
) -> BlockSolution:
    """Bound a program from below by its continuous relaxation.

    Joint: perspective relaxation. Selection: capped simplex after a diagonal shift. Either for any support:
    so many of all, n of every m, whole groups. The bound in the result is what its certificate recomputes,
    never the solver's own figure. Blocks with rows and more
    than 600 weights are solved without forming ``H``, in memory for the rows, one square matrix of order
    min(m, n) and the rows of the kept weights; up to 2000 weights the dense solver then finishes.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    limits : Limits, optional
        `rel_gap` decides when the bound proves the incumbent optimal and ends the search for a better
        one; `time_limit`, looked at between steps, and `iteration_limit` (steps of the matrix-free
        solver) end it early, with a bound that is valid at any step.
    incumbent : BlockSolution, optional
        The result is never worse; its value also tells the relaxation when to stop, and the point of
        its certificate is where a matrix-free solve starts.
    diagonal_split : bool, optional
        Optimise the split of ``H`` (O(n^3) a step, much tighter where damping is small). Default: for
        blocks of at most 600 weights, also those that fixing leaves, for joint programs with a Hessian matrix
        and a count of at most 2048 of which the damping leaves more than 2 % open, and channel by channel,
        O(k^3) a step for k weights, where the block has a term over channels.
    fix : bool, default False
        Fix weights by the bound and the incumbent (``certificate.fixing``), relax what is left with a
        better split where it is small enough, and repeat. Sharper the better the incumbent is. Only counts
        are relaxed again on what is left.
    relaxation : str, optional
        "perspective" (joint), "capped_simplex" (selection) or, for comparison on small selection
        blocks, the linear programs "mccormick" and "rlt". Where n of every m weights are kept, also
        "block_perspective" (joint), whose split has a block for every cell and begins at the diagonal one.
        Where a count of at most 600 weights is kept, or of 1024 with a Hessian matrix, and ``H`` has full
        rank, also "cluster_perspective" (joint), whose split has a block for every four correlated weights,
        or eight up to 333 weights.
        Default: the first that fits, or the tighter of two: of the blocks on cells up to 600 weights, of the
        clusters where ``H`` is given or has channels and the diagonal split leaves more than 2 % open.

    Returns
    -------
    BlockSolution
        The better of the incumbent and the rounded relaxation, with `bound` and `certificate`
        (`kind`, `rho`, `effective_rank`, `n_fixed`); OPTIMAL if the bound meets it to `rel_gap`.

    Raises
    ------
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.
    UnsupportedProblemError
        If the relaxation is unknown or not one of the program, or linear and the support no count.
    """
    _check_relaxation(problem, program, relaxation, fix)
    limits = limits or Limits()
    prepare_for(problem, "lower_bound", program)
    started = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    wanted = pool.objective - limits.rel_gap * max(abs(pool.objective), 1e-12)
    stop = StopRule(limits, started, wanted)
    certificate: RelaxationCertificate
    if has_one_set(problem):
        pool.offer(np.full(problem.n, problem.n_prune == 0))
        certificate = only_set_certificate(problem, program)
    elif relaxation in LINEAR_RELAXATIONS:
        certificate = relax_linear(problem, relaxation, limits, pool)
    else:
        certificate = _relaxed(problem, pool, stop, incumbent, diagonal_split)
        tightest = relaxation is None and diagonal_split is not False
        if tightest or relaxation == IN_CLUSTERS:
            certificate = in_clusters(problem, pool, stop, certificate, always=not tightest)
        if fix:
            certificate = tightened(
                problem,
                pool,
                certificate,
                rel_gap=limits.rel_gap,
                improve_split=diagonal_split is not False,
                stopped=stop.out_of_time,
            )
        if tightest or relaxation == IN_BLOCKS:
            certificate = _in_blocks(problem, pool, stop, certificate)
    bound = certificate.lower_bound(problem)
    return pool.solution(
        method="lower_bound",
        rel_gap=limits.rel_gap,
        bound=bound,
        finished=has_one_set(problem),
        limit=stop.limit,
        certificate=certificate if math.isfinite(bound) else None,
        stats=SolveStats(seconds=time.perf_counter() - started, iterations=stop.steps),
    )


def root_bounds(
    problem: BlockProblem, program: str, *, limits: Limits, incumbent: BlockSolution
) -> Iterator[BlockSolution]:
    """Yield what an exact method takes for its root: the better bound of them is its floor.

    First `lower_bound` as a caller who knows no set would have it, so that no search ends below its own
    relaxation: with a set the steps on rows end sooner and those on the split go elsewhere, for better or
    worse. On blocks of at most `SPLIT_LARGEST` weights then the one that knows `incumbent`, unless the first
    one went to clusters: their path takes most of the time, and the nodes go on with it by themselves.
    """
    started = time.perf_counter()
    first = lower_bound(problem, program, limits=limits)
    yield first
    clustered = isinstance(first.certificate, ClusterSplitCertificate)
    if problem.n <= SPLIT_LARGEST and not clustered and not limits.out_of_time(started):
        yield lower_bound(problem, program, limits=limits.left(started), incumbent=incumbent)


def _check_relaxation(problem: BlockProblem, program: str, relaxation: str | None, fix: bool) -> None:
    own = OWN_RELAXATION[check_program(program)]
    known = (own, *LINEAR_RELAXATIONS) if program == "selection" else (own, IN_BLOCKS, IN_CLUSTERS)
    if relaxation is not None and relaxation not in known:
        found = f"{relaxation!r} for the {program} program"
        if relaxation in LINEAR_RELAXATIONS:
            found += ", whose objective is quadratic in the new weights and has no linear relaxation"
        raise UnsupportedProblemError("relaxation", found, f"use one of: {', '.join(known)}")
    if fix and relaxation in LINEAR_RELAXATIONS:
        raise UnsupportedProblemError("fix", f"with relaxation {relaxation!r}", f"use {own!r}")
    if relaxation in LINEAR_RELAXATIONS and problem.support is not None:
        found = f"{problem.support} ({problem.support.kind}), which {relaxation!r} does not take"
        raise UnsupportedProblemError("support", found, f"use {own!r}")
    if relaxation == IN_BLOCKS and not takes_blocks(problem):
        asked = "a count" if problem.support is None else f"{problem.support}"
        found = f"{relaxation!r} for {asked} of {problem.n} weights"
        limits = f"at most {MOST_SUPPORTS} supports a cell and {MOST_ENTRIES} entries of all blocks"
        remedy = f"use {own!r}: this one takes n of every m, {limits}"
        raise UnsupportedProblemError("relaxation", found, remedy)
    if relaxation == IN_CLUSTERS and not takes_clusters(problem):
        asked = "a count" if problem.support is None else f"{problem.support}"
        found = f"{relaxation!r} for {asked} of {problem.n} weights"
        limits = f"a count of 2 to {most_clustered(problem)} weights, and as many rows or more"
        remedy = f"use {own!r}: this one takes {limits}"
        raise UnsupportedProblemError("relaxation", found, remedy)


def _in_blocks(
    problem: BlockProblem, pool: IncumbentPool, stop: StopRule, plain: RelaxationCertificate
) -> RelaxationCertificate:
    """Return the certificate of a split in blocks where that is tighter than `plain`."""
    if pool.program != "joint" or not takes_blocks(problem) or not isinstance(plain, PerspectiveCertificate):
        return plain
    enough = pool.objective - stop.limits.rel_gap * max(abs(pool.objective), 1e-12)
    better = relax_in_blocks(problem, plain, enough, stop.out_of_time)
    return plain if better is None else better


def in_clusters(
    problem: BlockProblem,
    pool: IncumbentPool,
    stop: StopRule,
    plain: RelaxationCertificate,
    *,
    size: int = LARGEST_CLUSTER,
    always: bool = False,
) -> RelaxationCertificate:
    """Return the certificate of a split in clusters where that is tighter than `plain`, and worth its time.

    The set that it suggests is offered to the pool. `size` is the most weights of a cluster; `always` says
    not to ask whether it is worth its time.
    """
    if pool.program != "joint" or not takes_clusters(problem) or stop.out_of_time():
        return plain
    if not isinstance(plain, PerspectiveCertificate) or plain.basis is not None:
        return plain
    # Beside rows alone the damping is most of what can be split off, and exact methods close such blocks.
    by_rows = problem.rows is not None and problem.channels is None
    if not always and (by_rows or not worth_clusters(plain.lower_bound(problem), pool.objective)):
        return plain
    enough = pool.objective - stop.limits.rel_gap * max(abs(pool.objective), 1e-12)
    found = relax_in_clusters(problem, plain, enough, stop.out_of_time, size)
    if found is None:
        return plain
    pool.offer(found[1])
    return found[0]


def _relaxed(
    problem: BlockProblem,
    pool: IncumbentPool,
    stop: StopRule,
    incumbent: BlockSolution | None,
    diagonal_split: bool | None,
) -> RelaxationCertificate:
    """Return the certificate of the program's own relaxation."""
    split_here = problem.n <= SPLIT_LARGEST if diagonal_split is None else diagonal_split
    rounds = SPLIT_ROUNDS if split_here else 0
    certificate: RelaxationCertificate
    by_rows = problem.rows is not None and problem.channels is None
    by_rows = by_rows and problem.damping > 0.0 and not rounds
    if problem.channels is not None and problem.n > SPLIT_LARGEST:
        improved = diagonal_split is not False
        certificate, keep = relax_by_channels(problem, pool, stop, improve_split=improved)
        pool.offer(keep)
    elif by_rows and problem.n > SPLIT_LARGEST:
        certificate = _from_rows(problem, pool, stop, _earlier_point(problem, pool.program, incumbent))
        if problem.n <= DENSE_LARGEST and stop.limit is None:
            certificate = _finished(problem, pool, stop, certificate)
    else:
        certificate, keep = relax_with_split(problem, pool.program, pool.objective, rounds, stop.out_of_time)
        pool.offer(keep)
        if diagonal_split is None and not rounds and isinstance(certificate, PerspectiveCertificate):
            certificate = _with_split_of_rows(problem, pool, stop, certificate, known=incumbent is not None)
    return certificate


def _with_split_of_rows(
    problem: BlockProblem, pool: IncumbentPool, stop: StopRule, plain: PerspectiveCertificate, *, known: bool
) -> PerspectiveCertificate:
    """Return the certificate of a large block whose split is optimised like those of rows, if it is tighter.

    Where the damping as the split leaves little open, as where ``H`` is near to diagonal, it stays.
    """
    fits = problem.n <= ONE_HESSIAN_LARGEST and fits_one_hessian(problem) and not stop.out_of_time()
    bound = plain.lower_bound(problem)
    if not fits or not worth_clusters(bound, pool.objective):
        return plain
    # What a point rounds to is too far off to weigh a barrier by: without a set that was given it has none.
    own = pool if known else IncumbentPool(problem, pool.program)
    found = relax_over_hessian([problem], [own], stop, stop.limits.rel_gap)[0]
    assert own.keep is not None
    pool.offer(own.keep)
    return found if found.lower_bound(problem) > bound else plain


def _finished(
    problem: BlockProblem, pool: IncumbentPool, stop: StopRule, first: RowCertificate
) -> RowCertificate:
    """Return the certificate of the dense solver from the point of `first`, or that one if it is as good."""
    bound = first.lower_bound(problem)
    if bound >= stop.cutoff or stop.out_of_time():
        return first
    second, keep = relax_with_split(
        problem, pool.program, pool.objective, 0, stopped=stop.out_of_time, start=first.point
    )
    pool.offer(keep)
    return second if second.lower_bound(problem) > bound else first


def _earlier_point(problem: BlockProblem, program: str, incumbent: BlockSolution | None) -> FloatArray | None:
    """Return the point of the incumbent's certificate, if it is one of this program."""
    certificate = None if incumbent is None else incumbent.certificate
    own = PerspectiveCertificate if program == "joint" else CappedSimplexCertificate
    if not isinstance(certificate, own):
        return None
    return certificate.point if certificate.point.shape == (problem.n,) else None


def _from_rows(
    problem: BlockProblem, pool: IncumbentPool, stop: StopRule, start: FloatArray | None
) -> RowCertificate:
    assert problem.rows is not None
    if pool.program == "joint":
        joint = JointRows(problem)
        best, gram = solve_rows(joint, stop, start)
        pool.offer(round_joint(joint.linear - best.product, problem.n_keep, problem.support))
        unscaled = None if gram is None else gram * problem.damping
        split = np.full(problem.n, problem.damping * (1.0 - SPLIT_MARGIN))
        shape = asdict(fisher_shape(problem, unscaled, rank=False))
        subject = Subject.of(problem, "joint")
        return PerspectiveCertificate(subject=subject, point=best.point / joint.root, split=split, **shape)
    selection, support = SelectionRows(problem), problem.sets
    units = support.n_units(problem.n)
    uniform = np.full(units, int(counts_of(support.pruned(problem.n)).sum()) / units)
    best, _ = solve_rows(selection, stop, uniform if start is None else support.mean(start))
    point = support.spread(best.point / selection.root)
    pool.offer(round_selection(point, problem.n_prune, problem.support))
    affordable = min(problem.rows.shape) <= GRAM_LARGEST and not stop.out_of_time()
    return CappedSimplexCertificate(
        subject=Subject.of(problem, "selection"),
        point=point,
        shift=problem.damping * problem.weights**2 * (1.0 - SPLIT_MARGIN),
        **asdict(fisher_shape(problem, rank=affordable)),
    )
