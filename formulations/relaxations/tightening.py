"""Fix weights by the bound, relax what is left with a better split, and fix again."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from formulations.errors import ArgumentError
from formulations.incumbents import IncumbentPool
from formulations.loss import solve_kept_block, solved_weights
from formulations.problem import LARGEST_FACTORISED, SPLIT_LARGEST, BlockProblem, FloatArray
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.certificate import Fixing, RelaxationCertificate
from formulations.relaxations.certified import value_ceiling
from formulations.relaxations.cluster_split import ClusterSplitCertificate
from formulations.relaxations.perspective import PerspectiveCertificate
from formulations.relaxations.reduced_block import ReducedBlock, reduced_block
from formulations.relaxations.split_relaxation import relax_with_split
from formulations.solution import Stopped

ROUNDS = 5
SPLIT_ROUNDS = 40
"""Barrier steps on the diagonal split of one block at most."""
KEPT_LARGEST = 4000
"""Most weights not fixed as pruned for which a joint split is lifted: its check is a factorisation."""
RIDGE_SHARE = 1e-3
"""Share of the damping that stays with the kept weights as their part of the split."""
LEAST_SHARE_FIXED = 0.05
"""A round that fixes less than this share of the free weights is the last."""


def tightened(
    problem: BlockProblem,
    pool: IncumbentPool,
    certificate: RelaxationCertificate,
    *,
    rel_gap: float,
    improve_split: bool,
    stopped: Stopped,
) -> RelaxationCertificate:
    """Return the certificate with its fixings, or a better one that rests on them.

    Parameters
    ----------
    problem : BlockProblem
    pool : IncumbentPool
        Its value is what fixes weights; rounded relaxations of reduced blocks are offered to it.
    certificate : RelaxationCertificate
    rel_gap : float
        Gap at which no further round is made.
    improve_split : bool
        Whether to optimise the split of reduced blocks.
    stopped : callable
        Whether the time is over.

    Returns
    -------
    RelaxationCertificate
        Its bound is at least that of `certificate`.
    """
    bound = certificate.lower_bound(problem)
    free = problem.n
    for _ in range(ROUNDS):
        certificate, fixing = _with_fixing(problem, pool, certificate)
        left = 0 if fixing is None else int(fixing.free.sum())
        closed = pool.objective - bound <= rel_gap * abs(pool.objective)
        if fixing is None or closed or stopped() or left > (1.0 - LEAST_SHARE_FIXED) * free:
            break
        free = left
        candidate = _relaxed_again(problem, pool, certificate, fixing, improve_split, stopped)
        value = -math.inf if candidate is None else candidate.lower_bound(problem)
        if candidate is None or value <= bound:
            break
        certificate, bound = candidate, value
    return certificate if certificate.fixing is not None else _with_fixing(problem, pool, certificate)[0]


def _with_fixing(
    problem: BlockProblem, pool: IncumbentPool, certificate: RelaxationCertificate
) -> tuple[RelaxationCertificate, Fixing | None]:
    """Return the certificate with what it fixes given the best set known."""
    assert pool.keep is not None
    cutoff = value_ceiling(problem, solved_weights(problem, pool.keep, pool.program))
    if certificate.basis is not None and certificate.basis.fixing is not None:
        cutoff = min(cutoff, certificate.basis.fixing.cutoff)
    fixing = certificate.fixed_below(problem, cutoff)
    return replace(certificate, fixing=fixing), fixing


def _relaxed_again(
    problem: BlockProblem,
    pool: IncumbentPool,
    basis: RelaxationCertificate,
    fixing: Fixing,
    improve_split: bool,
    stopped: Stopped,
) -> RelaxationCertificate | None:
    """Return a certificate on the weights left free, or None where that cannot help or costs too much.

    What fixings leave of a support that is no count is none of the same kind. Of channels they leave a
    Hessian matrix, for which that of the block is formed.
    """
    free = int(fixing.free.sum())
    too_large = problem.channels is not None and problem.n > LARGEST_FACTORISED
    if problem.support is not None or too_large:
        return None
    joint = pool.program == "joint"
    if free > SPLIT_LARGEST or (joint and problem.n - int(fixing.prune.sum()) > KEPT_LARGEST):
        return None
    ridge = RIDGE_SHARE * _least_curvature(problem, basis) if joint else 0.0
    try:
        reduced = reduced_block(problem, pool.program, fixing, ridge=ridge)
        if not 0 < reduced.problem.n_prune < free:
            # One set is left.
            pool.offer(reduced.lifted(np.full(free, reduced.problem.n_prune == 0)))
            point = split = np.zeros(free)
        else:
            cutoff = pool.objective - reduced.offset
            rounds = SPLIT_ROUNDS if improve_split else 0
            inner, keep = relax_with_split(reduced.problem, pool.program, cutoff, rounds, stopped)
            pool.offer(reduced.lifted(keep))
            point, split = inner.point, _split_of(inner)
    except ArgumentError:
        # Singular, or out of the range of float64.
        return None
    lift = _lifted_joint if joint else _lifted_selection
    return lift(reduced, basis, point, split, ridge)


def _least_curvature(problem: BlockProblem, basis: RelaxationCertificate) -> float:
    """Return a positive number that ``H`` exceeds: the damping, or the least entry of a proved split."""
    if problem.damping > 0.0:
        return problem.damping
    if isinstance(basis, ClusterSplitCertificate):
        return basis.least_eigenvalue
    return float(_split_of(basis).min())


def _split_of(certificate: RelaxationCertificate) -> FloatArray:
    """Return the diagonal part of either certificate."""
    if isinstance(certificate, PerspectiveCertificate):
        return certificate.split
    assert isinstance(certificate, CappedSimplexCertificate)
    return certificate.shift


def _lifted_joint(
    reduced: ReducedBlock, basis: RelaxationCertificate, point: FloatArray, split: FloatArray, ridge: float
) -> PerspectiveCertificate:
    """Return the point and split of the reduced block on the whole one, the kept weights at their best."""
    parent, fixing, free = reduced.parent, reduced.fixing, reduced.free
    full, full_split = np.zeros(parent.n), np.full(parent.n, ridge)
    full[free], full_split[free] = point, split
    kept = np.flatnonzero(fixing.keep)
    removed = np.where(fixing.keep, 0.0, parent.weights - full)
    right = parent.hessian_product(removed)[kept] - parent.gradient_or_zero[kept]
    if kept.size:
        full[kept] = parent.weights[kept] + solve_kept_block(parent, kept, right)
    return PerspectiveCertificate(
        subject=basis.subject,
        point=full,
        split=np.maximum(full_split, np.finfo(np.float64).tiny),
        rho=basis.rho,
        effective_rank=basis.effective_rank,
        basis=basis,
    )


def _lifted_selection(
    reduced: ReducedBlock, basis: RelaxationCertificate, point: FloatArray, split: FloatArray, ridge: float
) -> CappedSimplexCertificate:
    """Return the point and shift of the reduced block on the whole one; `ridge` is not used."""
    full, full_shift = reduced.fixing.prune.astype(np.float64), np.zeros(reduced.parent.n)
    full[reduced.free], full_shift[reduced.free] = point, split
    return CappedSimplexCertificate(
        subject=basis.subject,
        point=full,
        shift=full_shift,
        rho=basis.rho,
        effective_rank=basis.effective_rank,
        basis=basis,
    )
