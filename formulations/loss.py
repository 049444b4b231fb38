"""The only evaluator of objectives, the exact update CBS-U, and `verify`.

Every figure that the project prints about a block goes through this module, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from formulations.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from formulations.problem import BlockProblem, BoolArray, FloatArray, check_program
from formulations.solution import BlockSolution, Termination

OBJECTIVE_TOLERANCE = 1e-7
"""Relative difference at which a stated objective counts as the recomputed one."""


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
        if problem.rows is not None:
            block = problem.rows[:, index]
            m = block.shape[0]
            if problem.damping > 0.0 and index.size > m:
                # (damping I + B^T B)^-1 = (I - B^T (damping I + B B^T)^-1 B) / damping
                inner = block @ block.T
                inner[np.diag_indices(m)] += problem.damping
                correction = block.T @ cho_solve(cho_factor(inner), block @ right)
                return np.asarray((right - correction) / problem.damping)
            kept_hessian = block.T @ block
        else:
            kept_hessian = problem._hessian[np.ix_(index, index)].copy()
        kept_hessian[np.diag_indices(index.size)] += problem.damping
        return np.asarray(cho_solve(cho_factor(kept_hessian), right))
    except LinAlgError:
        found = f"{problem.damping:g}: the kept block of H is singular"
        raise NotPositiveDefiniteError("damping", found, "use a larger damping") from None


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
    """New weights of `program` for a kept set: unchanged or updated where kept, else 0."""
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


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    ok : bool
        No contradiction was found.
    feasible : bool
        The set has exactly the right size and pruned weights are exactly 0.
    objective : float or None
        The objective recomputed in float64.
    bound : float or None
        The bound recomputed from the certificate, None without one.
    bound_checked : bool
        Whether the certificate alone proves the stated bound. False for a tree's bound that rests
        on the search and not only on the stored certificate.
    notes : tuple of str
        What is wrong, and what could not be checked.
    """

    ok: bool
    feasible: bool
    objective: float | None
    bound: float | None
    bound_checked: bool
    notes: tuple[str, ...]


def verify(problem: BlockProblem, solution: BlockSolution) -> Verification:
    """Recompute feasibility, objective and certified bound of a solution, trusting nobody.

    Parameters
    ----------
    problem : BlockProblem
    solution : BlockSolution

    Returns
    -------
    Verification
        `ok` is False when the set has the wrong size, weights disagree with the set, the objective
        differs by more than `OBJECTIVE_TOLERANCE` relative, the bound exceeds the objective, or the
        certificate lists a weight as fixed that it does not prove fixed.
    """
    wrong: list[str] = []
    open_points: list[str] = []
    feasible, value = _verify_incumbent(problem, solution, wrong)
    bound, checked = _verify_bound(problem, solution, value, wrong, open_points)
    notes = tuple(wrong + open_points)
    return Verification(
        ok=not wrong, feasible=feasible, objective=value, bound=bound, bound_checked=checked, notes=notes
    )


def _verify_incumbent(
    problem: BlockProblem, solution: BlockSolution, wrong: list[str]
) -> tuple[bool, float | None]:
    if solution.keep is None or solution.weights is None:
        if solution.termination in (Termination.OPTIMAL, Termination.FEASIBLE):
            wrong.append(f"termination is {solution.termination.value} but there is no set")
        return False, None
    if solution.keep.shape != (problem.n,) or solution.weights.shape != (problem.n,):
        wrong.append(f"solution of {solution.keep.size} weights for a block of {problem.n}")
        return False, None
    feasible = True
    if int(solution.keep.sum()) != problem.n_keep:
        wrong.append(f"keeps {int(solution.keep.sum())} weights, the problem asks for {problem.n_keep}")
        feasible = False
    if np.any(solution.weights[~solution.keep] != 0.0):
        wrong.append("a pruned weight is not exactly 0")
        feasible = False
    if solution.program == "selection" and np.any(
        solution.weights[solution.keep] != problem.weights[solution.keep]
    ):
        wrong.append("a kept weight moved although the program is selection")
        feasible = False
    value = step_loss(problem, solution.weights - problem.weights)
    if solution.objective is None or not math.isclose(
        value, solution.objective, rel_tol=OBJECTIVE_TOLERANCE, abs_tol=_rounding(problem)
    ):
        wrong.append(f"stated objective {solution.objective}, recomputed {value!r}")
    return feasible, value


def _verify_bound(
    problem: BlockProblem,
    solution: BlockSolution,
    value: float | None,
    wrong: list[str],
    open_points: list[str],
) -> tuple[float | None, bool]:
    stated = solution.bound
    slack = _rounding(problem)
    if stated is not None and value is not None and stated > value + slack:
        wrong.append(f"bound {stated!r} exceeds the objective {value!r}")
    if solution.certificate is None:
        if stated is not None:
            open_points.append("bound has no certificate: it rests on the method that stated it")
        return None, False
    bound = solution.certificate.lower_bound(problem)
    if not solution.certificate.proves_fixing(problem):
        wrong.append(f"{solution.certificate.n_fixed} weights listed as fixed are not all proved so")
    if value is not None and bound > value + slack:
        wrong.append(f"certified bound {bound!r} exceeds the objective {value!r}")
    checked = stated is not None and bound >= stated - slack
    if stated is not None and not checked:
        open_points.append(f"certificate proves {bound!r}; the rest of {stated!r} rests on the search")
    return bound, checked


def _rounding(problem: BlockProblem) -> float:
    """Rounding error of an objective: a few ulps of the largest terms that cancel in it."""
    scale = abs(problem.constant_term()) + float(np.abs(problem.gradient_or_zero) @ np.abs(problem.weights))
    return 64.0 * np.finfo(np.float64).eps * scale
