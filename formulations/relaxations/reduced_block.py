"""The block that is left once some weights are fixed, and the way back from it.

- *joint*: pruned weights are deleted; kept ones eliminated. With ``M = (I + R_K R_K^T / damping)^-1 =
  (L L^T)^-1`` the Schur complement of the kept weights is again of the form rows and damping:
  ``damping I + (L^-1 R_F)^T (L^-1 R_F)``.
- *selection*: kept weights are deleted; pruned ones move into the gradient.

For either, ``value of a set of the block = value in the reduced block + offset``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import LinAlgError, cholesky, solve_triangular

from formulations.dense_forms import error_factor
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem, BoolArray, FloatArray, IntArray, check_program
from formulations.reduction import reduce_joint
from formulations.relaxations.certificate import Fixing, RelaxationCertificate
from formulations.relaxations.certified import BoundedVector, bounded_product, column_norms
from formulations.relaxations.reduction_rounding import joint_allowance, selection_allowance
from formulations.solution import BlockSolution, Termination
from formulations.support import require_support


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
    allowance : float
        Proved bound on that rounding, for sets of value at most the cutoff of `fixing`; infinite where
        none is proved.
    certificate : RelaxationCertificate or None
        What proves `fixing`.
    """

    problem: BlockProblem
    parent: BlockProblem
    program: str
    fixing: Fixing
    offset: float
    allowance: float
    certificate: RelaxationCertificate | None = None

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
        """Return a solution of the reduced block as one of the block, evaluated there.

        Its bound carries over, lowered by `allowance`: every set of the block is above the cutoff of
        the fixings or one of the reduced block. Where no allowance is proved the bound is that of
        `certificate`.
        """
        if solution.keep is None or solution.program != self.program:
            raise ArgumentError("solution", f"{solution!r}", f"pass a set for the {self.program} program")
        pool = IncumbentPool(self.parent, self.program)
        pool.offer(self.lifted(solution.keep))
        bound = None if self.certificate is None else self.certificate.lower_bound(self.parent)
        if bound is not None and solution.bound is not None:
            carried = solution.bound + self.offset
            carried -= self.allowance + error_factor(4) * (abs(solution.bound) + abs(self.offset))
            bound = max(bound, min(carried, self.fixing.cutoff))
        return pool.solution(
            method=solution.method,
            # Without a gap asked for, none but an exact bound is called a proof.
            rel_gap=0.0 if solution.rel_gap is None else solution.rel_gap,
            bound=-math.inf if bound is None else bound,
            finished=solution.termination is Termination.OPTIMAL,
            limit=solution.limit,
            certificate=self.certificate,
            stats=solution.stats,
        )


def reduce_block(problem: BlockProblem, solution: BlockSolution) -> ReducedBlock:
    """Return the block on the weights that the certificate of `solution` leaves free.

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
    require_support(problem.support, "reduce_block")
    certificate = solution.certificate
    if not isinstance(certificate, RelaxationCertificate) or certificate.fixing is None:
        raise ArgumentError("solution", "its certificate fixes no weights", "use lower_bound(..., fix=True)")
    if not certificate.proves_fixing(problem):
        raise ArgumentError("solution", "its fixings are not proved", "pass the block it was made for")
    reduced = reduced_block(problem, solution.program, certificate.fixing)
    return replace(reduced, certificate=certificate)


def reduced_block(problem: BlockProblem, program: str, fixing: Fixing, *, ridge: float = 0.0) -> ReducedBlock:
    """Return the reduced block of given fixings.

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
    product = bounded_product(problem, removed, column_norms(problem))
    image = product.value
    gradient = problem.gradient_or_zero
    smaller = BlockProblem(
        weights=problem.weights[free],
        rows=None if problem.rows is None else problem.rows[:, free],
        hessian=None if problem.hessian is None else problem.hessian[np.ix_(free, free)],
        channels=None if problem.channels is None else problem.channels.restricted(free),
        damping=problem.damping,
        # A free pair with a pruned weight costs as soon as its free weight is pruned.
        gradient=(gradient - image)[free],
        n_prune=problem.n_prune - int(fixing.prune.sum()),
        name=problem.name,
    )
    offset = 0.5 * float(removed @ image) - float(gradient @ removed)
    return ReducedBlock(
        problem=smaller,
        parent=problem,
        program="selection",
        fixing=fixing,
        offset=offset,
        allowance=selection_allowance(problem, removed, product, free),
    )


def _reduced_joint(problem: BlockProblem, fixing: Fixing, ridge: float) -> ReducedBlock:
    free, kept = np.flatnonzero(fixing.free), np.flatnonzero(fixing.keep)
    product = bounded_product(problem, problem.weights, column_norms(problem))
    gradient = problem.gradient_or_zero
    blur = error_factor(4) * (np.abs(product.value) + np.abs(gradient))
    # The linear term b = H w - g of the program in the new weights.
    target = BoundedVector(product.value - gradient, product.error + blur)
    rows = problem.rows
    in_rows = rows is not None and problem.damping > 0.0 and rows.shape[0] <= problem.n
    in_rows = in_rows and problem.channels is None
    eliminate = _eliminate_in_rows if in_rows else _eliminate_dense
    try:
        left = eliminate(problem, target.value, kept, free, ridge)
    except LinAlgError:
        raise NotPositiveDefiniteError("damping", "the kept block is singular", "use more") from None
    weights = problem.weights[free]
    smaller = BlockProblem(
        weights=weights,
        rows=left.matrix if in_rows else None,
        hessian=None if in_rows else left.matrix,
        damping=problem.damping if in_rows else 0.0,
        n_prune=problem.n_prune - int(fixing.prune.sum()),
        name=problem.name,
    )
    # The linear term of a block is H w - g.
    smaller = replace(smaller, gradient=smaller.hessian_product(weights) - left.linear)
    constant = 0.5 * float(problem.weights @ product.value) - float(gradient @ problem.weights)
    allowance = math.inf
    if left.carried is not None and ridge == 0.0:
        allowance = joint_allowance(problem, smaller, kept, free, target, left.carried, fixing.cutoff)
    return ReducedBlock(
        problem=smaller,
        parent=problem,
        program="joint",
        fixing=fixing,
        offset=constant + left.gained - smaller.constant_term(),
        allowance=allowance,
    )


@dataclass(frozen=True)
class _Eliminated:
    """Rows or Hessian on the free weights, their linear term, the constant gained; ``L^-1 R_K b_K``."""

    matrix: FloatArray
    linear: FloatArray
    gained: float
    carried: FloatArray | None = None


def _eliminate_in_rows(
    problem: BlockProblem, target: FloatArray, kept: IntArray, free: IntArray, ridge: float
) -> _Eliminated:
    """Rows ``L^-1 R_F``."""
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
    return _Eliminated(np.ascontiguousarray(rows), linear, gained, carried)


def _eliminate_dense(
    problem: BlockProblem, target: FloatArray, kept: IntArray, free: IntArray, ridge: float
) -> _Eliminated:
    """Return the Schur complement."""
    matrix = problem.dense_hessian()
    matrix[kept, kept] -= ridge
    definite, reduced, linear, gained = reduce_joint(matrix, target, kept, free)
    if not definite:
        raise LinAlgError("the kept block is not definite")
    return _Eliminated(0.5 * (reduced + reduced.T), linear, float(gained))
