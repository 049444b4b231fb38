"""A as one symmetric matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cbs_opt.hessian.operators import Factor, PlainHessian
from cbs_opt.hessian.products import damped, factorise, image, solved
from cbs_opt.hessian.rows import reduced_rows
from formulations.errors import ShapeError


class DenseHessian(PlainHessian):
    """A symmetric positive semidefinite matrix (n, n) of any precision."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError("hessian", f"shape {tuple(matrix.shape)}", "pass a square matrix")
        self.data = matrix
        self.n = self.rank = matrix.shape[-1]

    def product(self, x: Tensor) -> Tensor:
        return image(self.data, x)

    def diagonal(self) -> Tensor:
        return torch.diagonal(self.data).double()

    def dense(self) -> Tensor:
        return self.data.double()

    def back(self, image: Tensor) -> Tensor:
        return image

    def back_at(self, index: Tensor, image: Tensor) -> Tensor:
        return image[index]

    def square(self, image: Tensor, x: Tensor) -> Tensor:
        return x @ image

    def entries(self, left: Tensor, right: Tensor) -> Tensor:
        return self.data.index_select(0, left).index_select(1, right).double()

    def part(self, index: Tensor, *, precise: bool = True) -> Tensor:
        return self.entries(index, index)

    def cross(self, kept: Tensor, removed: Tensor) -> Tensor:
        return self.data.index_select(0, kept).double() @ removed

    def row_form(self, damping: float, name: str) -> tuple[Tensor, float]:
        return reduced_rows(self.data.double(), damping, name)

    def factored(
        self, dampings: Sequence[float], keep: Tensor | None = None, name: str = ""
    ) -> Iterator[Factor]:
        kept = self.kept(keep)
        matrix = self.part(kept)
        for damping in dampings:
            yield _DenseFactor(self, kept, factorise(damped(matrix, damping), name, damping))


class _DenseFactor:
    """`Factor` by the Cholesky factor of the kept block."""

    def __init__(self, hessian: DenseHessian, kept: Tensor, factor: Tensor) -> None:
        self.hessian, self.kept, self.factor = hessian, kept, factor

    def solve(self, right: Tensor, removed: Tensor | None = None) -> Tensor:
        if removed is not None:
            right = right + self.hessian.cross(self.kept, removed)
        return solved(self.factor, right)

    def inverse_diagonal(self) -> Tensor:
        return torch.diagonal(torch.cholesky_inverse(self.factor))
