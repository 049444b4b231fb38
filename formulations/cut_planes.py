"""Both programs as convex functions of their binaries, and the planes that support them.

- *selection*, after the diagonal shift ``y_i^2 = y_i``: ``f(y) = 1/2 y.B y + (u / 2 - c).y`` with
  ``B = A - diag(u)`` positive semidefinite. Its gradient at any ``y0`` gives
  ``f(y) >= -1/2 y0.B y0 + (B y0 + u / 2 - c).y``.
- *joint*, in the perspective form ``H = Q + diag(D)``:
  ``f(z) = const + min_u 1/2 u.Q u - b.u + 1/2 sum_i D_i u_i^2 / z_i``. Linearising ``1/2 u.Q u`` at any
  ``u0`` and minimising over u leaves
  ``f(z) >= const - 1/2 u0.Q u0 - 1/2 sum_i z_i (b - Q u0)_i^2 / D_i`` (Danskin), tight at ``z`` for
  ``u0 = (Q + diag(D / z))^-1 b``.

A slope ``-c_i`` of a joint plane ``t >= a - sum c_i z_i`` may be lifted to ``-(a - L)`` for any proved
bound ``L``: a set with ``z_i = 1`` is then only asked for ``t >= L``. This keeps the planes well scaled
when ``D`` is small. Everything is in the units of `formulations.models.scaling`.

Sources: Duran and Grossmann (1986); Bertsimas and Van Parys (2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.linalg import solve as solve_linear

from formulations.models.scaling import ScaledBlock
from formulations.problem import FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """``t >= constant + slopes.x`` for every set of the right size."""

    constant: float
    slopes: FloatArray


class CutSource(Protocol):
    """A program as a convex function of its binaries.

    Attributes
    ----------
    count : int
        How many binaries are 1.
    one_means_kept : bool
        Whether a 1 keeps its weight or prunes it.
    """

    count: int
    one_means_kept: bool

    def cut(self, point: FloatArray, bound: float) -> Cut:
        """Return a plane that is tight at `point`, lifted by a proved `bound`."""
        ...


class SelectionCuts:
    """Gradients of the shifted quadratic.

    Parameters
    ----------
    block : ScaledBlock
    shift : (n,) float64 array
        ``u`` with ``A - diag(u)`` positive semidefinite.
    """

    one_means_kept = False

    def __init__(self, block: ScaledBlock, shift: FloatArray) -> None:
        self.count = block.n_prune
        self._quadratic = block.pair_costs - np.diag(shift)
        self._linear = 0.5 * shift - block.gains

    def cut(self, point: FloatArray, bound: float) -> Cut:
        """Return the tangent plane at `point`; the bound is of no use here. O(n^2)."""
        gradient = self._quadratic @ point
        return Cut(constant=float(-0.5 * point @ gradient), slopes=gradient + self._linear)


class JointCuts:
    """Dual planes of the perspective form.

    Parameters
    ----------
    block : ScaledBlock
    split : (n,) float64 array
        ``D > 0`` with ``H - diag(D)`` positive semidefinite.
    """

    one_means_kept = True
    smallest = 1e-6
    """Fractional values below this are taken for 0: any ``u0`` gives a valid plane."""

    def __init__(self, block: ScaledBlock, split: FloatArray) -> None:
        self.count = block.n - block.n_prune
        self._split = split
        self._quadratic = block.hessian - np.diag(split)
        self._linear = block.linear_term
        self._constant = block.constant

    def cut(self, point: FloatArray, bound: float) -> Cut:
        """Return the plane of the minimiser at `point`, lifted by `bound`; O(n^3)."""
        kept = np.flatnonzero(point > self.smallest)
        system = self._quadratic[np.ix_(kept, kept)] + np.diag(self._split[kept] / point[kept])
        minimiser = np.zeros(point.size)
        minimiser[kept] = solve_linear(system, self._linear[kept], assume_a="pos")
        image = self._quadratic @ minimiser
        constant = float(self._constant - 0.5 * minimiser @ image)
        costs = 0.5 * (self._linear - image) ** 2 / self._split
        if math.isfinite(bound):
            costs = np.minimum(costs, max(constant - bound, 0.0))
        return Cut(constant=constant, slopes=-costs)
