"""The capped-simplex relaxation of the selection program: certified lower bounds for one block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from formulations.dense_forms import DenseForm, error_factor
from formulations.problem import BlockProblem, BoolArray, FloatArray, frozen_array
from formulations.relaxations.capped_simplex_kernels import (
    METRIC_FLOOR,
    METRIC_SHARE,
    shift_slopes,
    solve_capped_simplex,
)
from formulations.relaxations.certified import bounded_product, column_norms, largest_sum, split_is_valid
from formulations.relaxations.diagonal_split import barrier_step, interior_split


@dataclass(frozen=True, kw_only=True, eq=False)
class CappedSimplexCertificate:
    """A point ``y`` and a shift ``u`` that prove a lower bound on the selection program.

    With ``diag(w) H diag(w) - diag(u)`` positive semidefinite, ``x = w y`` and
    ``r = w (H x) - u y - g w + u / 2``:
    ``optimum >= -1/2 x.H x + 1/2 u.y^2 + (sum of the n_prune smallest r_i)``.

    Attributes
    ----------
    point : (n,) float64 array
        ``y``; need not be feasible.
    shift : (n,) float64 array
        ``u``, in units of the loss; of any sign.
    """

    point: FloatArray
    shift: FloatArray

    def __post_init__(self) -> None:
        for name in ("point", "shift"):
            object.__setattr__(self, name, frozen_array(name, getattr(self, name), 1))

    @property
    def kind(self) -> str:
        """Name of the relaxation."""
        return "capped_simplex"

    def lower_bound(self, problem: BlockProblem) -> float:
        """Recompute the bound with one product with ``H``, less a proven bound on all rounding.

        ``-inf`` if the certificate does not fit the block or the shift is not proved valid.
        """
        if not self.point.shape == self.shift.shape == (problem.n,):
            return -math.inf
        norms = column_norms(problem)
        y, w, g, shift = self.point, problem.weights, problem.gradient_or_zero, self.shift
        # A zero weight has a zero row in diag(w) H diag(w), so only the other indices matter.
        square = w * w
        used = square > 0.0
        split = np.divide(shift, square, out=np.zeros(problem.n), where=used) * (1.0 + 1e-15)
        if bool((shift[~used] > 0.0).any()) or not split_is_valid(problem, split, norms, used):
            return -math.inf
        x = w * y
        product = bounded_product(problem, x, norms)
        sloppy = error_factor(8)
        # x is rounded before the product.
        moved = product.error + sloppy * norms * float(norms @ np.abs(x))
        slope = w * product.value - shift * y - g * w + 0.5 * shift
        magnitude = np.abs(w * product.value) + np.abs(shift) * (np.abs(y) + 0.5) + np.abs(g * w)
        error = np.abs(w) * moved + sloppy * magnitude
        terms = (
            -0.5 * float(x @ product.value),
            0.5 * float(shift @ (y * y)),
            -largest_sum(-slope, problem.n_prune),
        )
        length = error_factor(problem.n + 16)
        lost = (
            0.5 * float(np.abs(x) @ moved)
            + largest_sum(error, problem.n_prune)
            + length * float(np.abs(x) @ np.abs(product.value) + np.abs(shift) @ (y * y))
            + length * largest_sum(np.abs(slope), problem.n_prune)
        )
        return sum(terms) - 2.0 * lost


def relax_selection(
    form: DenseForm,
    n_prune: int,
    shift: FloatArray,
    *,
    cutoff: float = math.inf,
    split_rounds: int = 0,
) -> tuple[float, FloatArray, FloatArray]:
    """Solve the relaxation of a dense selection form, improving the shift by barrier steps.

    Parameters
    ----------
    form : DenseForm
    n_prune : int
        Between 1 and n - 1.
    shift : (n,) float64 array
        ``u`` with ``form.matrix - diag(u)`` positive semidefinite.
    cutoff : float
        Stop once the bound, in form units, reaches it.
    split_rounds : int
        Barrier steps at most.

    Returns
    -------
    bound, point, shift
        Of the best bound found, in form units.
    """
    n = form.linear.size
    current = shift.copy()
    start = np.full(n, n_prune / n)
    metric = METRIC_SHARE * (np.diagonal(form.matrix) + METRIC_FLOOR)
    best: tuple[float, FloatArray, FloatArray] | None = None
    stalled = 0
    for attempt in range(split_rounds + 1):
        smooth = form.matrix.copy()
        smooth[np.diag_indices(n)] -= current
        value, start, _, _ = solve_capped_simplex(
            smooth, form.linear + 0.5 * current, n_prune, metric, start, cutoff - form.constant, 300, 1e-5
        )
        bound = value + form.constant
        stalled = stalled + 1 if best is not None and bound < best[0] + 1e-4 * abs(best[0]) else 0
        if best is None or bound > best[0]:
            best = bound, start.copy(), current.copy()
        if bound >= cutoff or stalled >= 8:
            break
        gap = cutoff - bound if cutoff < math.inf else 0.2 * 0.8**attempt * abs(bound)
        if attempt == 0:
            current = interior_split(form.matrix, current, False)
        barrier_step(form.matrix, current, shift_slopes(start), 0.1 * max(gap, 1e-12) / n, False)
    assert best is not None
    return best


def round_selection(point: FloatArray, n_prune: int) -> BoolArray:
    """Kept set once the `n_prune` largest entries of the relaxation are pruned."""
    keep = np.ones(point.size, dtype=np.bool_)
    keep[np.argsort(-point, kind="stable")[:n_prune]] = False
    return keep
