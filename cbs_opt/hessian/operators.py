"""``H = A + damping I`` as a linear operator: products with A, and solves with H restricted to kept weights.

What A is made of, gradient rows, a matrix, or either with a term block-diagonal over channels, is known in
this folder alone. Everything else works with the methods of `Hessian`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.products import image


class Factor(Protocol):
    """``H_KK`` for one damping, factored when it is first needed."""

    def solve(self, right: Tensor, removed: Tensor | None = None) -> Tensor:
        """Return ``H_KK^-1 (right + H_KP removed_P)``, (s,) float64.

        `removed` (n,) is 0 on K; it enters in the space of the rows, where nothing cancels.
        """
        ...

    def inverse_diagonal(self) -> Tensor:
        """Return ``diag(H_KK^-1)``, (s,) float64."""
        ...


class Hessian(ABC):
    """A symmetric positive semidefinite matrix A of which products and solves are known.

    The Hessian of a block is ``H = A + damping M``; the metric M is the identity for all but
    `cbs_opt.hessian.whitened.MetricHessian`.

    It has `n` weights. Where it is ``R^T R`` and nothing else (`by_rows`), searches may use the columns of
    R; where solves go channel by channel beside rows (`by_channels`), by `schur_diagonal` of the factors.
    """

    n: int
    by_rows: ClassVar[bool] = False
    by_channels: bool = False

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return ``A x`` for float64 `x`, (n,); the way back is in the precision of the rows."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return ``diag(A)``, (n,) float64."""

    def quadratic(self, step: Tensor) -> float:
        """Return ``d.A d`` for a float64 step (n,)."""
        return float(step @ self.product(step))

    @abstractmethod
    def dense(self) -> Tensor:
        """Return A itself, (n, n) float64; O(m n^2), for small blocks."""

    @abstractmethod
    def plain(self, purpose: str) -> PlainHessian:
        """Return A as rows or as one matrix.

        Raises `UnsupportedProblemError` if the matrix would have to be formed and is too large; `purpose`
        says what for.
        """

    def parts(self) -> tuple[PlainHessian, ChannelTerm] | None:
        """Return rows and the term over channels, where A is their sum and is bounded channel by channel."""
        return None

    @abstractmethod
    def factored(
        self, dampings: Sequence[float], keep: Tensor | None = None, name: str = ""
    ) -> Iterator[Factor]:
        """Return ``H_KK`` for each damping, with what they share computed once.

        `keep` (n,) is True on K, by default everywhere; `name` is that of the block, for messages.
        Raises `NotPositiveDefiniteError` here or by the factor, if ``H_KK`` is singular.
        """

    def without_channels(self) -> Hessian:
        """Return A without its term over channels, if it has one."""
        return self

    def prepared(self) -> Hessian:
        """Return the same A where the inverse's diagonal is wanted for many dampings, one after another."""
        return self

    def metric(self, x: Tensor) -> Tensor:
        """Return ``M x``, (n,) float64."""
        return x

    def metric_diagonal(self) -> Tensor | float:
        """Return ``diag(M)``."""
        return 1.0

    def metric_quadratic(self, step: Tensor) -> float:
        """Return ``d.M d``."""
        return float(step.square().sum())


class PlainHessian(Hessian):
    """Rows or one matrix: A is ``F^T F`` or F, and what searches ask of F.

    F is `data`, (m, n) or (n, n); no more than `rank` eigenvalues of A differ from 0.
    """

    data: Tensor
    rank: int

    def kept(self, keep: Tensor | None) -> Tensor:
        """Return the indices of the kept weights in increasing order, (s,) int64."""
        return torch.arange(self.n, device=self.data.device) if keep is None else keep.nonzero().squeeze(1)

    @property
    def precision(self) -> torch.dtype:
        """That of products that take most of the time."""
        return torch.float64

    def plain(self, purpose: str) -> PlainHessian:
        """Return the operator itself."""
        return self

    def image(self, x: Tensor) -> Tensor:
        """Return ``F x`` in float64."""
        return image(self.data, x)

    def columns(self, index: Tensor) -> Tensor:
        """Return columns `index` of F, (m, p) float64."""
        return self.data.index_select(1, index).double()

    @abstractmethod
    def back(self, image: Tensor) -> Tensor:
        """Return ``A x`` from the image of x, (n,) float64."""

    @abstractmethod
    def back_at(self, index: Tensor, image: Tensor) -> Tensor:
        """Return entries `index` of ``A x``, (p,) float64; O(m p)."""

    @abstractmethod
    def square(self, image: Tensor, x: Tensor) -> Tensor:
        """Return ``x.A x`` from x and its image."""

    @abstractmethod
    def entries(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the entries at `left` (a,) and `right` (b,), (a, b) float64."""

    @abstractmethod
    def part(self, index: Tensor, *, precise: bool = True) -> Tensor:
        """Return ``A[index, index]``, (p, p) float64; not `precise`: in the precision of the rows."""

    @abstractmethod
    def cross(self, kept: Tensor, removed: Tensor) -> Tensor:
        """Return ``A_K removed`` of the weights `kept`, (s,) float64."""

    @abstractmethod
    def row_form(self, damping: float, name: str) -> tuple[Tensor, float]:
        """Return rows, at most n of them, and a positive damping with the same ``A + damping I``.

        A matrix, and more rows than weights, become at most n rows by an eigendecomposition, O(n^3); a
        damping of 0 then takes half of the smallest eigenvalue.
        Raises `NotPositiveDefiniteError` if the sum is singular.
        """
