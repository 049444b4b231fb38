"""Both programs on one dense block as scaled quadratic forms: what the numba kernels work on.

- *joint*: minimise ``1/2 u.M u - l.u + constant`` over vectors ``u`` with at most `n_keep` non-zeros;
  ``M`` has unit diagonal (the program does not change when a column is rescaled).
- *selection*: minimise ``1/2 y.A y + c.y`` over ``y in {0, 1}^n`` with ``sum y = n_prune``.

Each form knows its rounding: a proven bound on how far values and bounds computed from it in float64
can lie from the exact ones. Bounds are lowered by it before anyone sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, cholesky

from formulations.problem import BlockProblem, FloatArray
from formulations.support import Support

UNIT_ROUNDOFF = float(np.finfo(np.float64).eps) / 2.0
EIGENVALUES_LARGEST = 600
"""Largest joint form whose least eigenvalue is computed; beyond it, a share of an estimate is proved."""
ESTIMATE_STEPS = 12
"""Inverse power steps of that estimate."""
SHARES_TRIED = (0.5, 0.05, 0.005)
"""Shares of the estimate that are tried, until one is proved."""
UNDERFLOW = 1e-300
"""More than all terms of a bound that vanish in float64 can add up to, in units of the loss."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Terms of the rounding allowance ``gamma (3 r^2 + slope r + fixed)``.

    ``r = one_norm + growth sqrt(2 (value - minimum))`` bounds the 1-norm of every point that matters
    to an optimum of at most `value`; see `joint_form`.
    """

    gamma: float
    fixed: float
    slope: float = 0.0
    one_norm: float = 0.0
    growth: float = 0.0
    minimum: float = 0.0

    @property
    def reach(self) -> FloatArray:
        """``gamma``, `one_norm`, `growth`, `minimum` as kernels take them, (4,)."""
        return np.array([self.gamma, self.one_norm, self.growth, self.minimum])

    def allowance(self, value: float) -> float:
        """Return the allowance in form units once a set of value `value` is known."""
        if not math.isfinite(self.growth):
            return math.inf
        above = max(value - self.minimum, 0.0) + self.gamma * (abs(value) + self.fixed)
        reach = self.one_norm + self.growth * math.sqrt(2.0 * above)
        return self.gamma * (3.0 * reach * reach + self.slope * reach + self.fixed)


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
    measure : callable
        Computes `rounding` once it is asked for: sets are found without it, and it costs O(n^3).
    """

    matrix: FloatArray
    linear: FloatArray
    constant: float
    scale: float
    measure: Callable[[], Rounding]

    @cached_property
    def rounding(self) -> Rounding:
        """What gives the allowance for rounding; infinite if the form is singular to working precision."""
        return self.measure()


def error_factor(operations: int) -> float:
    """``gamma_q = q u / (1 - q u)``: relative error of a chain of `operations` roundings.

    Source: Higham, Accuracy and Stability of Numerical Algorithms (2002), lemma 3.1.
    """
    product = operations * UNIT_ROUNDOFF
    return product / (1.0 - product)


def joint_form(problem: BlockProblem) -> DenseForm:
    """Return the joint program in column-scaled new weights ``u``; O(m n^2 + n^3).

    Raises
    ------
    NotPositiveDefiniteError
        If ``H`` is singular.

    Notes
    -----
    Forming ``M``, its Schur complements, Cholesky solves and definiteness tests are exact for data
    with ``|dM_ij| <= gamma`` (unit diagonal) and ``|dl_i| <= gamma * slope`` (Higham 2002, chapters 3
    and 10). They move the value at ``u`` by ``1/2 gamma |u|_1^2 + gamma slope |u|_1``, and a relaxation
    that is indefinite by rounding by ``1/2 gamma (|u|_1 + |v|_1)^2``. Only points of value at most the
    incumbent's matter, and those obey ``1/2 (u - u*).M (u - u*) <= value - minimum`` with ``u*`` the
    unconstrained minimiser.
    """
    problem.require_definite()
    n = problem.n
    if n == 0:
        return DenseForm(
            matrix=np.zeros((0, 0)),
            linear=np.zeros(0),
            constant=0.0,
            scale=1.0,
            measure=partial(Rounding, gamma=0.0, fixed=0.0),
        )
    hessian = problem.dense_hessian()
    root = np.sqrt(np.diagonal(hessian))
    matrix = hessian / root[:, None] / root[None, :]
    matrix = np.ascontiguousarray(0.5 * (matrix + matrix.T))
    matrix[np.diag_indices(n)] = 1.0
    linear = problem.linear_term() / root
    scale = float(linear @ linear) / n or 1.0
    linear = linear / math.sqrt(scale)
    constant = problem.constant_term() / scale
    return DenseForm(
        matrix=matrix,
        linear=linear,
        constant=constant,
        scale=scale,
        measure=partial(_joint_rounding, problem, matrix, linear, constant, root, scale),
    )


