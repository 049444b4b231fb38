"""How far the value of a set in a reduced block, computed in float64, can lie above its exact value.

A bound proved on the reduced block, lowered by the allowance, holds for the block.
"""

from __future__ import annotations

import math

import numpy as np

from formulations.dense_forms import error_factor
from formulations.problem import BlockProblem, FloatArray, IntArray
from formulations.relaxations.certified import BoundedVector, column_norms, row_norms

LARGEST_PERTURBATION = 0.1
"""Relative perturbations up to this size are covered by the constants of the proofs."""


def selection_allowance(
    problem: BlockProblem, removed: FloatArray, image: BoundedVector, free: IntArray
) -> float:
    """Return the allowance of the selection program, with `image` = ``H removed`` and its error.

    The gradient of the reduced block is ``g - image``, rounded; the offset two inner products.
    """
    gradient = np.abs(problem.gradient_or_zero)
    size, value = np.abs(removed), np.abs(image.value)
    slopes = image.error + error_factor(4) * (gradient + value)
    lost = float(np.abs(problem.weights[free]) @ slopes[free]) + 0.5 * float(size @ image.error)
    return 2.0 * (lost + error_factor(problem.n + 16) * float(size @ value + gradient @ size))


def joint_allowance(
    problem: BlockProblem,
    smaller: BlockProblem,
    kept: IntArray,
    free: IntArray,
    target: BoundedVector,
    carried: FloatArray,
    cutoff: float,
) -> float:
    """Return the joint program's allowance on rows for sets of value up to `cutoff`; inf if none is proved.

    Parameters
    ----------
    problem, smaller : BlockProblem
        The block and the reduced one.
    kept, free : int arrays
        Indices eliminated and left.
    target : BoundedVector
        ``b = H w - g`` and its error.
    carried : (m,) array
        ``c = L^-1 R_K b_K / damping`` as computed.
    cutoff : float

    Notes
    -----
    With ``G = I + R_K R_K^T / damping`` and ``T = |R_K|_F^2 / damping``, forming and factorising ``G``
    gives ``L L^T = G + E`` with ``|E| <= e1 = 2 (gamma_K + gamma_m)(m + T)``, and as ``G >= I`` a
    triangular solve has a relative error of at most ``e2 = 2 gamma_m sqrt(m + T)`` (Higham 2002,
    theorems 8.5 and 10.3). So, with ``rho = |R_F|_F |u_F|`` and ``c = L^-1 t``, ``t = R_K b_K / damping``
    known up to ``dt``, the value at ``u_F`` moves by at most

    - quadratic: ``(e1 + 2 e2) rho^2``,
    - linear: ``|u_F|`` times the norm over j of ``|r_j| ((5 e2 + 2 e1) |c| + 2 dt)``, the error of
      ``b_j`` and the rounding of the gradient that encodes it,
    - constant: ``3 |c| dt + (4 e2 + 2 e1) |c|^2``, the error of ``|b_K|^2 / damping`` and of two
      constant terms.

    The minimiser ``u`` of a set obeys ``damping / 2 |u - u*|^2 <= cutoff - minimum``, where
    ``|u*| <= |w| + |g| / damping`` and ``minimum >= -|g|^2 / (2 damping)``.
    """
    assert problem.rows is not None
    damping, m = problem.damping, problem.rows.shape[0]
    norms = row_norms(problem, column_norms(problem))
    kept_norm, free_norms = float(np.linalg.norm(norms[kept])), norms[free]
    spread = m + kept_norm**2 / damping
    e1 = 2.0 * (error_factor(kept.size + 8) + error_factor(m + 8)) * spread
    e2 = 2.0 * error_factor(m + 8) * math.sqrt(spread)
    if not max(e1, e2) <= LARGEST_PERTURBATION:
        return math.inf
    b, b_error = target.value[kept], float(np.linalg.norm(target.error[kept]))
    b_norm = float(np.linalg.norm(b))
    dt = 1.01 * kept_norm * (b_error + error_factor(kept.size + 8) * b_norm) / damping
    # |L^-1 t| from its computed value, which errs by e2 of it and by dt.
    c = 1.2 * (float(np.linalg.norm(carried)) + dt)
    gradient_norm = float(np.linalg.norm(problem.gradient_or_zero))
    above = max(cutoff, 0.0) + 0.5 * gradient_norm**2 / damping
    reach = float(np.linalg.norm(problem.weights)) + gradient_norm / damping
    reach += math.sqrt(2.0 * above / damping)
    quadratic = (e1 + 2.0 * e2) * float(free_norms @ free_norms) * reach * reach
    slopes = free_norms * ((5.0 * e2 + 2.0 * e1) * c + 2.0 * dt)
    slopes += target.error[free] + error_factor(8) * np.abs(target.value[free])
    encoded, constant = _encoding(smaller)
    linear = float(np.linalg.norm(slopes + encoded)) * reach
    constant += 3.0 * c * dt + (4.0 * e2 + 2.0 * e1) * c * c
    constant += (2.0 * b_norm * b_error + error_factor(kept.size + 8) * b_norm * b_norm) / damping
    constant += _constant_error(problem, target)
    # The allowance itself is computed in float64.
    return float(1.01 * (quadratic + linear + constant))


def _encoding(smaller: BlockProblem) -> tuple[FloatArray, float]:
    """Errors of the reduced block's gradient ``H w - l`` and of its constant term."""
    assert smaller.rows is not None
    length = error_factor(smaller.n + smaller.rows.shape[0] + 32)
    norms, gradient = column_norms(smaller), np.abs(smaller.gradient_or_zero)
    size = np.abs(smaller.weights)
    reach = float(norms @ size)
    return 2.0 * length * (norms * reach + gradient), length * (reach * reach + float(gradient @ size))


def _constant_error(problem: BlockProblem, target: BoundedVector) -> float:
    """Error of ``1/2 w.(b + g) - g.w`` computed from `target`."""
    size, gradient = np.abs(problem.weights), np.abs(problem.gradient_or_zero)
    value = np.abs(target.value) + gradient
    return float(size @ target.error) + error_factor(problem.n + 16) * float(size @ value + gradient @ size)
