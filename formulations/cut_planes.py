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

A plane is what the certificate of its point proves (`formulations.relaxations`), lowered by the rounding
of its terms: where they cancel, a computed plane may lie above the function by many times its value.

Sources: Duran and Grossmann (1986); Bertsimas and Van Parys (2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from scipy.linalg import LinAlgError
from scipy.linalg import solve as solve_linear

from formulations.models.scaling import ScaledBlock, diagonal_split
from formulations.problem import SMALLEST, BlockProblem, FloatArray, IntArray
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.certificate import Fixing, Linearisation
from formulations.relaxations.certified import column_norms, provable_split
from formulations.relaxations.perspective import PerspectiveCertificate
from formulations.solution import Certificate


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
        """Return a plane that is tight at `point` up to rounding, lifted by a proved `bound`."""
        ...


class SelectionCuts:
    """Gradients of the shifted quadratic.

    Parameters
    ----------
    problem : BlockProblem
    block : ScaledBlock
        `problem` in scaled units.
    certificate : CappedSimplexCertificate
        One whose shift is proved valid.
    """

    one_means_kept = False

    def __init__(
        self, problem: BlockProblem, block: ScaledBlock, certificate: CappedSimplexCertificate
    ) -> None:
        self.count = problem.n_prune
        self._problem, self._scale, self._certificate = problem, block.objective_scale, certificate
        self._norms, self._given = column_norms(problem), Fixing.by_count(problem)

    def cut(self, point: FloatArray, bound: float) -> Cut:
        """Return the tangent plane at `point`; the bound is of no use here. O(m n)."""
        certificate = replace(self._certificate, point=point)
        return _rounded_down(certificate.underestimate(self._problem, self._given, self._norms), self._scale)


class JointCuts:
    """Dual planes of the perspective form.

    Parameters
    ----------
    problem : BlockProblem
    block : ScaledBlock
        `problem` in scaled units.
    certificate : PerspectiveCertificate
        One whose split ``D`` is proved valid.
    """

    one_means_kept = True
    smallest = 1e-6
    """Fractional values below this are taken for 0: any ``u0`` gives a valid plane."""

    def __init__(
        self, problem: BlockProblem, block: ScaledBlock, certificate: PerspectiveCertificate
    ) -> None:
        self.count = problem.n_keep
        self._problem, self._block, self._certificate = problem, block, certificate
        self._norms, self._given = column_norms(problem), Fixing.by_count(problem)
        self._split = certificate.split / block.hessian_scale
        self._quadratic = block.hessian - np.diag(self._split)
        self._linear = block.linear_term

    def cut(self, point: FloatArray, bound: float) -> Cut:
        """Return the plane of the minimiser at `point`, lifted by `bound`; O(n^3)."""
        kept = np.flatnonzero(point > self.smallest)
        minimiser = np.zeros(point.size)
        minimiser[kept] = self._minimiser(kept, point[kept])
        certificate = replace(self._certificate, point=minimiser * self._block.weight_scale)
        line = certificate.underestimate(self._problem, self._given, self._norms)
        cut = _rounded_down(line, self._block.objective_scale)
        if not math.isfinite(bound):
            return cut
        return Cut(constant=cut.constant, slopes=np.maximum(cut.slopes, min(bound - cut.constant, 0.0)))

    def _minimiser(self, kept: IntArray, shares: FloatArray) -> FloatArray:
        system = self._quadratic[np.ix_(kept, kept)] + np.diag(self._split[kept] / shares)
        try:
            return np.asarray(solve_linear(system, self._linear[kept], assume_a="pos"))
        except LinAlgError:
            # Indefinite by rounding. Any point gives a valid plane.
            return np.asarray(np.linalg.lstsq(system, self._linear[kept])[0])


def cut_sources(
    problem: BlockProblem, block: ScaledBlock, program: str, root: Certificate | None
) -> list[CutSource]:
    """Return planes in the plain diagonal split and in that of a root certificate, where they are proved.

    None is left where ``H`` is so close to singular that no split is proved.
    """
    split = provable_split(problem, diagonal_split(block) * block.hessian_scale)
    zero, given = np.zeros(problem.n), Fixing.by_count(problem)
    if program == "joint":
        joint = [PerspectiveCertificate(point=zero, split=split)]
        joint += [root] if isinstance(root, PerspectiveCertificate) else []
        return [JointCuts(problem, block, c) for c in joint if c.linearisation(problem, given)]
    square = problem.weights**2
    shift = np.where(square >= SMALLEST, split * square, 0.0)
    selection = [CappedSimplexCertificate(point=zero, shift=shift)]
    selection += [root] if isinstance(root, CappedSimplexCertificate) else []
    return [SelectionCuts(problem, block, c) for c in selection if c.linearisation(problem, given)]


def _rounded_down(line: Linearisation, scale: float) -> Cut:
    """Return an underestimate as a plane in scaled units, less twice the bound on its rounding."""
    return Cut(constant=(line.base - 2.0 * line.lost) / scale, slopes=(line.cost - 2.0 * line.error) / scale)
