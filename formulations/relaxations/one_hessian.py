"""The relaxation and the best diagonal splits of joint programs that share one Hessian matrix.

Together the blocks are one, whose channels all have the same matrix, and the search for channels solves it:
one eigendecomposition and products of matrices serve all steps of ADMM, and each block has its own split,
count and certificate. For a single large block too that takes a fraction of the time of dense steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from formulations.channels import ChannelTerm
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem
from formulations.relaxations.certified import provable_split
from formulations.relaxations.channel_relaxation import JointChannels, search_by_channels
from formulations.relaxations.first_order import StopRule
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.relaxations.only_set import has_one_set
from formulations.relaxations.perspective import PerspectiveCertificate, round_joint
from formulations.solution import Subject
from formulations.support import Cells

WIDEST_SPREAD = 1e5
"""Largest over smallest entry of the diagonal from which the weights are scaled to a diagonal of 1."""


def fits_one_hessian(problem: BlockProblem) -> bool:
    """Whether a block has a Hessian matrix and weights to lose, and keeps a count, neither none nor all."""
    counted = problem.support is None and not has_one_set(problem)
    return problem.hessian is not None and counted and bool(problem.weights.any())


def relax_over_hessian(
    problems: Sequence[BlockProblem], pools: Sequence[IncumbentPool], stop: StopRule, rel_gap: float
) -> list[PerspectiveCertificate]:
    """Return what the best splits and points of blocks prove; the sets that they round to are offered.

    Parameters
    ----------
    problems : sequence of BlockProblem
        Which `fits_one_hessian`, with the same `hessian` and `damping`.
    pools : sequence of IncumbentPool
        One for each; how far its best set is from the bound weighs the barrier of the split.
    stop : StopRule
        For all together.
    rel_gap : float
        A bound that comes so near to the best set is good enough.

    Notes
    -----
    O(n^3) once, O(n^3) a block and change of its split, in single precision, and O(n^2) a block and step.
    """
    first, many, n = problems[0], len(problems), problems[0].n
    assert first.hessian is not None
    # Inputs of very different sizes would leave the search far from its end; those of most layers would not,
    # whose own scale serves them a little better.
    diagonal = first.hessian_diagonal()
    spread = float(diagonal.max()) > WIDEST_SPREAD * float(diagonal.min())
    root = np.sqrt(diagonal) if spread else np.ones(n)
    matrix = first.hessian / np.outer(root, root) if spread else first.hessian
    if spread:
        matrix[np.diag_indices(n)] = 1.0
    term = ChannelTerm(
        moments=(matrix,),
        start=np.arange(many + 1) * n,
        moment=np.zeros(many, dtype=np.int64),
        scale=np.ones(many),
        inputs=np.tile(np.arange(n), many),
    )
    block = BlockProblem(
        weights=np.concatenate([problem.weights * root for problem in problems]),
        rows=np.zeros((0, many * n)),
        channels=term,
        damping=0.0 if spread else first.damping,
        gradient=np.concatenate([problem.gradient_or_zero / root for problem in problems]),
        n_prune=sum(problem.n_prune for problem in problems),
    )
    counts = np.array([problem.n_keep for problem in problems])
    program = JointChannels(block, Cells(term.start, counts))
    start = np.concatenate([np.zeros(n) if pool.weights is None else pool.weights * root for pool in pools])
    values = np.array([pool.objective for pool in pools])
    finite = np.isfinite(values)
    enough = np.where(finite, values - rel_gap * np.abs(np.where(finite, values, 0.0)), values)
    search = search_by_channels(block, program, start, stop, cutoffs=enough)
    points, splits = search.point.reshape(many, n) / root, search.split.reshape(many, n) * root**2
    found = zip(problems, pools, points, splits, strict=True)
    certificates = []
    for problem, pool, point, split in found:
        provable = provable_split(problem, split)
        residual = problem.linear_term() - (problem.hessian_product(point) - provable * point)
        tiny = np.finfo(np.float64).tiny
        pool.offer(round_joint(residual / np.sqrt(np.maximum(provable, tiny)), problem.n_keep))
        shape = asdict(fisher_shape(problem, rank=False))
        subject = Subject.of(problem, "joint")
        certificates.append(PerspectiveCertificate(subject=subject, point=point, split=provable, **shape))
    return certificates
