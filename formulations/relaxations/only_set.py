"""The one set where all or no weights are pruned: its value too is known up to rounding only."""

from __future__ import annotations

import numpy as np

from formulations.dense_forms import joint_form
from formulations.loss import update
from formulations.problem import BlockProblem
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.channel_splits import ChannelSplits
from formulations.relaxations.perspective import SPLIT_MARGIN, PerspectiveCertificate
from formulations.relaxations.split_relaxation import joint_certificate, joint_split
from formulations.solution import Subject


def has_one_set(problem: BlockProblem) -> bool:
    """Whether only one set has the right size."""
    return problem.n_prune in (0, problem.n)


def only_set_certificate(
    problem: BlockProblem, program: str
) -> PerspectiveCertificate | CappedSimplexCertificate:
    """Return the certificate of the one set's value, less what rounding may hide.

    Where the weights may move (joint, none pruned) it is that of the relaxation at its minimiser; else
    the set has one point, and nothing has to be convex.

    Raises
    ------
    NotPositiveDefiniteError
        If all weights may move and ``H`` is singular.
    """
    subject = Subject.of(problem, program)
    zero = np.zeros(problem.n)
    if program == "selection":
        return CappedSimplexCertificate(point=zero, shift=zero, subject=subject)
    if problem.n_keep == 0:
        return PerspectiveCertificate(point=zero, split=np.ones(problem.n), subject=subject)
    point = update(problem, np.ones(problem.n, dtype=np.bool_))
    if problem.channels is not None:
        split = ChannelSplits(problem).start
        return PerspectiveCertificate(point=point, split=split, subject=subject)
    if problem.rows is not None and problem.damping > 0.0:
        split = np.full(problem.n, problem.damping * (1.0 - SPLIT_MARGIN))
        return PerspectiveCertificate(point=point, split=split, subject=subject)
    form = joint_form(problem)
    root = np.sqrt(problem.hessian_diagonal())
    scaled = point * root / np.sqrt(form.scale)
    return joint_certificate(problem, form, scaled, joint_split(problem, form), root)
