"""The data that every model is written in: one block, scaled so that solver tolerances mean something.

Weights are divided by their root mean square and the Hessian by its mean diagonal, so coefficients
are of order 1 and an absolute tolerance of 1e-9 is a relative one. ``objective_scale`` turns an
objective of a model back into a loss increase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, eigh, eigvalsh

from formulations.dense_forms import EIGENVALUES_LARGEST
from formulations.errors import NotPositiveDefiniteError
from formulations.incumbents import checked_incumbent, greedy
from formulations.loss import joint_loss
from formulations.problem import BlockProblem, FloatArray
from formulations.solution import BlockSolution
from formulations.support import Support

RANK_TOLERANCE = 1e-13
"""Eigenvalues below this share of the largest (times n) are rounding and are left out of a factor."""
BOX_MARGIN = 1e-6
"""Least relative and absolute widening of the weight box, for rounding in its computation."""
EPSILON = float(np.finfo(np.float64).eps)
WORST_CONDITION = 1e12
"""Condition number of ``H`` past which the box cannot be computed safely."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledBlock:
    """One block in scaled units.

    Attributes
    ----------
    n_prune : int
    support : Support
        What may be kept.
    weights : (n,) float64 array
        Weights divided by `weight_scale`.
    hessian : (n, n) float64 array
        ``H`` divided by its mean diagonal, damping included.
    gradient : (n,) float64 array
    damping : float
        The part of the scaled diagonal that is damping.
    weight_scale, objective_scale : float
        Factors back to the units of the problem.
    """

    n_prune: int
    support: Support
    weights: FloatArray
    hessian: FloatArray
    gradient: FloatArray
    damping: float
    weight_scale: float
    objective_scale: float

    @property
    def n(self) -> int:
        """Number of weights."""
        return int(self.weights.size)

    @property
    def hessian_scale(self) -> float:
        """What ``H`` was divided by."""
        return self.objective_scale / self.weight_scale**2

    @property
    def pair_costs(self) -> FloatArray:
        """``A = diag(w) H diag(w)``, (n, n): the quadratic form of the selection program."""
        return np.asarray(self.weights[:, None] * self.hessian * self.weights[None, :])

    @property
    def gains(self) -> FloatArray:
        """``c_i = g_i w_i``, (n,): what removing weight i alone gains to first order."""
        return np.asarray(self.gradient * self.weights)

    @property
    def linear_term(self) -> FloatArray:
        """``b = H w - g``, (n,): the linear form of the joint program in the new weights."""
        return np.asarray(self.hessian @ self.weights - self.gradient)

    @property
    def constant(self) -> float:
        """``1/2 w.H w - g.w``: the loss increase of removing every weight."""
        w = self.weights
        return float(0.5 * w @ self.hessian @ w - self.gradient @ w)


def scale_block(problem: BlockProblem) -> ScaledBlock:
    """Return `problem` in scaled units; O(m n^2) with rows."""
    hessian = problem.dense_hessian()
    weight_scale = _positive_or_one(float(np.sqrt(np.mean(problem.weights**2))) if problem.n else 0.0)
    hessian_scale = _positive_or_one(float(np.mean(np.diagonal(hessian))) if problem.n else 0.0)
    return ScaledBlock(
        n_prune=problem.n_prune,
        support=problem.sets,
        weights=problem.weights / weight_scale,
        hessian=hessian / hessian_scale,
        gradient=problem.gradient_or_zero / (hessian_scale * weight_scale),
        damping=problem.damping / hessian_scale,
        weight_scale=weight_scale,
        objective_scale=hessian_scale * weight_scale**2,
    )


def _positive_or_one(value: float) -> float:
    return value if value > 0.0 else 1.0


def diagonal_split(block: ScaledBlock) -> FloatArray:
    """Return ``D >= 0``, (n,), with ``H - diag(D)`` positive semidefinite.

    The better of two multiples: of the identity (at least the damping, which needs no proof) and of
    ``diag(H)``, measured by ``sum_i D_i w_i^2``, the convexity that the shift moves to the binaries.
    O(n^3): two symmetric eigenvalue problems, each value lowered by its rounding error. Of more than
    `EIGENVALUES_LARGEST` weights with a damping it is that alone.
    """
    hessian = block.hessian
    if block.n > EIGENVALUES_LARGEST and block.damping > 0.0:
        return np.full(block.n, block.damping * (1.0 - 1e-12))
    uniform = np.full(block.n, max(_safe_lowest_eigenvalue(hessian), block.damping * (1.0 - 1e-12)))
    diagonal = np.diagonal(hessian)
    if not np.all(diagonal > 0.0):
        return uniform
    root = np.sqrt(diagonal)
    proportional = _safe_lowest_eigenvalue(hessian / np.outer(root, root)) * diagonal
    squares = block.weights**2
    return proportional if squares @ proportional > squares @ uniform else uniform