def _joint_rounding(
    problem: BlockProblem,
    matrix: FloatArray,
    linear: FloatArray,
    constant: float,
    root: FloatArray,
    scale: float,
) -> Rounding:
    n = problem.n
    gradient = np.abs(problem.gradient_or_zero)
    # Sums over samples, then over weights, then the eliminations.
    gamma = error_factor(2 * summed_entries(problem) + 12 * n + 64)
    reach = float(root @ np.abs(problem.weights))
    fixed = (reach * reach + float(gradient @ np.abs(problem.weights))) / scale + UNDERFLOW / scale / gamma
    known = 0.0
    if problem.rows is not None and problem.channels is None and problem.rows.shape[0] < n:
        # Without rows for all directions this is nearly all there is.
        known = problem.damping / float(root.max()) ** 2 * (1.0 - 1e-9)
    lowest, minimiser = _lowest_and_minimiser(matrix, linear, known)
    # Of the matrix as it is in exact arithmetic: forming it moves an eigenvalue by n gamma at most.
    lowest -= n * gamma
    if lowest <= 0.0:
        return Rounding(gamma=gamma, fixed=fixed, growth=math.inf)
    return Rounding(
        gamma=gamma,
        fixed=fixed,
        slope=float((reach + gradient / root).max()) / math.sqrt(scale),
        one_norm=float(np.abs(minimiser).sum()) * (1.0 + 1e-6),
        growth=math.sqrt(n / lowest),
        minimum=constant - 0.5 * float(linear @ minimiser),
    )


def _lowest_and_minimiser(matrix: FloatArray, linear: FloatArray, known: float) -> tuple[float, FloatArray]:
    """Return a proved lower bound on the eigenvalues, and the minimiser if it is positive.

    Large matrices: `known`, or where that is not positive a share of the estimate of inverse power steps,
    which a Cholesky factorisation of the shifted matrix confirms up to its backward error (Higham 2002,
    theorem 10.3). Either takes a tenth of the time of the eigenvalues.
    """
    n = linear.size
    if n <= EIGENVALUES_LARGEST:
        eigenvalues, vectors = np.linalg.eigh(matrix)
        lowest = float(eigenvalues[0] - 4.0 * n * UNIT_ROUNDOFF * eigenvalues[-1])
        if lowest <= 0.0:
            return lowest, np.zeros(n)
        return lowest, vectors @ ((vectors.T @ linear) / eigenvalues)
    try:
        factor = cho_factor(matrix, lower=True, check_finite=False)
    except LinAlgError:
        return -math.inf, np.zeros(n)
    minimiser = np.asarray(cho_solve(factor, linear, check_finite=False))
    if known > 0.0:
        return known, minimiser
    vector = np.random.default_rng(0).normal(size=n)
    for _ in range(ESTIMATE_STEPS):
        vector = cho_solve(factor, vector / np.linalg.norm(vector), check_finite=False)
    lowest = -math.inf
    for share in SHARES_TRIED:
        shift = share / float(np.linalg.norm(vector))
        shifted = matrix.copy()
        shifted[np.diag_indices(n)] -= shift
        if _factorises(shifted):
            lowest = shift - 2.0 * n * error_factor(n + 8)
            break
    return lowest, minimiser


def _factorises(matrix: FloatArray) -> bool:
    """Whether a Cholesky factorisation, which overwrites `matrix`, succeeds."""
    try:
        cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError:
        return False
    return True


