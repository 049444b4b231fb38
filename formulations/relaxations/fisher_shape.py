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
        ``tr(F)^2 / tr(F^2)``, between 1 and the rank of ``F``; None if ``F`` is zero or the figure was
        left out because of its cost.
    """

    rho: float | None
    effective_rank: float | None


def fisher_shape(problem: BlockProblem, gram: FloatArray | None = None, *, rank: bool = True) -> FisherShape:
    """Relative damping and effective rank of a block.

    Parameters
    ----------
    problem : BlockProblem
    gram : square array, optional
        ``R R^T`` or ``R^T R`` if the caller has it: ``tr(F^2)`` is its squared Frobenius norm.
    rank : bool, default True
        Without `gram`, whether to form it; if not, the effective rank is left out.

    Returns
    -------
    FisherShape

    Notes
    -----
    O(m n min(m, n)) with rows, by the smaller of ``R R^T`` and ``R^T R``; O(m n) without the rank;
    O(n^2) with a Hessian.
    """
    if problem.hessian is not None:
        gram = problem.hessian
    elif problem.channels is not None:
        return _with_channels(problem, rank)
    elif gram is None and rank:
        assert problem.rows is not None
        m, n = problem.rows.shape
        gram = np.asarray(problem.rows @ problem.rows.T if m <= n else problem.rows.T @ problem.rows)
    if gram is not None:
        trace = float(np.trace(gram))
    else:
        trace = float(problem.hessian_diagonal().sum()) - problem.n * problem.damping
    if not (problem.n and trace > 0.0):
        return FisherShape(rho=None, effective_rank=None)
    rho = problem.damping * problem.n / trace
    if gram is None:
        return FisherShape(rho=rho, effective_rank=None)
    # Scaled by the trace first: squares of small entries would vanish.
    flat = gram.ravel() / trace
    return FisherShape(rho=rho, effective_rank=1.0 / float(flat @ flat))


def _with_channels(problem: BlockProblem, rank: bool) -> FisherShape:
    """Return the figures of ``F = R^T R + C``: ``tr(F^2) = |R R^T|^2 + 2 tr(R C R^T) + |C|^2``."""
    assert problem.rows is not None
    assert problem.channels is not None
    trace = float(problem.hessian_diagonal().sum()) - problem.n * problem.damping
    if not (problem.n and trace > 0.0):
        return FisherShape(rho=None, effective_rank=None)
    rho = problem.damping * problem.n / trace
    if not rank:
        return FisherShape(rho=rho, effective_rank=None)
    rows, square = problem.rows, 0.0
    gram = (rows @ rows.T if len(rows) <= problem.n else rows.T @ rows).ravel() / trace
    square += float(gram @ gram)
    for channel, span in enumerate(problem.channels.spans()):
        matrix, part = problem.channels.matrix(channel) / trace, rows[:, span]
        square += float((matrix * matrix).sum()) + 2.0 * float(((part @ matrix) * part).sum()) / trace
    return FisherShape(rho=rho, effective_rank=1.0 / square)
