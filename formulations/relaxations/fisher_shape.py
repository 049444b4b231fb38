"""How hard a block is to bound: its relative damping and the effective rank of its Fisher matrix.

The gap of the perspective and the capped-simplex bound falls with ``rho`` and with ``n`` over the
effective rank; both are stated with every certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from formulations.problem import BlockProblem, FloatArray


@dataclass(frozen=True, kw_only=True)
class FisherShape:
    """Two figures of ``F = H - damping I``; they describe a block, no proof rests on them.

    Attributes
    ----------
    rho : float or None
        ``damping`` over the mean diagonal entry of ``F``; None if ``F`` is zero.
    effective_rank : float or None
        ``tr(F)^2 / tr(F^2)``, between 1 and the rank of ``F``; None if ``F`` is zero.
    """

    rho: float | None
    effective_rank: float | None


def fisher_shape(problem: BlockProblem, gram: FloatArray | None = None) -> FisherShape:
    """Relative damping and effective rank of a block.

    Parameters
    ----------
    problem : BlockProblem
    gram : square array, optional
        ``R R^T`` or ``R^T R`` if the caller has it: ``tr(F^2)`` is its squared Frobenius norm.

    Returns
    -------
    FisherShape

    Notes
    -----
    O(m n min(m, n)) with rows, by the smaller of ``R R^T`` and ``R^T R``; O(n^2) with a Hessian.
    """
    if problem.hessian is not None:
        trace, square = float(np.trace(problem.hessian)), _square(problem.hessian)
    else:
        assert problem.rows is not None
        gram = fisher_gram(problem.rows) if gram is None else gram
        trace, square = float(np.trace(gram)), _square(gram)
    if not (problem.n and trace > 0.0 and square > 0.0):
        return FisherShape(rho=None, effective_rank=None)
    return FisherShape(rho=problem.damping * problem.n / trace, effective_rank=trace * (trace / square))


def fisher_gram(rows: FloatArray) -> FloatArray:
    """The smaller of ``R R^T`` and ``R^T R`` for `rows` ``R`` of shape (m, n); O(m n min(m, n))."""
    return np.asarray(rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows)


def _square(matrix: FloatArray) -> float:
    """Squared Frobenius norm."""
    flat = matrix.ravel()
    return float(flat @ flat)
