"""Both programs on one dense block as scaled quadratic forms: what the numba kernels work on.

- *joint*: minimise ``1/2 u.M u - l.u + constant`` over vectors ``u`` with at most `n_keep` non-zeros;
  ``M`` has unit diagonal (the program does not change when a column is rescaled).
- *selection*: minimise ``1/2 y.A y + c.y`` over ``y in {0, 1}^n`` with ``sum y = n_prune``.

Each form carries a rounding allowance: a proven bound on how far values computed from it in float64
can lie from the exact ones. Bounds are lowered by it before anyone sees them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from formulations.problem import BlockProblem, FloatArray

UNIT_ROUNDOFF = float(np.finfo(np.float64).eps) / 2.0


@dataclass(frozen=True, kw_only=True)
class DenseForm:
    """A scaled dense quadratic form of one program.

    Attributes
    ----------
    matrix : (n, n) float64 array
        ``M`` (joint, unit diagonal) or ``A`` (selection, mean diagonal 1).
    linear : (n,) float64 array
        ``l`` (joint, subtracted) or ``c`` (selection, added).
    constant : float
        Constant term, in form units.
    scale : float
        Loss units of one form unit: ``objective = scale * form value``.
    allowance : float
        Proven bound on the rounding error of a form value or of a bound on it, in form units;
        infinity if the form is singular to working precision.
    """

    matrix: FloatArray
    linear: FloatArray
    constant: float
    scale: float
    allowance: float


def error_factor(operations: int) -> float:
    """``gamma_q = q u / (1 - q u)``: relative error of a chain of `operations` roundings.

    Source: Higham, Accuracy and Stability of Numerical Algorithms (2002), lemma 3.1.
    """
    product = operations * UNIT_ROUNDOFF
    return product / (1.0 - product)


def joint_form(problem: BlockProblem) -> DenseForm:
    """The joint program in column-scaled new weights ``u``; O(m n^2 + n^3).

    Raises
    ------
    NotPositiveDefiniteError
        If ``H`` is singular.
    """
    problem.require_definite()
    n = problem.n
    if n == 0:
        return DenseForm(matrix=np.zeros((0, 0)), linear=np.zeros(0), constant=0.0, scale=1.0, allowance=0.0)
    hessian = problem.dense_hessian()
    root = np.sqrt(np.diagonal(hessian))
    matrix = hessian / root[:, None] / root[None, :]
    matrix = np.ascontiguousarray(0.5 * (matrix + matrix.T))
    matrix[np.diag_indices(n)] = 1.0
    linear = problem.linear_term() / root
    scale = float(linear @ linear) / n or 1.0
    linear = linear / math.sqrt(scale)
    return DenseForm(
        matrix=matrix,
        linear=linear,
        constant=problem.constant_term() / scale,
        scale=scale,
        allowance=_joint_allowance(problem, matrix, linear, root, scale),
    )


def _joint_allowance(
    problem: BlockProblem, matrix: FloatArray, linear: FloatArray, root: FloatArray, scale: float
) -> float:
    """Rounding allowance of the joint form.

    The form, its Schur complements and Cholesky solves are exact for data with
    ``|dM_ij| <= gamma`` (unit diagonal) and ``|dl_i| <= gamma * (sum_j d_j |w_j| + |g_i| / d_i)``.
    A minimiser over any support has ``u.M u <= l.M^-1 l = 2 E``, so ``|u|^2 <= 2 E / lambda_min`` and
    the value moves by at most ``1/2 gamma |u|_1^2 + |dl|.|u| + |dconstant|``.
    """
    n = problem.n
    eigenvalues, vectors = np.linalg.eigh(matrix)
    lowest = float(eigenvalues[0] - 4.0 * n * UNIT_ROUNDOFF * eigenvalues[-1])
    if lowest <= 0.0:
        return math.inf
    projected = vectors.T @ linear
    energy = float(0.5 * (projected * projected / np.maximum(eigenvalues, lowest)).sum())
    height = problem.rows.shape[0] if problem.rows is not None else 1
    gamma = error_factor(2 * height + 12 * n + 64)
    reach = float(root @ np.abs(problem.weights))
    spread = (reach + np.abs(problem.gradient_or_zero) / root) / math.sqrt(scale)
    constant = (reach * reach + float(np.abs(problem.gradient_or_zero) @ np.abs(problem.weights))) / scale
    norm_squared = 2.0 * energy / lowest
    return gamma * (
        0.5 * n * norm_squared + math.sqrt(norm_squared) * float(np.linalg.norm(spread)) + constant
    )


def selection_form(problem: BlockProblem) -> DenseForm:
    """The selection program with ``A = diag(w) H diag(w)`` and ``c = -g w``; O(m n^2)."""
    n = problem.n
    weights = problem.weights
    matrix = problem.dense_hessian() * weights[:, None] * weights[None, :]
    matrix = 0.5 * (matrix + matrix.T)
    linear = -problem.gradient_or_zero * weights
    scale = 1.0
    if n:
        scale = float(np.trace(matrix)) / n or float(np.abs(linear).mean()) or 1.0
    matrix = np.ascontiguousarray(matrix / scale)
    linear = linear / scale
    # |dA_ij| <= gamma a_i a_j with a_i = sqrt(A_ii), and y picks at most n_prune entries.
    reach = np.sort(np.sqrt(np.maximum(np.diagonal(matrix), 0.0)))[n - problem.n_prune :].sum()
    height = problem.rows.shape[0] if problem.rows is not None else 1
    gamma = error_factor(2 * height + 12 * n + 64)
    return DenseForm(
        matrix=matrix,
        linear=linear,
        constant=0.0,
        scale=scale,
        allowance=gamma * float(reach * reach + np.abs(linear).sum()),
    )


def dense_form(problem: BlockProblem, program: str) -> DenseForm:
    """The scaled dense form of `program`, "selection" or "joint"."""
    return joint_form(problem) if program == "joint" else selection_form(problem)
