"""The capped-simplex relaxation of the selection program: certified lower bounds for one block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np

from formulations.dense_forms import DenseForm, error_factor, folded_form
from formulations.problem import SMALLEST, BlockProblem, BoolArray, FloatArray, frozen_array
from formulations.relaxations.ascent import BEST, ascend
from formulations.relaxations.capped_simplex_kernels import (
    METRIC_FLOOR,
    METRIC_SHARE,
    advance_simplex,
    begin_simplex,
    invert_simplex,
    shift_slopes,
)
from formulations.relaxations.certificate import Fixing, Linearisation, RelaxationCertificate
from formulations.relaxations.certified import bounded_product, column_norms, split_is_valid
from formulations.relaxations.diagonal_split import barrier_step, interior_split
from formulations.solution import Stopped, never
from formulations.support import Groups, Size, Support, counts_of


@dataclass(frozen=True, kw_only=True, eq=False)
class CappedSimplexCertificate(RelaxationCertificate):
    """A point ``y`` and a shift ``u`` that prove a lower bound on the selection program.

    With ``diag(w) H diag(w) - diag(u)`` positive semidefinite, ``x = w y`` and
    ``r = w (H x) - u y - g w + u / 2``:
    ``optimum >= -1/2 x.H x + 1/2 u.y^2 + (sum of the n_prune smallest r_i)``, or the smallest sum over what
    the support prunes. Weights given as pruned
    have ``y_i = 1`` and are in the sum by all means; those given as kept have ``y_i = 0``.

    Attributes
    ----------
    point : (n,) float64 array
        ``y``; need not be feasible.
    shift : (n,) float64 array
        ``u``, in units of the loss; of any sign.
    kind : str
        "capped_simplex".
    n_fixed : int
        Weights proved fixed, listed in `fixing`.
    rho, effective_rank, fixing, basis
        As in `RelaxationCertificate`.
    """

    chosen_are_kept: ClassVar[bool] = False

    point: FloatArray
    shift: FloatArray

    def __post_init__(self) -> None:
        for name in ("point", "shift"):
            object.__setattr__(self, name, frozen_array(name, getattr(self, name), 1))

    @property
    def kind(self) -> str:
        """Name of the relaxation."""
        return "capped_simplex"

    def linearisation(self, problem: BlockProblem, given: Fixing) -> Linearisation | None:
        """Return the underestimate ``base + sum over the pruned of r_i``; O(m n).

        None if the shifted matrix on the free weights is not proved semidefinite: free with rows and
        ``u <= damping w^2``, a Cholesky factorisation otherwise.
        """
        if not self.point.shape == self.shift.shape == (problem.n,):
            return None
        norms = column_norms(problem)
        w, shift = problem.weights, self.shift
        # A zero weight has a zero row in diag(w) H diag(w), so only the other indices matter.
        square = w * w
        used = square >= SMALLEST
        split = np.divide(shift, square, out=np.zeros(problem.n), where=used) * (1.0 + 1e-15)
        # The square of a tiny weight has lost its digits: such a weight has a place, and no shift.
        used = w != 0.0
        free = given.free
        if bool((shift[free & (square < SMALLEST)] > 0.0).any()):
            return None
        if not split_is_valid(problem, split, norms, used & free):
            return None
        return self.underestimate(problem, given, norms)

    def underestimate(self, problem: BlockProblem, given: Fixing, norms: FloatArray) -> Linearisation:
        """Return the linearisation where the shift is known to be valid; `norms` are `column_norms`."""
        w, g, shift = problem.weights, problem.gradient_or_zero, self.shift
        y = np.where(given.prune, 1.0, np.where(given.keep, 0.0, self.point))
        x = w * y
        product = bounded_product(problem, x, norms)
        sloppy = error_factor(8)
        # x is rounded before the product.
        moved = product.error + sloppy * norms * float(norms @ np.abs(x))
        slope = w * product.value - shift * y - g * w + 0.5 * shift
        magnitude = np.abs(w * product.value) + np.abs(shift) * (np.abs(y) + 0.5) + np.abs(g * w)
        sums = np.abs(x) @ np.abs(product.value) + np.abs(shift) @ (y * y)
        return Linearisation(
            base=-0.5 * float(x @ product.value) + 0.5 * float(shift @ (y * y)),
            lost=0.5 * float(np.abs(x) @ moved) + error_factor(problem.n + 16) * float(sums),
            cost=slope,
            error=np.abs(w) * moved + sloppy * magnitude,
        )


def relax_selection(
    form: DenseForm,
    n_prune: Size | Groups,
    shift: FloatArray,
    *,
    cutoff: float = math.inf,
    split_rounds: int = 0,
    stopped: Stopped = never,
    start: FloatArray | None = None,
) -> tuple[float, FloatArray, FloatArray]:
    """Solve the relaxation of a dense selection form, improving the shift by barrier steps.

    Parameters
    ----------
    form : DenseForm
    n_prune : int, Cells or Groups
        Between 1 and n - 1, of all or in each cell; or the groups that are pruned whole.
    shift : (n,) float64 array
        ``u`` with ``form.matrix - diag(u)`` positive semidefinite.
    cutoff : float
        Stop once the bound, in form units, reaches it.
    split_rounds : int
        Barrier steps at most.
    stopped : callable
        Asked between steps whether the time is over.
    start : (n,) float64 array, optional
        A point near the solution.

    Returns
    -------
    bound, point, shift
        Of the best bound found, in form units.
    """
    n = form.linear.size
    current = shift.copy()
    groups = n_prune if isinstance(n_prune, Groups) else None
    size = n_prune.pruned(n) if isinstance(n_prune, Groups) else n_prune
    matrix, linear = folded_form(form, groups)
    units = linear.size
    if start is None:
        start = np.full(units, int(counts_of(size).sum()) / units)
    else:
        # A copy can be written to, which is what the kernel is compiled for.
        start = (start if groups is None else groups.mean(start)).copy()
    metric = METRIC_SHARE * (np.diagonal(matrix) + METRIC_FLOOR)
    best: tuple[float, FloatArray, FloatArray] | None = None
    stalled = 0
    for attempt in count():
        folded = current if groups is None else groups.folded(current)
        smooth = matrix.copy()
        smooth[np.diag_indices(units)] -= folded
        state = begin_simplex(
            smooth,
            linear + 0.5 * folded,
            size,
            metric,
            start,
            float(cutoff - form.constant),
            300,
            1e-5,
        )
        ascend(state, advance_simplex, invert_simplex, stopped)
        start = state.point
        bound = float(state.figures[BEST]) + form.constant
        stalled = stalled + 1 if best is not None and bound < best[0] + 1e-4 * abs(best[0]) else 0
        spread = start if groups is None else groups.spread(start)
        if best is None or bound > best[0]:
            best = bound, spread.copy(), current.copy()
        if attempt == split_rounds or bound >= cutoff or stalled >= 8 or stopped():
            break
        gap = cutoff - bound if cutoff < math.inf else 0.2 * 0.8**attempt * abs(bound)
        if attempt == 0:
            current = interior_split(form.matrix, current, False)
        barrier_step(form.matrix, current, shift_slopes(spread), 0.1 * max(gap, 1e-12) / n, False)
    assert best is not None
    return best


def round_selection(point: FloatArray, n_prune: int, support: Support | None = None) -> BoolArray:
    """Kept set once the `n_prune` largest entries of the relaxation are pruned, inside `support` if given."""
    if support is not None:
        return support.best_mean(-point)
    keep = np.ones(point.size, dtype=np.bool_)
    keep[np.argsort(-point, kind="stable")[:n_prune]] = False
    return keep
