"""The perspective relaxation of the joint program: certified lower bounds for one block.

Source: Frangioni & Gentile (2006) for the reformulation; Argyriou, Foygel & Srebro (2012) for the
s-support norm; the dual bound holds for every point ``u`` and costs one product with ``H``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np

from formulations.dense_forms import DenseForm, error_factor
from formulations.problem import BlockProblem, BoolArray, FloatArray, frozen_array
from formulations.relaxations.ascent import BEST, ascend
from formulations.relaxations.certificate import Fixing, Linearisation, RelaxationCertificate
from formulations.relaxations.certified import column_norms, split_form, split_is_valid
from formulations.relaxations.diagonal_split import barrier_step, interior_split
from formulations.relaxations.group_norm import ascend_groups, group_slopes
from formulations.relaxations.perspective_kernels import (
    advance_perspective,
    begin_perspective,
    invert_perspective,
    split_slopes,
)
from formulations.solution import Stopped, never
from formulations.support import Groups, Size, Support

SPLIT_MARGIN = 1e-9
"""Relative shrinking of a split, so that ``H - D`` stays semidefinite under rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PerspectiveCertificate(RelaxationCertificate):
    """A point ``u`` and a split ``D`` that prove a lower bound on the joint program.

    With ``H = Q + D``, ``Q`` positive semidefinite, ``b = H w - g`` and ``h = b - Q u``:
    ``optimum >= 1/2 w.H w - g.w - 1/2 u.Q u - 1/2 (sum of the n_keep largest h_i^2 / D_i)``, or the
    largest sum that the support can hold: the n largest of every m, the largest sums over groups. Weights
    given as pruned drop out of everything; those given as kept are in the sum by all means.

    Attributes
    ----------
    point : (n,) float64 array
        ``u``, in units of the weights.
    split : (n,) float64 array
        ``D``, positive, in units of ``H``.
    kind : str
        "perspective".
    n_fixed : int
        Weights proved fixed, listed in `fixing`.
    rho, effective_rank, fixing, basis
        As in `RelaxationCertificate`.
    """

    chosen_are_kept: ClassVar[bool] = True

    point: FloatArray
    split: FloatArray

    def __post_init__(self) -> None:
        for name in ("point", "split"):
            object.__setattr__(self, name, frozen_array(name, getattr(self, name), 1))

    @property
    def kind(self) -> str:
        """Name of the relaxation."""
        return "perspective"

    def linearisation(self, problem: BlockProblem, given: Fixing) -> Linearisation | None:
        """Return the underestimate ``base - sum over the kept of 1/2 h_i^2 / D_i``; O(m n).

        None if ``H - D`` on the weights not given as pruned is not proved semidefinite: free with rows
        and ``D <= damping``, a Cholesky factorisation otherwise.
        """
        fits = self.point.shape == self.split.shape == (problem.n,)
        if not fits or not bool((self.split > 0.0).all()):
            return None
        norms = column_norms(problem)
        if not split_is_valid(problem, self.split, norms, ~given.prune):
            return None
        return self.underestimate(problem, given, norms)

    def underestimate(self, problem: BlockProblem, given: Fixing, norms: FloatArray) -> Linearisation:
        """Return the linearisation where the split is known to be valid; `norms` are `column_norms`."""
        d, u = self.split, np.where(given.prune, 0.0, self.point)
        form = split_form(problem, u, d * u, d * np.abs(u), norms)
        square = form.residual**2 / d
        slack = (2.0 * np.abs(form.residual) * form.error + form.error**2) / d + error_factor(8) * square
        return Linearisation(base=form.base, lost=form.lost, cost=-0.5 * square, error=0.5 * slack)


def relax_joint(
    form: DenseForm,
    n_keep: Size | Groups,
    split: FloatArray,
    *,
    cutoff: float = math.inf,
    split_rounds: int = 0,
    stopped: Stopped = never,
    start: FloatArray | None = None,
) -> tuple[float, FloatArray, FloatArray, FloatArray]:
    """Solve the relaxation of a dense joint form, improving the split by barrier steps.

    Parameters
    ----------
    form : DenseForm
    n_keep : int, Cells or Groups
        Between 1 and n - 1, of all or in each cell; or the groups of which so many are kept.
    split : (n,) float64 array
        A valid positive split of ``form.matrix``.
    cutoff : float
        Stop once the bound, in form units, reaches it.
    split_rounds : int
        Barrier steps at most.
    stopped : callable
        Asked between steps whether the time is over.
    start : (n,) float64 array, optional
        A point near the solution, in unscaled coordinates.

    Returns
    -------
    bound, point, residual, split
        Of the best bound found, in form units and unscaled coordinates (``residual`` in scaled ones).
    """
    current = split.copy()
    start = np.zeros(form.linear.size) if start is None else start.copy()
    best: tuple[float, FloatArray, FloatArray, FloatArray] | None = None
    stalled = 0
    for attempt in count():
        root = np.sqrt(current)
        smooth = form.matrix / root[:, None] / root[None, :]
        smooth[np.diag_indices(root.size)] -= 1.0
        value, point, residual = _ascended(
            smooth, form.linear / root, n_keep, start * root, float(cutoff - form.constant), stopped
        )
        start = point / root
        bound = value + form.constant
        stalled = stalled + 1 if best is not None and bound < best[0] + 1e-4 * abs(best[0]) else 0
        if best is None or bound > best[0]:
            best = bound, start, residual, current.copy()
        if attempt == split_rounds or bound >= cutoff or stalled >= 8 or stopped():
            break
        # The gap is unknown without a cutoff; the barrier weight then shrinks with the rounds.
        gap = cutoff - bound if cutoff < math.inf else 0.2 * 0.8**attempt * abs(bound)
        if attempt == 0:
            current = interior_split(form.matrix, current, True)
        barrier_step(
            form.matrix,
            current,
            slopes_of(start, point, residual, n_keep),
            0.1 * max(gap, 1e-12) / start.size,
            True,
        )
    assert best is not None
    return best


def _ascended(
    smooth: FloatArray,
    linear: FloatArray,
    size: Size | Groups,
    start: FloatArray,
    cutoff: float,
    stopped: Stopped,
) -> tuple[float, FloatArray, FloatArray]:
    """Return the best bound of the relaxation in scaled coordinates, its point and its residual."""
    if isinstance(size, Groups):
        return ascend_groups(smooth, linear, size, start, cutoff, 300, 1e-5, stopped)
    state = begin_perspective(smooth, linear, size, start, cutoff, 300, 1e-5)
    ascend(state, advance_perspective, invert_perspective, stopped)
    return float(state.figures[BEST]), state.point, state.residual


def slopes_of(u: FloatArray, point: FloatArray, residual: FloatArray, size: Size | Groups) -> FloatArray:
    """Supergradient of the bound in the split, for any support."""
    if isinstance(size, Groups):
        return group_slopes(u, point, residual, size)
    return split_slopes(u, point, residual, size)


def round_joint(residual: FloatArray, n_keep: int, support: Support | None = None) -> BoolArray:
    """Kept set of the `n_keep` largest residuals of the relaxation, the dual's own choice.

    Of the largest squares that `support` can hold where it is no count.
    """
    if support is not None:
        return support.best(residual * residual)
    keep = np.zeros(residual.size, dtype=np.bool_)
    keep[np.argsort(-np.abs(residual), kind="stable")[:n_keep]] = True
    return keep
