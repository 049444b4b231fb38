"""Solves with ``R^T R + damping M`` for many dampings, M block-diagonal over channels and factored once.

With ``M = L L^T`` channel by channel and ``W = R L^-T``,

    (R^T R + damping M)^-1 = L^-T (W^T W + damping I)^-1 L^-1

so that in the coordinates ``L^T d`` the metric is the identity, and one Gram matrix serves every damping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.operators import Factor, Hessian, PlainHessian
from cbs_opt.hessian.products import damped, factorise, image, weighted_squares
from cbs_opt.hessian.rows import KeptGram, RowsFactor, RowsHessian
from formulations.errors import UnsupportedProblemError


class MetricHessian(RowsHessian):
    """``A = R^T R`` whose damping multiplies the metric ``M = C + shift I`` in the place of the identity.

    C, the term over channels, is of the same n weights; the shift is positive where C is singular.

    `factored` costs O(m n k) for channels of k weights and O(m^2 n), then O(m^3 + m n) a damping. The factors
    of all weights, once made, are kept: they have the precision and the size of `rows`.
    """

    def __init__(self, rows: Tensor, channels: ChannelTerm, shift: float) -> None:
        super().__init__(rows)
        self.channels, self.shift = channels, shift
        self._whole: _Whitened | None = None

    def plain(self, purpose: str) -> PlainHessian:
        found = f"{purpose} with a damping that is no multiple of the identity"
        raise UnsupportedProblemError("hessian", found, "use a method that scores weights")

    def prepared(self) -> Hessian:
        return self

    def metric(self, x: Tensor) -> Tensor:
        return self.channels.product(x) + self.shift * x

    def metric_diagonal(self) -> Tensor:
        return self.channels.diagonal() + self.shift

    def metric_quadratic(self, step: Tensor) -> float:
        return float(step @ self.metric(step))

    def factored(
        self, dampings: Sequence[float], keep: Tensor | None = None, name: str = ""
    ) -> Iterator[Factor]:
        if keep is not None and not bool(keep.all()):
            whitened = _Whitened(self.data[:, keep], self.channels.restricted(keep), self.shift, name)
        else:
            whitened = self._whole = self._whole or _Whitened(self.data, self.channels, self.shift, name)
        kept = self.kept(keep)
        for factor in whitened.hessian.factored(dampings, None, name):
            assert isinstance(factor, RowsFactor)
            yield _MetricFactor(self, whitened, kept, factor)


class _MetricFactor:
    """`Factor` of a `MetricHessian`."""

    def __init__(self, hessian: MetricHessian, whitened: _Whitened, kept: Tensor, factor: RowsFactor) -> None:
        self.hessian, self.whitened, self.kept, self.factor = hessian, whitened, kept, factor

    def solve(self, right: Tensor, removed: Tensor | None = None) -> Tensor:
        pulled = None
        if removed is not None:
            right = self.factor.damping * self.hessian.metric(removed)[self.kept] + right
            pulled = image(self.hessian.data, removed)
        forth = self.whitened.by_channel(right, transposed=False)
        return self.whitened.by_channel(self.factor.solve_pulled(forth, pulled), transposed=True)

    def inverse_diagonal(self) -> Tensor:
        return self.whitened.inverse_diagonal(self.factor.damping)


class _Whitened:
    """Gradient rows in the coordinates of a metric: `hessian` is ``W^T W``."""

    def __init__(self, rows: Tensor, channels: ChannelTerm, shift: float, name: str) -> None:
        self._factors = [
            (slice(channel.start, channel.stop), factorise(damped(channel.matrix(), shift), name, shift))
            for channel in channels.channels
        ]
        white = torch.empty_like(rows)
        for span, factor in self._factors:
            half = torch.linalg.solve_triangular(factor.to(rows.dtype), rows[:, span].T, upper=False)
            white[:, span] = half.T
        self.hessian = RowsHessian(white, KeptGram())

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Return ``diag((R^T R + damping M)^-1)``, (n,) float64."""
        values, vectors = self._spectrum
        seen = weighted_squares(vectors, 1.0 / (values + damping))
        if self.hessian.rank >= self.hessian.n:
            return seen
        alone = torch.cat([torch.cholesky_inverse(factor).diagonal() for _, factor in self._factors])
        return (alone - seen).maximum(torch.finfo(self.hessian.precision).eps * alone) / damping

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of ``W^T W``, and eigenvectors as rows, times roots if m < n, times L^-1."""
        values, spread = self.hessian.eigenvectors()
        if self.hessian.rank >= self.hessian.n:
            spread = spread.T.contiguous()
        for span, factor in self._factors:
            upper = factor.to(spread.dtype).T
            spread[:, span] = torch.linalg.solve_triangular(upper, spread[:, span].T, upper=True).T
        return values, spread

    def by_channel(self, x: Tensor, *, transposed: bool) -> Tensor:
        """Return ``L^-1 x``, or ``L^-T x``."""
        result = torch.empty_like(x)
        for span, factor in self._factors:
            matrix = factor.T if transposed else factor
            result[span] = torch.linalg.solve_triangular(matrix, x[span, None], upper=transposed)[:, 0]
        return result
