"""The only evaluator of objectives, and the exact update CBS-U.

Every figure that the project prints about a block goes through this module, in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError, cho_factor, cho_solve, cholesky, solve_triangular

from formulations.channels import ChannelTerm
from formulations.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from formulations.problem import LARGEST_FACTORISED, BlockProblem, BoolArray, FloatArray, check_program

LARGEST_RESIDUAL = 1e-9
"""Relative residual up to which a solve by Woodbury stands, where the kept block can be formed."""


def step_loss(problem: BlockProblem, step: ArrayLike) -> float:
    """Loss increase ``g.d + 1/2 d.H d`` of the step `d`, (n,)."""
    d = np.asarray(step, dtype=np.float64)
    if d.shape != problem.weights.shape:
        raise ShapeError("step", f"shape {d.shape}", f"pass ({problem.n},)")
    quadratic = problem.damping * (d @ d)
    if problem.rows is not None:
        image = problem.rows @ d
        quadratic += image @ image
    else:
        quadratic += d @ (problem._hessian @ d)
    if problem.channels is not None:
        quadratic += d @ problem.channels.product(d)
    linear = 0.0 if problem.gradient is None else problem.gradient @ d
    return float(linear + 0.5 * quadratic)


def update(problem: BlockProblem, keep: ArrayLike) -> FloatArray:
    """CBS-U: the best new weights for a given kept set.

    Solves ``d_K = H_KK^-1 (H_KP w_P - g_K)`` with ``d_P = -w_P`` exactly, through the kept block
    when ``n_keep <= m`` or a Hessian is given, and through the m x m Woodbury system otherwise.

    Parameters
    ----------
    problem : BlockProblem
    keep : (n,) bool array_like
        True where the weight stays; any count.

    Returns
    -------
    (n,) float64 array
        New weights, exactly 0 where pruned.

    Raises
    ------
    NotPositiveDefiniteError
        If the kept block of ``H`` is singular.

    Notes
    -----
    O(m s min(m, s) + min(m, s)^3). Source: Yu et al. (ICML 2022), CBS-U; Kurtic et al. (2022).
    """
    kept = _checked_keep(problem, keep)
    new_weights = np.zeros(problem.n)
    index = np.flatnonzero(kept)
    if index.size == 0:
        return new_weights
    removed = np.where(kept, 0.0, problem.weights)
    # Right-hand side of H_KK d_K = H_KP w_P - g_K.
    right = problem.hessian_product(removed)[index]
    if problem.gradient is not None:
        right = right - problem.gradient[index]
    step = solve_kept_block(problem, index, right)
    new_weights[index] = problem.weights[index] + step
    return new_weights


def solve_kept_block(problem: BlockProblem, index: np.ndarray, right: FloatArray) -> FloatArray:
    """Solve ``H_KK x = right`` by Cholesky, with Woodbury when the kept block is the larger."""
    try:
        if problem.channels is not None:
            return _solve_by_channels(problem, index, right)
        if problem.rows is not None:
            block = problem.rows[:, index]
            m = block.shape[0]
            if problem.damping > 0.0 and index.size > m:
                # (damping I + B^T B)^-1 = (I - B^T (damping I + B B^T)^-1 B) / damping
                inner = block @ block.T
                inner[np.diag_indices(m)] += problem.damping
                try:
                    correction = block.T @ cho_solve(cho_factor(inner), block @ right)
                    return np.asarray((right - correction) / problem.damping)
                except LinAlgError:
                    # Badly scaled columns: the kept block itself may still have a factor.
                    if index.size > LARGEST_FACTORISED:
                        raise
            kept_hessian = block.T @ block
        else:
            kept_hessian = problem._hessian[np.ix_(index, index)].copy()
        kept_hessian[np.diag_indices(index.size)] += problem.damping
        return np.asarray(cho_solve(cho_factor(kept_hessian), right))
    except LinAlgError:
        found = f"{problem.damping:g}: the kept block of H is singular"
        raise NotPositiveDefiniteError("damping", found, "use a larger damping") from None


def _solve_by_channels(problem: BlockProblem, index: np.ndarray, right: FloatArray) -> FloatArray:
    """Solve ``H_KK x = right`` by Woodbury, or formed where few are kept or the channels alone are singular.

    Raises `LinAlgError` if H_KK is singular.
    """
    assert problem.rows is not None
    assert problem.channels is not None
    rows, term = problem.rows[:, index], problem.channels.restricted(index)
    if index.size > len(rows):
        try:
            solution = _woodbury(rows, term, problem.damping, right)
        except LinAlgError:
            if index.size > LARGEST_FACTORISED:
                raise
        else:
            left = right - rows.T @ (rows @ solution) - term.product(solution) - problem.damping * solution
            if (
                index.size > LARGEST_FACTORISED
                or np.abs(left).max() <= LARGEST_RESIDUAL * np.abs(right).max()
            ):
                return solution
    kept = rows.T @ rows + term.dense()
    kept[np.diag_indices(index.size)] += problem.damping
    return np.asarray(cho_solve(cho_factor(kept), right))


def _woodbury(rows: FloatArray, term: ChannelTerm, damping: float, right: FloatArray) -> FloatArray:
    """Return ``(R^T R + C + damping I)^-1 right`` by the Cholesky factors of the channels, refined once.

    With ``C + damping I = L L^T`` and ``Z = L^-1 R^T`` the inverse is ``L^-T (I - Z M^-1 Z^T) L^-1``, where
    ``M = I + Z^T Z``.
    """
    parts, factors = list(term.spans()), []
    for channel in range(len(term)):
        matrix = term.matrix(channel)
        matrix[np.diag_indices(len(matrix))] += damping
        factors.append(cholesky(matrix, lower=True, overwrite_a=True, check_finite=False))
    seen = np.empty((term.n, len(rows)))
    for part, factor in zip(parts, factors, strict=True):
        seen[part] = solve_triangular(factor, rows[:, part].T, lower=True, check_finite=False)
    inner = seen.T @ seen
    inner[np.diag_indices(len(rows))] += 1.0
    inner_factor = cho_factor(inner, overwrite_a=True) if len(rows) else None

    def whitened(x: FloatArray, transposed: bool) -> FloatArray:
        pieces = [
            solve_triangular(
                factor, x[part], lower=True, trans="T" if transposed else "N", check_finite=False
            )
            for part, factor in zip(parts, factors, strict=True)
        ]
        return np.concatenate(pieces)

    def solved(x: FloatArray) -> FloatArray:
        x = whitened(x, False)
        if inner_factor is not None:
            x = x - seen @ cho_solve(inner_factor, seen.T @ x)
        return whitened(x, True)

    solution = solved(right)
    left = right - rows.T @ (rows @ solution) - term.product(solution) - damping * solution
    return np.asarray(solution + solved(left))


def trivial_bound(problem: BlockProblem) -> float | None:
    """Return 0 where the gradient vanishes and ``H`` is proved semidefinite, else None.

    The loss model is then never negative.
    """
    flat = not np.any(problem.gradient_or_zero) and problem.curvature_floor() >= 0.0
    return 0.0 if flat else None


def selection_loss(problem: BlockProblem, keep: ArrayLike) -> float:
    """Objective of the selection program: the loss increase when kept weights do not move."""
    kept = _checked_keep(problem, keep)
    return step_loss(problem, np.where(kept, 0.0, -problem.weights))


def joint_loss(problem: BlockProblem, keep: ArrayLike) -> float:
    """Objective of the joint program: the loss increase after the exact update."""
    return step_loss(problem, update(problem, keep) - problem.weights)


def objective(problem: BlockProblem, keep: ArrayLike, program: str) -> float:
    """Objective of `program` ("selection" or "joint") for a kept set."""
    check_program(program)
    return selection_loss(problem, keep) if program == "selection" else joint_loss(problem, keep)


def solved_weights(problem: BlockProblem, keep: ArrayLike, program: str) -> FloatArray:
    """Return the new weights of `program` for a kept set: unchanged or updated where kept, else 0."""
    check_program(program)
    if program == "selection":
        return np.where(_checked_keep(problem, keep), problem.weights, 0.0)
    return update(problem, keep)


def _checked_keep(problem: BlockProblem, keep: ArrayLike) -> BoolArray:
    kept = np.asarray(keep)
    if kept.dtype != np.bool_:
        raise ArgumentError("keep", f"dtype {kept.dtype}", "pass booleans, True where kept")
    if kept.shape != (problem.n,):
        raise ShapeError("keep", f"shape {kept.shape}", f"pass ({problem.n},)")
    return kept
