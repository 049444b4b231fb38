"""Sets from the relaxation of all rows at once by alternating directions, with one eigendecomposition.

One copy of the weights minimises the loss, the other has the support, and multipliers pull them together
while the penalty rho grows. In coordinates scaled by `scale` the first step is ``(B - U + rho D) (H + rho
I)^-1`` for all rows, the second keeps the largest entries. The scale decides what "largest" means:

- ``sqrt(H_ii)``: what a weight costs if no other moves. This is ALPS.
- ``1 / sqrt([H^-1]_ii)``: what it costs if all others make up for it, nearer to what it costs among the kept
  ones. It ends half a per cent to five per cent lower on layers of SmolLM2, in as many iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.select.layer_program.program import LayerProgram, LayerSolution, Spectrum
from cbs_opt.select.layer_program.update import updated
from cbs_opt.system.checks import check_fields, finite_number, whole_number


@dataclass(frozen=True, kw_only=True)
class Alternating:
    """How alternating directions run.

    Raises `ArgumentError` if a field is out of its range.

    Parameters
    ----------
    penalty : float, default 0.1
        The first rho, where the scaled H has a diagonal of about 1.
    every : int, default 3
        Iterations after which rho grows by ``growth[0]``, ``[1]`` or ``[2]``: where at least a tenth, at
        least .005, or less of the kept weights are others than before. Where none is, it ends.
    growth : tuple of three floats, default (1.3, 1.2, 1.1)
    iterations : int, default 300
        At most. The defaults are those of ALPS.
    """

    penalty: float = 0.1
    every: int = 3
    growth: tuple[float, float, float] = (1.3, 1.2, 1.1)
    iterations: int = 300

    def __post_init__(self) -> None:
        check_fields(self, "alternating.", finite_number, "penalty", above=True)
        check_fields(self, "alternating.", whole_number, "every", "iterations")
        growth = tuple(finite_number("alternating.growth", factor, least=1.0) for factor in self.growth)
        object.__setattr__(self, "growth", growth)


ALPS = Alternating()
LARGE_CHANGE, CHANGE = 0.1, 0.005
"""Shares of the kept weights."""


def by_alps(program: LayerProgram, options: Alternating = ALPS) -> LayerSolution:
    """Return the sets of alternating directions scaled by the diagonal, with their best new weights.

    Source: Meng, Behdin, Wang, Mazumder, "ALPS: improved optimization for highly sparse one-shot pruning for
    large language models" (NeurIPS 2024). Written from the paper; conjugate gradients go on until they have
    converged.
    """
    keep, weights = alternating_sets(program, program.hessian.values.diagonal().sqrt(), options)
    return updated(program, keep, weights)


def alternating_sets(program: LayerProgram, scale: Tensor, options: Alternating) -> tuple[Tensor, Tensor]:
    """Return kept masks (r, n), and weights (r, n) of that support, not yet at their best.

    `scale`: (n,) positive. O(r n^2) an iteration and O(n^3) now and then.
    """
    dtype = program.weights.dtype
    # In the precision of the weights: rounding is small beside rho.
    spectrum = program.hessian.spectrum(scale, dtype)
    solver = _Shifted(spectrum)
    scale = scale.to(dtype)
    target = (program.weights * scale) @ spectrum.matrix
    sparse, multiplier = program.weights * scale, torch.zeros_like(program.weights)
    rho, total = options.penalty, 0
    before: Tensor | None = None
    for iteration in range(1, options.iterations + 1):
        full = solver.solve(target + rho * sparse - multiplier, rho, options.every)
        wanted = full + multiplier / rho
        keep = program.support.best(wanted.abs())
        sparse = wanted * keep.to(dtype)
        multiplier += rho * (full - sparse)
        if iteration % options.every:
            continue
        total = total or max(1, int(keep.sum()))
        changed = total if before is None else int((keep != before).sum())
        if not changed:
            break
        before = keep
        share = changed / total
        rho *= options.growth[0 if share >= LARGE_CHANGE else 1 if share >= CHANGE else 2]
    return keep, sparse / scale


class _Shifted:
    """Solves ``X (H + rho I) = Y`` for one symmetric H and a few values of rho."""

    def __init__(self, spectrum: Spectrum) -> None:
        _, self._values, self._vectors = spectrum
        self._rho: float | None = None
        self._inverse: Tensor | None = None

    def solve(self, right: Tensor, rho: float, uses: int) -> Tensor:
        """Return X (r, n), where as many systems as `uses` come with the same rho."""
        if rho != self._rho:
            self._rho, self._inverse = rho, None
            # The inverse costs a product of n rows, and saves one of r rows each time.
            if uses * len(right) > len(self._values):
                self._inverse = (self._vectors / (self._values + rho)) @ self._vectors.T
        if self._inverse is not None:
            return right @ self._inverse
        solved: Tensor = ((right @ self._vectors) / (self._values + rho)) @ self._vectors.T
        return solved
