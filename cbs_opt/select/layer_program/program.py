"""The program of a layer: for every row w of its weights (r, n) the joint program over one Hessian.

    minimise  1/2 (w - u) H (w - u)   over u with a support,   H = G + damping I

G = E[x x^T] is the Gram matrix of what the layer is fed, so that ``(w - u) G (w - u)`` is the mean squared
change of an output. What depends on H alone is computed once, for all rows and for all layers that are fed
the same; everything else is one operation on all rows. With ``e = w - u``, the *residual* ``e H`` (r, n) is
zero on the kept weights of a row where these are the best of its set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cbs_opt.select.layer_program.support import LayerSupport
from formulations.errors import NonFiniteError, NotPositiveDefiniteError, ShapeError

DAMPING = 0.01
"""Of the mean diagonal of the Gram matrix, as in SparseGPT."""


class LayerHessian:
    """``H = G + damping I`` of a layer, in units of the mean diagonal of G, with what depends on it alone.

    Parameters
    ----------
    gram : (n, n) Tensor
        Second moment of the inputs. Inputs that are always zero have zero columns; they stay, and are as
        cheap to prune as the damping makes them.
    damping : float, default 0.01
        Of the mean diagonal over inputs that are not always zero.
    name : str, default "layer"
        What messages call the layer.

    Raises
    ------
    ShapeError, NonFiniteError
        If the Gram matrix is not square, or holds NaN or infinity.
    NotPositiveDefiniteError
        If ``H`` is not positive definite to rounding.
    """

    def __init__(self, gram: Tensor, damping: float = DAMPING, *, name: str = "layer") -> None:
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise ShapeError("gram", f"shape {tuple(gram.shape)} for {name}", "pass a square matrix")
        if not bool(torch.isfinite(gram).all()):
            raise NonFiniteError("gram", f"NaN or infinity for {name}", "check the inputs of the layer")
        gram = gram.double()
        diagonal = gram.diagonal()
        live = diagonal > 0.0
        self.name = name
        self.damping = damping
        self.dead = int((~live).sum())
        """Number of inputs that are always zero."""
        self.unit = float(diagonal[live].mean()) if bool(live.any()) else 1.0
        """Mean diagonal of the Gram matrix over the other inputs."""
        self.values = (gram + gram.mT) / (2.0 * self.unit)
        self.values.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(self.values)
        if int(failed):
            found = f"{name}: H is not positive definite at damping {damping:g}, {self.dead} dead inputs"
            raise NotPositiveDefiniteError("damping", found, f"use a larger damping, such as {DAMPING:g}")
        self._factor = factor
        self._spectrum: tuple[Tensor, Spectrum] | None = None

    @property
    def n(self) -> int:
        """Number of inputs."""
        return len(self.values)

    @cached_property
    def single(self) -> Tensor:
        """H in float32, (n, n)."""
        return self.values.float()

    def of(self, dtype: torch.dtype) -> Tensor:
        """Return H in a precision, (n, n)."""
        return self.single if dtype == torch.float32 else self.values.to(dtype)

    @cached_property
    def inverse(self) -> Tensor:
        """``H^-1``, (n, n) float64."""
        return torch.cholesky_inverse(self._factor)

    @cached_property
    def least_scale(self) -> Tensor:
        """``1 / [H^-1]_ii``, (n,) float64: what a unit of weight i costs where all others make up for it."""
        return 1.0 / self.inverse.diagonal()

    @cached_property
    def elimination(self) -> Tensor:
        """Upper Cholesky factor of ``H^-1``, (n, n) float64.

        Row i over its entry (i, i) is the OBS step of i by the inverse without all earlier inputs.
        """
        factor: Tensor = torch.linalg.cholesky(self.inverse, upper=True)
        return factor

    def spectrum(self, scale: Tensor, dtype: torch.dtype) -> Spectrum:
        """Return H in coordinates of a scale, (n,) positive, with its eigenvalues and eigenvectors.

        The last one is kept, for layers that are fed the same. O(n^3).
        """
        known = self._spectrum
        if known is None or known[1].matrix.dtype != dtype or not torch.equal(known[0], scale):
            matrix = (self.values / scale.outer(scale)).to(dtype)
            known = scale, Spectrum(matrix, *torch.linalg.eigh(matrix))
            self._spectrum = known
        return known[1]


class Spectrum(NamedTuple):
    """A symmetric matrix (n, n), its eigenvalues (n,), and its eigenvectors as columns (n, n)."""

    matrix: Tensor
    values: Tensor
    vectors: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProgram:
    """Rows of weights, their Hessian and what they may keep.

    Raises `ShapeError` or `NonFiniteError` if the weights do not fit the Hessian or hold NaN or infinity.

    Parameters
    ----------
    weights : (r, n) Tensor
        Float32 or float64, which is the precision that methods work in.
    hessian : LayerHessian
    support : LayerSupport
    """

    weights: Tensor
    hessian: LayerHessian
    support: LayerSupport

    def __post_init__(self) -> None:
        weights, n, name = self.weights, self.hessian.n, self.hessian.name
        if weights.ndim != 2 or weights.shape[1] != n:
            found = f"shape {tuple(weights.shape)} for {name}"
            raise ShapeError("weights", found, f"pass (rows, {n}), as its Gram matrix has {n} inputs")
        if not bool(torch.isfinite(weights).all()):
            raise NonFiniteError("weights", f"NaN or infinity in {name}", "check the network")
        precise = weights.dtype == torch.float64
        object.__setattr__(self, "weights", weights if precise else weights.float())
        self.support.total(self.rows, n)

    @property
    def rows(self) -> int:
        """Number of rows, the outputs of the layer."""
        return int(self.weights.shape[0])

    @property
    def matrix(self) -> Tensor:
        """H in the precision of the weights, (n, n)."""
        return self.hessian.of(self.weights.dtype)

    def losses(self, weights: Tensor) -> Tensor:
        """Return the objective of every row at new weights (r, n), (r,) float64."""
        error = self.weights.double() - weights.double()
        return (0.5 * self.hessian.unit) * ((error @ self.hessian.values) * error).sum(1)

    def dense_losses(self) -> Tensor:
        """Return the objective of every row if all of it goes, (r,) float64."""
        return self.losses(torch.zeros_like(self.weights))

    def relative(self, weights: Tensor) -> tuple[float, float]:
        """Return loss and change of the outputs at new weights (r, n), each relative to pruning everything.

        The change is the loss without the damping: the mean squared error over the mean square of outputs.
        """
        error, dense = self.weights.double() - weights.double(), self.weights.double()
        damping = self.hessian.damping
        figures = []
        for e in (error, dense):
            loss, squares = float(((e @ self.hessian.values) * e).sum()), float(e.square().sum())
            figures.append((loss, loss - damping * squares))
        (loss, change), (most, outputs) = figures
        return (loss / most if most else 0.0), (change / outputs if outputs > 0.0 else 0.0)

    def settled(self, keep: Tensor) -> LayerProgram:
        """Return the program in which every row has the count of its set, where only all rows have one."""
        return replace(self, support=self.support.settled(keep))

    def take(self, rows: Tensor) -> LayerProgram:
        """Return the program of some rows."""
        return LayerProgram(weights=self.weights[rows], hessian=self.hessian, support=self.support.take(rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSolution:
    """New weights of a layer, and what is known of them.

    `keep` (r, n) bool, True where a weight stays; `weights` (r, n) in the precision of the program, exactly 0
    elsewhere; `losses` (r,) float64. In `proved` of the rows no swap of a kept against a pruned weight lowers
    the loss: each was evaluated, at its best new weights in float64. The other rows were not examined.
    """

    keep: Tensor
    weights: Tensor
    losses: Tensor
    proved: int = 0
