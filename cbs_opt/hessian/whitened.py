"""Solves with ``R^T R + damping M`` for many dampings, M block-diagonal over channels and factored once.

With ``M = L L^T`` channel by channel and ``W = R L^-T``,

    (R^T R + damping M)^-1 = L^-T (W^T W + damping I)^-1 L^-1

so that in the coordinates ``L^T d`` the metric is the identity, and one Gram matrix serves every damping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.operators import Factor, Hessian, PlainHessian
from cbs_opt.hessian.products import damped, factorise, image, inner_gram, weighted_squares
from cbs_opt.hessian.rows import KeptGram, RowsFactor, RowsHessian
from formulations.errors import UnsupportedProblemError


class MetricHessian(RowsHessian):
    """``A = R^T R`` whose damping multiplies the metric ``M = C + shift I`` in the place of the identity.

    Parameters
    ----------
    rows : (m, n) tensor
    channels : ChannelTerm
        C, of the same n weights.
    shift : float
        Positive where C is singular.

    Notes
    -----
    `factored` costs O(m n k) for channels of k weights and O(m^2 n), then O(m^3 + m n) a damping. The
    factors of all weights, once made, are kept: they have the precision and the size of `rows`.
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
        whole = keep is None or bool(keep.all())
        if whole and self._whole is None:
            self._whole = _Whitened(self.rows, self.channels, self.shift, name)
        whitened = self._whole
        if keep is not None and not whole:
            whitened = _Whitened(self.rows[:, keep], self.channels.restricted(keep), self.shift, name)
        assert whitened is not None
        kept = self.kept(keep)
        for damping, factor in zip(dampings, whitened.hessian.factored(dampings, None, name), strict=True):
            assert isinstance(factor, RowsFactor)
            yield _MetricFactor(self, whitened, kept, factor, damping)


class _MetricFactor:
    """`Factor` of a `MetricHessian`."""

    def __init__(
        self, hessian: MetricHessian, whitened: _Whitened, kept: Tensor, factor: RowsFactor, damping: float
    ) -> None:
        self.hessian, self.whitened, self.kept = hessian, whitened, kept
        self.factor, self.damping = factor, damping

    def solve(self, right: Tensor, removed: Tensor | None = None) -> Tensor:
        pulled = None
        if removed is not None:
            right = self.damping * self.hessian.metric(removed)[self.kept] + right
            pulled = image(self.hessian.rows, removed)
        forth = self.whitened.by_channel(right, transposed=False)
        return self.whitened.by_channel(self.factor.solve_pulled(forth, pulled), transposed=True)

    def inverse_diagonal(self) -> Tensor:
        return self.whitened.inverse_diagonal(self.damping)


class _Whitened:
    """Gradient rows in the coordinates of a metric: `hessian` is ``W^T W``."""

    def __init__(self, rows: Tensor, channels: ChannelTerm, shift: float, name: str) -> None:
        self._spans = [(channel.start, channel.stop) for channel in channels.channels]
        self._factors = [
            factorise(damped(channel.matrix(), shift), name, shift) for channel in channels.channels
        ]
        self._rows = torch.empty_like(rows)
        for (start, stop), factor in zip(self._spans, self._factors, strict=True):
            half = torch.linalg.solve_triangular(factor.to(rows.dtype), rows[:, start:stop].T, upper=False)
            self._rows[:, start:stop] = half.T
        self._gram = KeptGram()
        self.hessian = RowsHessian(self._rows, self._gram)
        self._eigen: tuple[Tensor, Tensor] | None = None

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Return ``diag((R^T R + damping M)^-1)``, (n,) float64."""
        values, vectors = self._eigenvectors()
        seen = weighted_squares(vectors, 1.0 / (values + damping))
        if self._rows.shape[0] >= self._rows.shape[1]:
            return seen
        alone = torch.cat([torch.cholesky_inverse(factor).diagonal() for factor in self._factors])
        return (alone - seen).maximum(torch.finfo(self._rows.dtype).eps * alone) / damping

    def _eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues of ``W^T W``, and eigenvectors as rows, times roots if m < n, times L^-1."""
        if self._eigen is None:
            rows = self._rows
            if rows.shape[0] < rows.shape[1]:
                keep = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
                values, vectors = torch.linalg.eigh(self._gram.of(rows, keep))
                spread = vectors.T.to(rows.dtype) @ rows
            else:
                values, vectors = torch.linalg.eigh(inner_gram(rows.T))
                spread = vectors.T.contiguous()
            for (start, stop), factor in zip(self._spans, self._factors, strict=True):
                upper = factor.to(spread.dtype).T
                spread[:, start:stop] = torch.linalg.solve_triangular(
                    upper, spread[:, start:stop].T, upper=True
                ).T
            self._eigen = values.clamp_min(0.0), spread
        return self._eigen

    def by_channel(self, x: Tensor, *, transposed: bool) -> Tensor:
        """Return ``L^-1 x``, or ``L^-T x``."""
        result = torch.empty_like(x)
        for (start, stop), factor in zip(self._spans, self._factors, strict=True):
            matrix = factor.T if transposed else factor
            piece = torch.linalg.solve_triangular(matrix, x[start:stop, None], upper=transposed)
            result[start:stop] = piece[:, 0]
        return result
