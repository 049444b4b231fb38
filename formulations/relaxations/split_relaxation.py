"""Both relaxations on a dense block, with the diagonal split optimised: certificates in its units."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np

from formulations.dense_forms import DenseForm, joint_form, selection_form
from formulations.problem import SMALLEST, BlockProblem, BoolArray, FloatArray
from formulations.relaxations.capped_simplex import CappedSimplexCertificate, relax_selection, round_selection
from formulations.relaxations.certified import provable_split
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.relaxations.perspective import (
    SPLIT_MARGIN,
    PerspectiveCertificate,
    relax_joint,
    round_joint,
)
from formulations.solution import Stopped, Subject, never
from formulations.support import kept_size, pruned_size


def relax_with_split(
    problem: BlockProblem,
    program: str,
    cutoff: float,
    split_rounds: int,
    stopped: Stopped = never,
    start: FloatArray | None = None,
) -> tuple[PerspectiveCertificate | CappedSimplexCertificate, BoolArray]:
    """Certificate of the relaxation and the kept set that it rounds to.

    Parameters
    ----------
    problem : BlockProblem
        With ``0 < n_prune < n``.
    program : {"selection", "joint"}
    cutoff : float
        A bound that is good enough, in units of the loss.
    split_rounds : int
        Barrier steps on the split; O(n^3) each.
    stopped : callable
        Asked between steps whether the time is over.
    start : (n,) float64 array, optional
        A point near the solution, as of a certificate.

    Raises
    ------
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.
    """
    if program == "joint":
        form = joint_form(problem)
        root = np.sqrt(problem.hessian_diagonal())
        _, point, residual, split = relax_joint(
            form,
            kept_size(problem.sets, problem.n),
            joint_split(problem, form),
            cutoff=cutoff / form.scale,
            split_rounds=split_rounds,
            stopped=stopped,
            start=None if start is None else start * root / math.sqrt(form.scale),
        )
        keep = round_joint(residual, problem.n_keep, problem.support)
        return joint_certificate(problem, form, point, split, root), keep
    form = selection_form(problem)
    _, point, shift = relax_selection(
        form,
        pruned_size(problem.sets, problem.n),
        selection_shift(problem, form),
        cutoff=cutoff / form.scale,
        split_rounds=split_rounds,
        stopped=stopped,
        start=start,
    )
    keep = round_selection(point, problem.n_prune, problem.support)
    return selection_certificate(problem, form, point, shift), keep


def joint_split(problem: BlockProblem, form: DenseForm) -> FloatArray:
    """Return a valid split of the joint form: the damping, or without one the smallest eigenvalue."""
    if problem.damping > 0.0:
        return problem.damping / problem.hessian_diagonal() * (1.0 - SPLIT_MARGIN)
    lowest = float(np.linalg.eigvalsh(form.matrix)[0])
    return np.full(problem.n, 0.99 * lowest)


def selection_shift(problem: BlockProblem, form: DenseForm) -> FloatArray:
    """Return a valid shift of the selection form: the damping's share of the diagonal."""
    return problem.damping * problem.weights**2 / form.scale * (1.0 - SPLIT_MARGIN)


def joint_certificate(
    problem: BlockProblem, form: DenseForm, point: FloatArray, split: FloatArray, root: FloatArray
) -> PerspectiveCertificate:
    """Return a point and split of the joint form in the block's own units."""
    return PerspectiveCertificate(
        subject=Subject.of(problem, "joint"),
        point=point * math.sqrt(form.scale) / root,
        split=provable_split(problem, split * root**2 * (1.0 - SPLIT_MARGIN)),
        **asdict(fisher_shape(problem)),
    )


def selection_certificate(
    problem: BlockProblem, form: DenseForm, point: FloatArray, shift: FloatArray
) -> CappedSimplexCertificate:
    """Return a point and shift of the selection form in the block's own units."""
    square = problem.weights**2
    used = square >= SMALLEST
    split = np.divide(shift * form.scale, square, out=np.zeros(problem.n), where=used)
    proved = np.where(used, provable_split(problem, split) * square, np.minimum(shift * form.scale, 0.0))
    return CappedSimplexCertificate(
        subject=Subject.of(problem, "selection"), point=point, shift=proved, **asdict(fisher_shape(problem))
    )