def summed_entries(problem: BlockProblem) -> int:
    """Return of how many terms an entry of ``H`` is the sum, the damping left out."""
    height = problem.rows.shape[0] if problem.rows is not None else 1
    return height if problem.channels is None else height + 2


def selection_form(problem: BlockProblem) -> DenseForm:
    """Return the selection program with ``A = diag(w) H diag(w)`` and ``c = -g w``; O(m n^2).

    Notes
    -----
    ``|dA_ij| <= gamma a_i a_j`` with ``a_i = sqrt(A_ii)``, and ``y`` picks `n_prune` entries, so a value
    moves by at most ``gamma ((sum of the n_prune largest a_i)^2 + sum |c_i|)``.
    """
    n = problem.n
    weights = problem.weights
    matrix = problem.dense_hessian() * weights[:, None] * weights[None, :]
    matrix = 0.5 * (matrix + matrix.T)
    linear = -problem.gradient_or_zero * weights
    scale = 1.0
    if n:
        scale = float(np.trace(matrix)) / n
        if not scale > 0.0:
            # No costs of its own, or only such as rounding has made negative.
            scale = float(np.abs(np.diagonal(matrix)).mean()) or float(np.abs(linear).mean()) or 1.0
    matrix = np.ascontiguousarray(matrix / scale)
    linear = linear / scale
    return DenseForm(
        matrix=matrix,
        linear=linear,
        constant=0.0,
        scale=scale,
        measure=partial(_selection_rounding, problem, matrix, linear, scale),
    )


def _selection_rounding(
    problem: BlockProblem, matrix: FloatArray, linear: FloatArray, scale: float
) -> Rounding:
    n = problem.n
    # Groups may be of unequal size, and are summed over before anything else.
    tied = problem.sets.unit is not None
    most = n if tied else problem.n_prune
    reach = np.sort(np.sqrt(np.maximum(np.diagonal(matrix), 0.0)))[n - most :].sum()
    gamma = error_factor(2 * summed_entries(problem) + (14 if tied else 12) * n + 64)
    fixed = 2.0 * float(reach * reach + np.abs(linear).sum())
    dip = _dip(problem)
    # A relaxation that is indefinite by rounding overestimates by 1/2 dip (y - z).A_ii (y - z) at most.
    fixed += dip / gamma * float(np.abs(np.diagonal(matrix)).sum()) if math.isfinite(dip) else 0.0
    fixed += UNDERFLOW / scale / gamma
    return Rounding(gamma=gamma, fixed=fixed, growth=0.0 if math.isfinite(dip) else math.inf)


def _dip(problem: BlockProblem) -> float:
    """How far the eigenvalues of ``H``, scaled to a unit diagonal, may be below 0.

    A Hessian that was computed from rows is semidefinite up to rounding; infinite if not even that is
    proved, by one Cholesky factorisation.
    """
    if problem.n == 0 or problem.curvature_floor() >= 0.0:
        return 0.0
    diagonal = problem.hessian_diagonal()
    used = np.flatnonzero(diagonal)
    hessian = problem.dense_hessian()
    rest = np.flatnonzero(diagonal == 0.0)
    if bool((diagonal < 0.0).any() or (hessian[rest] != 0.0).any()):
        return math.inf
    root = np.sqrt(diagonal[used])
    scaled = hessian[np.ix_(used, used)] / root[:, None] / root[None, :]
    shift = 4.0 * used.size * error_factor(used.size + 8)
    scaled[np.diag_indices(used.size)] = 1.0 + shift
    return 2.0 * shift if _factorises(scaled) else math.inf


def dense_form(problem: BlockProblem, program: str) -> DenseForm:
    """Return the scaled dense form of `program`, "selection" or "joint"."""
    return joint_form(problem) if program == "joint" else selection_form(problem)


def folded_form(form: DenseForm, support: Support | None) -> tuple[FloatArray, FloatArray]:
    """Return matrix and linear term of a selection form in units of a support; None is a count."""
    if support is None:
        return form.matrix, form.linear
    return support.folded_matrix(form.matrix), support.folded(form.linear)
