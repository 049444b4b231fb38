"""The selection program of one block as torch products, without forming the Hessian; sizes of its search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock


@dataclass(frozen=True, kw_only=True)
class SwapTuning:
    """Sizes of a swap search on the selection program.

    `dense_limit` is the largest block whose whole Gram matrix is formed, `batch_bytes` what those of one
    batch of small blocks take, `pool` the weights in a pool, `swaps_a_look` swaps within it between two looks
    at the clock. `gathered` partners are listed for one pruned weight; of one with more, a table over all
    partners is cheaper: of `table_rows` pruned and `table_columns` kept weights, with the best `partners` of
    each kept. `cells` entries of the columns are held in float64, and partners of `scan_rows` pruned weights
    scanned, at a time. A sweep returns the best `most_pairs`, and ends early with `enough` improving ones.
    `compiled` says whether the kernels for the CPU are used there, and not those of other devices.
    """

    dense_limit: int = 2_048
    batch_bytes: int = 1 << 29
    pool: int = 2_048
    swaps_a_look: int = 128
    gathered: int = 32
    cells: int = 1 << 21
    scan_rows: int = 8_192
    table_rows: int = 1_024
    table_columns: int = 2_048
    partners: int = 16
    most_pairs: int = 65_536
    enough: int = 4_096
    compiled: bool = True


TUNING = SwapTuning()


class SelectionProgram:
    """``f(y) = 1/2 y.A y - c.y`` with ``A = diag(w) H diag(w)`` and ``c = g * w``; y is 1 where pruned.

    A block with a channel term must be small. Rows keep their dtype and device; the image ``z = R (w * y)``,
    or ``H_0 (w * y)`` where there are none, is accumulated in float64, because the objective is what is left
    after many columns have cancelled in it.
    """

    def __init__(self, block: FisherBlock) -> None:
        self.block = block
        self.hessian = block.hessian.plain("a search of the selection program")
        self.weights, self.damping = block.weights, block.damping

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.hessian.n

    @property
    def precision(self) -> torch.dtype:
        """That of the rows, or of the matrix."""
        return self.hessian.data.dtype

    def linear(self) -> Tensor:
        """Return ``c = g * w``, (n,) float64."""
        return self.block.slope * self.weights.double()

    def diagonal(self) -> Tensor:
        """Return ``A_ii = w_i^2 H_ii``, (n,) float64."""
        return self.weights.double() ** 2 * (self.hessian.diagonal() + self.damping)

    def image(self, coefficients: Tensor) -> Tensor:
        """Return the image z of `coefficients` (n,), in float64."""
        return self.hessian.image(self.weights.double() * coefficients)

    def columns(self, index: Tensor) -> Tensor:
        """Return ``B_i = R_i w_i`` for `index`, (m, p) float64."""
        return self.hessian.columns(index) * self.weights[index].double()

    def product(self, image: Tensor, coefficients: Tensor) -> Tensor:
        """Return ``A y`` from the image of ``y``, (n,) float64."""
        w = self.weights.double()
        return w * (self.hessian.back(image) + self.damping * w * coefficients)

    def product_at(self, index: Tensor, image: Tensor, coefficients: Tensor) -> Tensor:
        """Return entries `index` of ``A y``, (p,) float64; O(m p)."""
        w = self.weights[index].double()
        return w * (self.hessian.back_at(index, image) + self.damping * w * coefficients[index])

    def value(self, image: Tensor, coefficients: Tensor) -> float:
        """Return ``f(y)`` from the image of ``y``."""
        x = self.weights.double() * coefficients
        quadratic = self.hessian.square(image, x) + self.damping * (x @ x)
        return float(0.5 * quadratic - self.linear() @ coefficients)

    def objective(self, keep: Tensor) -> float:
        """Return ``f(y)`` of a kept set from a fresh image; O(m n)."""
        y = (~keep).double()
        return self.value(self.image(y), y)

    def gram(self, index: Tensor, *, precise: bool = True) -> Tensor:
        """Return ``A[index, index]``, (p, p) float64; O(m p^2).

        Not `precise`: the products of the rows are taken in their own precision.
        """
        w = self.weights[index].double()
        block = self.hessian.part(index, precise=precise)
        block.diagonal().add_(self.damping)
        return w[:, None] * block * w[None, :]
