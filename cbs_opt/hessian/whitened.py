"""Solves with ``R^T R + damping M`` for many dampings, M block-diagonal over channels and factored once.

With ``M = L L^T`` channel by channel and ``W = R L^-T``,

    (R^T R + damping M)^-1 = L^-T (W^T W + damping I)^-1 L^-1

so that in the coordinates ``L^T d`` the metric is the identity, and one Gram matrix serves every damping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.products import KeptGram, factorise, inner_gram, weighted_squares
from cbs_opt.update.cbs import solve_kept


class WhitenedRows:
    """Gradient rows in the coordinates of a metric ``M = C + shift I``.

    Parameters
    ----------
    rows : (m, n) tensor
    channels : ChannelTerm
        C, of the same n weights.
    shift : float
        Positive where C is singular.
    name : str
        Of the block, for messages.

    Raises
    ------
    NotPositiveDefiniteError
        If M is singular.

    Notes
    -----
    O(m n k) for channels of k weights, once; the Gram matrix costs O(m^2 n) at the first solve, and
    a damping O(m^3 + m n) after that. The whitened rows have the precision of `rows`.
    """

    def __init__(self, rows: Tensor, channels: ChannelTerm, shift: float, name: str = "") -> None:
        n = rows.shape[1]
        self._spans = [(channel.start, channel.stop) for channel in channels.channels]
        self._factors: list[Tensor] = []
        block = FisherBlock(name=name, start=0, stop=n, weights=rows.new_zeros(n), rows=rows, damping=shift)
        for channel in channels.channels:
            matrix = channel.matrix().clone()
            matrix.diagonal().add_(shift)
            self._factors.append(factorise(matrix, block))
        self._rows = torch.empty_like(rows)
        for (start, stop), factor in zip(self._spans, self._factors, strict=True):
            half = torch.linalg.solve_triangular(factor.to(rows.dtype), rows[:, start:stop].T, upper=False)
            self._rows[:, start:stop] = half.T
        self._block = FisherBlock(name=name, start=0, stop=n, weights=rows.new_zeros(n), rows=self._rows)
        self._everything = torch.arange(n, device=rows.device)
        self._gram = KeptGram(self._rows)
        self._eigen: tuple[Tensor, Tensor] | None = None

    def solve(
        self, rights: Sequence[Tensor], dampings: Sequence[float], pulled: Tensor | None = None
    ) -> list[Tensor]:
        """``(R^T R + damping M)^-1 (right + R^T pulled)``, (n,) float64, for each damping and its right."""
        return [
            self._back(
                solve_kept(
                    self._block,
                    self._everything,
                    self._forth(right),
                    [damping],
                    pulled=pulled,
                    gram=self._gram,
                )[0]
            )
            for right, damping in zip(rights, dampings, strict=True)
        ]

    def inverse_diagonal(self, damping: float) -> Tensor:
        """``diag((R^T R + damping M)^-1)``, (n,) float64."""
        values, vectors = self._eigenvectors()
        weights = 1.0 / (values + damping)
        seen = weighted_squares(vectors, weights)
        if self._rows.shape[0] >= self._rows.shape[1]:
            return seen
        own = torch.cat([torch.cholesky_inverse(factor).diagonal() for factor in self._factors])
        return (own - seen).maximum(torch.finfo(self._rows.dtype).eps * own) / damping

    def _eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of ``W^T W``; its eigenvectors as rows, times their roots if m < n, times L^-1."""
        if self._eigen is None:
            rows = self._rows
            if rows.shape[0] < rows.shape[1]:
                keep = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
                values, vectors = torch.linalg.eigh(self._gram.of(keep))
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

    def _forth(self, x: Tensor) -> Tensor:
        """``L^-1 x``."""
        return self._by_channel(x, transposed=False)

    def _back(self, x: Tensor) -> Tensor:
        """``L^-T x``."""
        return self._by_channel(x, transposed=True)

    def _by_channel(self, x: Tensor, *, transposed: bool) -> Tensor:
        solved = torch.empty_like(x)
        for (start, stop), factor in zip(self._spans, self._factors, strict=True):
            matrix = factor.T if transposed else factor
            piece = torch.linalg.solve_triangular(matrix, x[start:stop, None], upper=transposed)
            solved[start:stop] = piece[:, 0]
        return solved
