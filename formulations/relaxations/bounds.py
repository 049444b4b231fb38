"""`lower_bound`: a proved bound on either program, with the certificate that proves it."""

from __future__ import annotations

import math
import time
from dataclasses import asdict

import numpy as np

from formulations.dense_forms import DenseForm, joint_form, selection_form
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem, FloatArray, check_program
from formulations.relaxations.capped_simplex import CappedSimplexCertificate, relax_selection, round_selection
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.relaxations.matrix_free import relax_joint_rows, relax_selection_rows
from formulations.relaxations.perspective import (
    SPLIT_MARGIN,
    PerspectiveCertificate,
    relax_joint,
    round_joint,
)
from formulations.solution import BlockSolution, Certificate, Limits, SolveStats, Termination

SPLIT_LARGEST = 600
"""Largest block whose diagonal split is optimised by default: a barrier step costs O(n^3)."""
SPLIT_ROUNDS = 40
DENSE_LARGEST = 2000
"""Largest block for which ``H`` is formed although rows are given."""


def lower_bound(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits | None = None,
    incumbent: BlockSolution | None = None,
    diagonal_split: bool | None = None,
) -> BlockSolution:
    """Bound a program from below by its continuous relaxation.

    Joint: perspective relaxation. Selection: capped simplex after a diagonal shift. The bound in the
    result is what its certificate recomputes, never the solver's own figure. Blocks with rows and more
    than 2000 weights are solved without forming ``H``.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    limits : Limits, optional
        `rel_gap` decides when the bound proves the incumbent optimal; `time_limit` and
        `iteration_limit` (ADMM steps) stop the matrix-free solver, whose bound is valid at any step.
    incumbent : BlockSolution, optional
        The result is never worse; its value also tells the relaxation when to stop.
    diagonal_split : bool, optional
        Optimise the split of ``H`` (O(n^3) a step, much tighter where damping is small). Default: for
        blocks of at most 600 weights.

    Returns
    -------
    BlockSolution
        The better of the incumbent and the rounded relaxation, with `bound` and `certificate`;
        OPTIMAL if the bound meets it to `rel_gap`.

    Raises
    ------
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.
    """
    check_program(program)
    limits = limits or Limits()
    started = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    certificate: Certificate | None = None
    bound: float | None
    if 0 < problem.n_prune < problem.n:
        if diagonal_split is None:
            diagonal_split = problem.n <= SPLIT_LARGEST
        rounds = SPLIT_ROUNDS if diagonal_split else 0
        if problem.rows is not None and problem.damping > 0.0 and not rounds and problem.n > DENSE_LARGEST:
            certificate = _from_rows(problem, pool, limits, started)
        else:
            relaxed = _joint if program == "joint" else _selection
            certificate = relaxed(problem, pool, rounds)
        bound = certificate.lower_bound(problem)
    else:
        # One set only: its value is the optimum.
        pool.offer(np.full(problem.n, problem.n_prune == 0))
        bound = pool.objective
    if not math.isfinite(bound):
        bound, certificate = None, None
    gap = math.inf if bound is None else (pool.objective - bound) / max(abs(pool.objective), 1e-12)
    proved = gap <= limits.rel_gap
    return pool.solution(
        method="lower_bound",
        bound=bound,
        termination=Termination.OPTIMAL if proved else Termination.FEASIBLE,
        rel_gap=limits.rel_gap if proved else None,
        certificate=certificate,
        stats=SolveStats(seconds=time.perf_counter() - started),
    )


def _from_rows(
    problem: BlockProblem, pool: IncumbentPool, limits: Limits, started: float
) -> PerspectiveCertificate | CappedSimplexCertificate:
    if pool.program == "joint":
        point, residual = relax_joint_rows(problem, limits, started, pool.objective)
        pool.offer(round_joint(residual, problem.n_keep))
        split = np.full(problem.n, problem.damping * (1.0 - SPLIT_MARGIN))
        return PerspectiveCertificate(point=point, split=split, **asdict(fisher_shape(problem)))
    point = relax_selection_rows(problem, limits, started, pool.objective)
    pool.offer(round_selection(point, problem.n_prune))
    shift = problem.damping * problem.weights**2 * (1.0 - SPLIT_MARGIN)
    return CappedSimplexCertificate(point=point, shift=shift, **asdict(fisher_shape(problem)))


def _joint(problem: BlockProblem, pool: IncumbentPool, rounds: int) -> PerspectiveCertificate:
    form = joint_form(problem)
    root = np.sqrt(problem.hessian_diagonal())
    cutoff = pool.objective / form.scale
    _, point, residual, split = relax_joint(
        form, problem.n_keep, joint_split(problem, form), cutoff=cutoff, split_rounds=rounds
    )
    pool.offer(round_joint(residual, problem.n_keep))
    return joint_certificate(problem, form, point, split, root)


def _selection(problem: BlockProblem, pool: IncumbentPool, rounds: int) -> CappedSimplexCertificate:
    form = selection_form(problem)
    cutoff = pool.objective / form.scale
    _, point, shift = relax_selection(
        form, problem.n_prune, selection_shift(problem, form), cutoff=cutoff, split_rounds=rounds
    )
    pool.offer(round_selection(point, problem.n_prune))
    return selection_certificate(problem, form, point, shift)


def joint_split(problem: BlockProblem, form: DenseForm) -> FloatArray:
    """A valid split of the joint form: the damping, or without one the smallest eigenvalue."""
    if problem.damping > 0.0:
        return problem.damping / problem.hessian_diagonal() * (1.0 - SPLIT_MARGIN)
    lowest = float(np.linalg.eigvalsh(form.matrix)[0])
    return np.full(problem.n, 0.99 * lowest)


def selection_shift(problem: BlockProblem, form: DenseForm) -> FloatArray:
    """A valid shift of the selection form: the damping's share of the diagonal."""
    return problem.damping * problem.weights**2 / form.scale * (1.0 - SPLIT_MARGIN)


def joint_certificate(
    problem: BlockProblem, form: DenseForm, point: FloatArray, split: FloatArray, root: FloatArray
) -> PerspectiveCertificate:
    """A point and split of the joint form in the block's own units."""
    return PerspectiveCertificate(
        point=point * math.sqrt(form.scale) / root,
        split=split * root**2 * (1.0 - SPLIT_MARGIN),
        **asdict(fisher_shape(problem)),
    )


def selection_certificate(
    problem: BlockProblem, form: DenseForm, point: FloatArray, shift: FloatArray
) -> CappedSimplexCertificate:
    """A point and shift of the selection form in the block's own units."""
    return CappedSimplexCertificate(point=point, shift=shift * form.scale, **asdict(fisher_shape(problem)))
