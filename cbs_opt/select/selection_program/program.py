"""The selection program of one block as torch products, without forming the Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.hessian import products
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channels import densified


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectionProgram:
    """``f(y) = 1/2 y.A y - c.y`` with ``A = diag(w) H diag(w)`` and ``c = g * w``.

    Parameters
    ----------
    weights : (n,) tensor
    rows : (m, n) tensor or None
        Scaled gradient rows R; ``H = R^T R + damping I``.
    hessian : (n, n) tensor or None
        Used when there are no rows; ``H = hessian + damping I``.
    damping : float
    gradient : (n,) tensor or None

    Notes
    -----
    `rows` keep their dtype and device; the image ``z = R (w * y)`` is accumulated in float64,
    because the objective is what is left after many columns have cancelled in it.
    """

    weights: Tensor
    rows: Tensor | None = None
    hessian: Tensor | None = None
    damping: float = 0.0
    gradient: Tensor | None = None

    @classmethod
    def of(cls, block: FisherBlock) -> SelectionProgram:
        """The selection program of a Fisher block; one with a channel term must be small."""
        if block.channels is not None:
            block = densified(block, "selection")
        return cls(
            weights=block.weights,
            rows=block.rows,
            hessian=block.hessian,
            damping=block.damping,
            gradient=block.gradient,
        )

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.weights.shape[0]

    @property
    def data(self) -> Tensor:
        """The rows or the Hessian, whichever is there."""
        data = self.rows if self.rows is not None else self.hessian
        assert data is not None
        return data

    def linear(self) -> Tensor:
        """``c = g * w``, (n,) float64."""
        if self.gradient is None:
            return torch.zeros(self.n, dtype=torch.float64, device=self.weights.device)
        return self.gradient.double() * self.weights.double()

    def diagonal(self) -> Tensor:
        """``A_ii = w_i^2 H_ii``, (n,) float64."""
        if self.rows is None:
            curvature = torch.diagonal(self.data).double()
        else:
            curvature = products.column_squares(self.rows)
        return self.weights.double() ** 2 * (curvature + self.damping)

    def image(self, coefficients: Tensor) -> Tensor:
        """``z = R (w * coefficients)``, (m,), or ``H_0 (w * coefficients)``, (n,), in float64."""
        return products.image(self.data, self.weights.double() * coefficients)

    def columns(self, index: Tensor) -> Tensor:
        """``B_i = R_i w_i`` for `index`, (m, p) float64."""
        return self.data.index_select(1, index).double() * self.weights[index].double()

    def product(self, image: Tensor, coefficients: Tensor) -> Tensor:
        """``A y`` from the image of ``y``, (n,) float64."""
        w = self.weights.double()
        back = image if self.rows is None else (self.rows.T @ image.to(self.rows.dtype)).double()
        return w * (back + self.damping * w * coefficients)

    def product_at(self, index: Tensor, image: Tensor, coefficients: Tensor) -> Tensor:
        """Entries `index` of ``A y``, (p,) float64; O(m p)."""
        w = self.weights[index].double()
        back = image[index] if self.rows is None else self.rows.index_select(1, index).double().T @ image
        return w * (back + self.damping * w * coefficients[index])

    def value(self, image: Tensor, coefficients: Tensor) -> float:
        """``f(y)`` from the image of ``y``."""
        x = self.weights.double() * coefficients
        quadratic = image @ image if self.rows is not None else x @ image
        quadratic = quadratic + self.damping * (x @ x)
        return float(0.5 * quadratic - self.linear() @ coefficients)

    def objective(self, pruned: Tensor) -> float:
        """``f(y)`` of a pruned set from a fresh image; O(m n)."""
        y = pruned.double()
        return self.value(self.image(y), y)

    def gram(self, index: Tensor, *, precise: bool = True) -> Tensor:
        """``A[index, index]``, (p, p) float64; O(m p^2).

        Not `precise`: the products of the rows are taken in their own precision.
        """
        w = self.weights[index].double()
        if self.rows is None:
            block = self.data.index_select(0, index).index_select(1, index).double()
        else:
            columns = self.rows.index_select(1, index)
            columns = columns.double() if precise else columns
            block = (columns.T @ columns).double()
        block.diagonal().add_(self.damping)
        return w[:, None] * block * w[None, :]
