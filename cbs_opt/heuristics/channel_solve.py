"""Solves with ``H = R^T R + C + damping I``, C block-diagonal over channels, restricted to kept weights.

With ``D = C_KK + damping I``, factored channel by channel, and the m x m matrix ``M = I + R_K D^-1 R_K^T``,

    H_KK^-1 = D^-1 - D^-1 R_K^T M^-1 R_K D^-1          (Woodbury)

so that nothing larger than a channel or than m x m is factored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.blocks import FisherBlock
from cbs_opt.heuristics.products import factorise

GROUP = 2_048
"""Columns of neighbouring channels that one product takes at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Factored:
    """The kept weights of one channel and the Cholesky factor of their block of D."""

    index: Tensor
    factor: Tensor


class ChannelSystem:
    """``H_KK`` of a block with a channel term, factored once for solves and its inverse's diagonal.

    Parameters
    ----------
    block : FisherBlock
        With rows and channels.
    kept : (s,) int64 Tensor
        Kept weights in increasing order.
    damping : float
    precision : torch.dtype, default float64
        Of the products with the rows, where the work is; everything else is float64.

    Raises
    ------
    NotPositiveDefiniteError
        If ``C_KK + damping I`` is singular.

    Notes
    -----
    O(m^2 s + sum of m k^2 over channels of k kept weights); memory beyond the block O(m^2 + sum of
    k^2).
    """

    def __init__(
        self, block: FisherBlock, kept: Tensor, damping: float, precision: torch.dtype = torch.float64
    ) -> None:
        assert block.rows is not None
        assert block.channels is not None
        self.rows = block.rows
        self.kept = kept
        self.precision = precision
        member = torch.zeros(block.n, dtype=torch.bool, device=kept.device)
        member[kept] = True
        self.parts: list[_Factored] = []
        for channel in block.channels.channels:
            own = member[channel.start : channel.stop].nonzero().squeeze(1)
            if len(own):
                matrix = channel.matrix(own)
                matrix.diagonal().add_(damping)
                self.parts.append(_Factored(index=own + channel.start, factor=factorise(matrix, block)))
        m = self.rows.shape[0]
        inner = torch.eye(m, dtype=torch.float64, device=kept.device)
        for group in _groups(self.parts):
            half = torch.cat([self._half(part) for part in group])
            inner += (half.T @ half).double()
        self._inner = factorise(inner, block)

    def solve(self, right: Tensor) -> Tensor:
        """``H_KK^-1 right`` for `right` (s,) float64."""
        first = self._by_channel(right)
        image = torch.zeros(self.rows.shape[0], dtype=torch.float64, device=right.device)
        start = 0
        for part in self.parts:
            stop = start + len(part.index)
            image += self.rows.index_select(1, part.index).double() @ first[start:stop]
            start = stop
        dual = torch.cholesky_solve(image[:, None], self._inner)[:, 0]
        back = [self.rows.index_select(1, part.index).double().T @ dual for part in self.parts]
        return first - self._by_channel(torch.cat(back))

    def inverse_diagonal(self) -> Tensor:
        """``diag(H_KK^-1)``, (s,) float64; O(m^2 s)."""
        identity = torch.eye(len(self._inner), dtype=torch.float64, device=self._inner.device)
        inverse = torch.linalg.solve_triangular(self._inner, identity, upper=False).to(self.precision)
        diagonals = []
        for group in _groups(self.parts):
            own = torch.cat([torch.cholesky_inverse(part.factor).diagonal() for part in group])
            spread = torch.cat([self._whole(part) for part in group])
            seen = (spread @ inverse.T).square_().sum(dim=1).double()
            diagonals.append((own - seen).maximum(torch.finfo(self.precision).eps * own))
        return torch.cat(diagonals)

    def _half(self, part: _Factored) -> Tensor:
        """``L^-1 R_k^T``, (k, m), of one channel with ``L L^T = D_k``."""
        columns = self.rows.index_select(1, part.index).to(self.precision)
        return torch.linalg.solve_triangular(part.factor.to(self.precision), columns.T, upper=False)

    def _whole(self, part: _Factored) -> Tensor:
        """``D_k^-1 R_k^T``, (k, m)."""
        upper = part.factor.to(self.precision).T
        return torch.linalg.solve_triangular(upper, self._half(part), upper=True)

    def _by_channel(self, right: Tensor) -> Tensor:
        """``D^-1 right``."""
        pieces = torch.split(right, [len(part.index) for part in self.parts])
        return torch.cat(
            [
                torch.cholesky_solve(piece[:, None], part.factor)[:, 0]
                for piece, part in zip(pieces, self.parts, strict=True)
            ]
        )


def _groups(parts: list[_Factored]) -> Iterator[list[_Factored]]:
    """Neighbouring channels with at most `GROUP` kept weights together (or one channel alone)."""
    group: list[_Factored] = []
    size = 0
    for part in parts:
        if group and size + len(part.index) > GROUP:
            yield group
            group, size = [], 0
        group.append(part)
        size += len(part.index)
    if group:
        yield group
