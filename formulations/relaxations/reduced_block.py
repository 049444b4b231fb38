"""The block that is left once some weights are fixed, and the way back from it.

- *joint*: pruned weights are deleted; kept ones eliminated. With ``M = (I + R_K R_K^T / damping)^-1 =
  (L L^T)^-1`` the Schur complement of the kept weights is again of the form rows and damping:
  ``damping I + (L^-1 R_F)^T (L^-1 R_F)``.
- *selection*: kept weights are deleted; pruned ones move into the gradient.

For either, ``value of a set of the block = value in the reduced block + offset``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import LinAlgError, cholesky, solve_triangular

from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem, BoolArray, FloatArray, IntArray, check_program
from formulations.reduction import reduce_joint
from formulations.relaxations.certificate import Fixing, RelaxationCertificate
from formulations.solution import BlockSolution, Termination


@dataclass(frozen=True, kw_only=True)
class ReducedBlock:
    """What fixings leave of a block.

    Attributes
    ----------
    problem : BlockProblem
        On the free weights, in the order of the block.
    parent : BlockProblem
    program : {"selection", "joint"}
    fixing : Fixing
    offset : float
        Value of a set in `parent` less its value in `problem`, up to rounding.
    """

    problem: BlockProblem
    parent: BlockProblem
    program: str
    fixing: Fixing
    offset: float

    @property
    def free(self) -> IntArray:
        """Indices in the block of the weights left, (q,) int64."""
        return np.flatnonzero(self.fixing.free)

    def lifted(self, keep: BoolArray) -> BoolArray:
        """Kept set of the block from one of the reduced block."""
        full = self.fixing.keep.copy()
        full[self.free] = keep
        return full

    def lift(self, solution: BlockSolution) -> BlockSolution:
        """A solution of the reduced block as one of the block, evaluated there.

        Its bound does not carry over: the reduced block is computed in float64, and what that rounds
        away is not bounded. `lower_bound` with the lifted set as incumbent proves one.
        """
        if solution.keep is None or solution.program != self.program:
            raise ArgumentError("solution", f"{solution!r}", f"pass a set for the {self.program} program")
        pool = IncumbentPool(self.parent, self.program)
        pool.offer(self.lifted(solution.keep))
        return pool.solution(
            method=solution.method,
            termination=Termination.FEASIBLE,
            limit=solution.limit,
            stats=solution.stats,
        )


def reduce_block(problem: BlockProblem, solution: BlockSolution) -> ReducedBlock:
    """The block on the weights that the certificate of `solution` leaves free.

    Parameters
    ----------
    problem : BlockProblem
    solution : BlockSolution
        With a certificate that fixes weights, from ``lower_bound(..., fix=True)``.

    Returns
    -------
    ReducedBlock
        `ReducedBlock.problem` goes to any method, `ReducedBlock.lift` brings its solution back.

    Raises
    ------
    ArgumentError
        If the certificate fixes nothing, or belongs to another block.
    """
    certificate = solution.certificate
    if not isinstance(certificate, RelaxationCertificate) or certificate.fixing is None:
        raise ArgumentError("solution", "its certificate fixes no weights", "use lower_bound(..., fix=True)")
    if not certificate.proves_fixing(problem):
        raise ArgumentError("solution", "its fixings are not proved", "pass the block it was made for")
    return reduced_block(problem, solution.program, certificate.fixing)


def reduced_block(problem: BlockProblem, program: str, fixing: Fixing, *, ridge: float = 0.0) -> ReducedBlock:
    """The reduced block of given fixings.

    `ridge` is taken off the diagonal of the kept weights before they are eliminated: a split of the
    reduced block, with `ridge` on the kept weights, is then a split of the block. O(m^2 n + m^3).

    Raises
    ------
    NotPositiveDefiniteError
        If the block of the kept weights is singular to working precision.
    """
    if check_program(program) == "selection":
        return _reduced_selection(problem, fixing)
    return _reduced_joint(problem, fixing, ridge)


def _reduced_selection(problem: BlockProblem, fixing: Fixing) -> ReducedBlock:
    free = np.flatnonzero(fixing.free)
    removed = np.where(fixing.prune, problem.weights, 0.0)
    image = problem.hessian_product(removed)
    gradient = problem.gradient_or_zero
    smaller = BlockProblem(
        weights=problem.weights[free],
        rows=None if problem.rows is None else problem.rows[:, free],
        hessian=None if problem.hessian is None else problem.hessian[np.ix_(free, free)],
        damping=problem.damping,
        # A free pair with a pruned weight costs as soon as its free weight is pruned.
        gradient=(gradient - image)[free],
        n_prune=problem.n_prune - int(fixing.prune.sum()),
        name=problem.name,
    )
    offset = 0.5 * float(removed @ image) - float(gradient @ removed)
    return ReducedBlock(problem=smaller, parent=problem, program="selection", fixing=fixing, offset=offset)


def _reduced_joint(problem: BlockProblem, fixing: Fixing, ridge: float) -> ReducedBlock:
    free, kept = np.flatnonzero(fixing.free), np.flatnonzero(fixing.keep)
    target = problem.linear_term()
    rows = problem.rows
    small: dict[str, FloatArray]
    try:
        if rows is not None and problem.damping > 0.0 and rows.shape[0] <= problem.n:
            damping = problem.damping
            small, linear, gained = _eliminate_in_rows(problem, target, kept, free, ridge)
        else:
            damping = 0.0
            small, linear, gained = _eliminate_dense(problem, target, kept, free, ridge)
    except LinAlgError:
        raise NotPositiveDefiniteError("damping", "the kept block is singular", "use more") from None
    weights = problem.weights[free]
    smaller = BlockProblem(
        weights=weights,
        damping=damping,
        n_prune=problem.n_prune - int(fixing.prune.sum()),
        name=problem.name,
        **small,
    )
    # The linear term of a block is H w - g.
    smaller = replace(smaller, gradient=smaller.hessian_product(weights) - linear)
    offset = problem.constant_term() + gained - smaller.constant_term()
    return ReducedBlock(problem=smaller, parent=problem, program="joint", fixing=fixing, offset=offset)


def _eliminate_in_rows(
    problem: BlockProblem, target: FloatArray, kept: IntArray, free: IntArray, ridge: float
) -> tuple[dict[str, FloatArray], FloatArray, float]:
    """Rows ``L^-1 R_F``, the linear term and the constant gained."""
    assert problem.rows is not None
    kept_rows, free_rows = problem.rows[:, kept], problem.rows[:, free]
    left = problem.damping - ridge
    system = kept_rows @ kept_rows.T / left
    system[np.diag_indices(system.shape[0])] += 1.0
    factor = cholesky(system, lower=True, overwrite_a=True, check_finite=False)
    rows = solve_triangular(factor, free_rows, lower=True, check_finite=False)
    # L^-1 R_K b_K / damping
    carried = solve_triangular(factor, kept_rows @ target[kept], lower=True, check_finite=False) / left
    linear = target[free] - rows.T @ carried
    gained = -0.5 * (float(target[kept] @ target[kept]) / left - float(carried @ carried))
    return {"rows": rows}, linear, gained


def _eliminate_dense(
    problem: BlockProblem, target: FloatArray, kept: IntArray, free: IntArray, ridge: float
) -> tuple[dict[str, FloatArray], FloatArray, float]:
    matrix = problem.dense_hessian()
    matrix[kept, kept] -= ridge
    definite, reduced, linear, gained = reduce_joint(matrix, target, kept, free)
    if not definite:
        raise LinAlgError("the kept block is not definite")
    return {"hessian": 0.5 * (reduced + reduced.T)}, linear, float(gained)