def _safe_lowest_eigenvalue(matrix: FloatArray) -> float:
    """Smallest eigenvalue less its rounding error, at least 0."""
    eigenvalues = np.asarray(eigvalsh(matrix, check_finite=False), dtype=np.float64)
    error = 4.0 * EPSILON * matrix.shape[0] * float(eigenvalues[-1])
    return float(max(eigenvalues[0] - error, 0.0))


def factor(matrix: FloatArray) -> FloatArray:
    """Return ``L``, (r, n), with ``L^T L = matrix`` for a positive semidefinite matrix.

    Eigenvalues that are rounding are dropped, which can only lower the quadratic form: a bound that
    is valid for the factored form is valid for the matrix.
    """
    eigenvalues, vectors = eigh(matrix, check_finite=False)
    largest = max(float(eigenvalues[-1]), 0.0) if eigenvalues.size else 0.0
    used = eigenvalues > RANK_TOLERANCE * matrix.shape[0] * largest
    return np.asarray((vectors[:, used] * np.sqrt(eigenvalues[used])).T)


def low_rank_factor(problem: BlockProblem, block: ScaledBlock, split: FloatArray) -> FloatArray:
    """Return `factor` of ``H - diag(split)`` in scaled units.

    In a large block with fewer rows than weights these are the scaled rows, where the split is not above
    the damping: what is left of that is dropped like an eigenvalue that is rounding.
    """
    rows = problem.rows
    few = rows is not None and rows.shape[0] < problem.n and problem.n > EIGENVALUES_LARGEST
    few = few and problem.channels is None
    if few and bool((split <= block.damping).all()):
        assert rows is not None
        return np.asarray(rows / math.sqrt(block.hessian_scale))
    return factor(block.hessian - np.diag(split))


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelSet:
    """Where every set at least as good as a known one has its new weights (scaled units).

    Attributes
    ----------
    centre : (n,) float64 array
        Minimiser of the loss model without pruning, ``w - H^-1 g``.
    radius : float
        ``(u - centre).H (u - centre) <= radius^2`` for every ``u`` at least as good.
    lower, upper : (n,) float64 arrays
        Box around that ellipsoid.
    """

    centre: FloatArray
    radius: float
    lower: FloatArray
    upper: FloatArray


def level_set(problem: BlockProblem, block: ScaledBlock, incumbent: BlockSolution | None = None) -> LevelSet:
    """Return the box that makes the big-M constants of the joint program valid.

    With ``e = u - (w - H^-1 g)`` the loss increase is ``-1/2 g.H^-1 g + 1/2 e.H e``. A set whose
    loss is at most ``U``, the loss of a known set, therefore has ``e.H e <= radius^2`` with
    ``radius^2 = 2 (U + 1/2 g.H^-1 g)``, and the ellipsoid's extent along axis i is
    ``|e_i| <= radius sqrt([H^-1]_ii)``. Only sets worse than the known one are cut off.

    Parameters
    ----------
    problem : BlockProblem
    block : ScaledBlock
        `problem` in scaled units.
    incumbent : BlockSolution, optional
        The known set; without one, greedy elimination finds one.

    Raises
    ------
    NotPositiveDefiniteError
        If ``H`` is singular (the level set is then unbounded) or too close to it.
    """
    problem.require_definite()
    if incumbent is None:
        incumbent = greedy(problem, "joint")
    keep = checked_incumbent(problem, incumbent)
    known = joint_loss(problem, keep) / block.objective_scale
    eigenvalues = np.asarray(eigvalsh(block.hessian, check_finite=False), dtype=np.float64)
    lowest = float(eigenvalues[0])
    condition = float(eigenvalues[-1]) / lowest if lowest > 0.0 else np.inf
    if condition > WORST_CONDITION:
        found = f"{problem.damping:g}: H has condition number {condition:.1e}"
        raise NotPositiveDefiniteError("damping", found, "use a larger damping")
    margin = max(BOX_MARGIN, 10.0 * block.n * EPSILON * condition)
    cholesky_factor = cho_factor(block.hessian, check_finite=False)
    inverse_diagonal = np.diagonal(cho_solve(cholesky_factor, np.eye(block.n), check_finite=False))
    newton = cho_solve(cholesky_factor, block.gradient, check_finite=False)
    centre = block.weights - newton
    radius = math.sqrt(max(float(2.0 * known + block.gradient @ newton), 0.0))
    radius = radius * (1.0 + margin) + margin
    reach = radius * np.sqrt(inverse_diagonal)
    return LevelSet(centre=centre, radius=radius, lower=centre - reach, upper=centre + reach)
