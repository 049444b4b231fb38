"""Solves with ``H = R^T R + C + damping I``, C block-diagonal over channels, restricted to kept weights.

With ``D = C_KK + damping I``, factored channel by channel, and the m x m matrix ``M = I + R_K D^-1 R_K^T``,

    H_KK^-1 = D^-1 - D^-1 R_K^T M^-1 R_K D^-1          (Woodbury)

so that nothing larger than a channel or than m x m is factored. ``M`` may be formed in single precision:
then this inverse is only nearly that of H_KK, and conjugate gradients with it as the preconditioner bring
the solution to double precision in a few steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.products import adjoint_image, factorise, hessian_diagonal, image

GROUP = 2_048
"""Columns of neighbouring channels that one product takes at once."""
SINGLE_LIMIT = 1e4
"""Largest diagonal entry of M that single precision is trusted with."""
RESIDUAL = 1e-11
"""Residual in the norm of H^-1, relative to the right-hand side, at which refinement ends."""
REFINEMENTS = 50


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
        With channels.
    kept : (s,) int64 Tensor
        Kept weights in increasing order.
    damping : float
    precision : torch.dtype, default float64
        Of the products with the rows, where the work is. Solutions are in float64 whatever it is; the
        diagonal of the inverse is not.

    Raises
    ------
    NotPositiveDefiniteError
        If ``C_KK + damping I`` is singular.

    Notes
    -----
    O(m^2 s + sum of m k^2 over channels of k kept weights); memory beyond the block O(m^2 + sum of
    k^2). Where ``s <= m``, or the block has a Hessian for rows, ``H_KK`` is formed instead: O(m s^2).
    """

    def __init__(
        self, block: FisherBlock, kept: Tensor, damping: float, precision: torch.dtype = torch.float64
    ) -> None:
        assert block.channels is not None
        self.block = block
        self.kept = kept
        self.damping = damping
        self.precision = precision
        member = torch.zeros(block.n, dtype=torch.bool, device=kept.device)
        member[kept] = True
        self.channels = block.channels.restricted(member)
        self.whole: Tensor | None = None
        if block.rows is None or len(kept) <= block.rows.shape[0]:
            self.whole = factorise(self._dense(), block)
            return
        self.rows = block.rows
        self.parts = self._factored()
        inner = self._inner_matrix()
        if precision != torch.float64 and float(inner.diagonal().amax()) > SINGLE_LIMIT:
            self.precision = torch.float64
            inner = self._inner_matrix()
        self.inner = factorise(inner, block)

    def _factored(self) -> list[_Factored]:
        """The factors of D, in one piece of memory: between temporaries they would leave holes."""
        channels = self.channels.channels
        squares = [(channel.stop - channel.start) ** 2 for channel in channels]
        storage = torch.empty(sum(squares), dtype=torch.float64, device=self.kept.device)
        parts = []
        for channel, piece in zip(channels, torch.split(storage, squares), strict=True):
            matrix = channel.matrix()
            matrix.diagonal().add_(self.damping)
            # By columns, as LAPACK has it.
            factor = piece.view_as(matrix).T.copy_(factorise(matrix, self.block))
            parts.append(_Factored(index=self.kept[channel.start : channel.stop], factor=factor))
        return parts

    def solve(self, right: Tensor) -> Tensor:
        """``H_KK^-1 right`` for `right` (s,) float64."""
        if self.whole is not None:
            solved: Tensor = torch.cholesky_solve(right[:, None], self.whole)[:, 0]
            return solved
        solution, settled = self._refined(right)
        if not settled and self.precision != torch.float64:
            self.precision = torch.float64
            self.inner = factorise(self._inner_matrix(), self.block)
            solution, _ = self._refined(right)
        return solution

    def inverse_diagonal(self) -> Tensor:
        """``diag(H_KK^-1)``, (s,) float64 in the precision of the system; O(m^2 s)."""
        if self.whole is not None:
            diagonal: Tensor = torch.cholesky_inverse(self.whole).diagonal()
            return diagonal
        inverse = self._inverse_factor()
        diagonals = []
        for group in _groups(self.parts):
            own = torch.cat([torch.cholesky_inverse(part.factor).diagonal() for part in group])
            spread = torch.cat([self._spread(part) for part in group])
            seen = (spread @ inverse.T).square_().sum(dim=1).double()
            diagonals.append((own - seen).maximum(torch.finfo(self.precision).eps * own))
        return torch.cat(diagonals)

    def schur_diagonal(self) -> Tensor:
        """``diag(H_PP - H_PK H_KK^-1 H_KP)`` of the weights P that are not kept, (n - s,) float64.

        In the precision of the system; O(m^2 (n - s) + sum of m k p over channels of k kept weights and
        p others).
        """
        assert self.block.channels is not None
        if self.whole is not None:
            return self._dense_schur_diagonal(self.whole)
        inverse = self._inverse_factor()
        parts = iter(self.parts)
        part = next(parts, None)
        diagonals = []
        for channel in self.block.channels.channels:
            member = torch.zeros(channel.stop - channel.start, dtype=torch.bool, device=self.kept.device)
            own = part if part is not None and int(part.index[0]) < channel.stop else None
            if own is not None:
                member[own.index - channel.start] = True
                part = next(parts, None)
            others = (~member).nonzero().squeeze(1)
            if not len(others):
                continue
            outer = self.rows.index_select(1, others + channel.start).to(self.precision).T
            diagonal = channel.diagonal()[others] + self.damping
            if own is not None:
                cross = channel.matrix()[member][:, others]
                cross = torch.linalg.solve_triangular(own.factor, cross, upper=False)
                diagonal = (diagonal - cross.square().sum(dim=0)).clamp_min(self.damping)
                outer = outer - cross.to(self.precision).T @ self._half(own)
            diagonals.append(diagonal + (outer @ inverse.T).square_().sum(dim=1).double())
        return torch.cat(diagonals) if diagonals else torch.zeros_like(self.inner[0, :0])

    def _inverse_factor(self) -> Tensor:
        """``L^-1`` with ``L L^T = M``, in the precision of the products."""
        identity = torch.eye(len(self.inner), dtype=torch.float64, device=self.inner.device)
        inverse: Tensor = torch.linalg.solve_triangular(self.inner, identity, upper=False)
        return inverse.to(self.precision)

    def _dense_schur_diagonal(self, factor: Tensor) -> Tensor:
        member = torch.zeros(self.block.n, dtype=torch.bool, device=self.kept.device)
        member[self.kept] = True
        diagonal = hessian_diagonal(self.block) - self.block.damping + self.damping
        pieces = [diagonal[:0]]
        for others in torch.split((~member).nonzero().squeeze(1), GROUP):
            cross = self._dense_columns(others)
            cross = torch.linalg.solve_triangular(factor, cross, upper=False)
            pieces.append((diagonal[others] - cross.square().sum(dim=0)).clamp_min(self.damping))
        return torch.cat(pieces)

    def _dense_columns(self, others: Tensor) -> Tensor:
        """``H_KJ`` of weights `others` that are not kept, (s, j) float64."""
        block = self.block
        assert block.channels is not None
        if block.rows is None:
            assert block.hessian is not None
            columns = block.hessian.index_select(0, self.kept).index_select(1, others).double()
        else:
            columns = block.rows.index_select(1, self.kept).double().T
            columns = columns @ block.rows.index_select(1, others).double()
        return columns + block.channels.entries(self.kept, others)

    def _dense(self) -> Tensor:
        """``H_KK``, (s, s) float64."""
        if self.block.rows is None:
            assert self.block.hessian is not None
            matrix = self.block.hessian.index_select(0, self.kept).index_select(1, self.kept).double()
        else:
            columns = self.block.rows.index_select(1, self.kept).double()
            matrix = columns.T @ columns
        matrix = matrix + self.channels.dense()
        matrix.diagonal().add_(self.damping)
        return matrix

    def _inner_matrix(self) -> Tensor:
        """``M = I + R_K D^-1 R_K^T``, accumulated in float64 over groups of channels."""
        inner = torch.eye(self.rows.shape[0], dtype=torch.float64, device=self.kept.device)
        for group in _groups(self.parts):
            half = torch.cat([self._half(part) for part in group])
            inner += (half.T @ half).double()
        return inner

    def _half(self, part: _Factored) -> Tensor:
        """``L^-1 R_k^T``, (k, m), of one channel with ``L L^T = D_k``."""
        columns = self.rows.index_select(1, part.index).to(self.precision)
        half: Tensor = torch.linalg.solve_triangular(part.factor.to(self.precision), columns.T, upper=False)
        return half

    def _spread(self, part: _Factored) -> Tensor:
        """``D_k^-1 R_k^T``, (k, m)."""
        upper = part.factor.to(self.precision).T
        spread: Tensor = torch.linalg.solve_triangular(upper, self._half(part), upper=True)
        return spread

    def _apply_inverse(self, right: Tensor) -> Tensor:
        """``H_KK^-1 right`` as far as the precision of M goes, by a fixed symmetric positive matrix."""
        first = self._by_channel(right)
        dual = torch.cholesky_solve(self._image(first)[:, None], self.inner)[:, 0]
        return first - self._by_channel(self._back(dual))

    def _refined(self, right: Tensor) -> tuple[Tensor, bool]:
        """Conjugate gradients preconditioned by `_apply_inverse`, and whether they came to the goal."""
        solution = self._apply_inverse(right)
        goal = RESIDUAL**2 * float(right @ solution)
        residual = right - self._product(solution)
        towards = self._apply_inverse(residual)
        direction, square = towards, float(residual @ towards)
        for _ in range(REFINEMENTS):
            if not square > goal:
                break
            curved = self._product(direction)
            length = square / float(direction @ curved)
            solution = solution + length * direction
            residual = residual - length * curved
            towards = self._apply_inverse(residual)
            before, square = square, float(residual @ towards)
            direction = towards + square / before * direction
        return solution, 0.0 <= square <= goal

    def _product(self, x: Tensor) -> Tensor:
        """``H_KK x``, (s,) float64."""
        return self._back(self._image(x)) + self.channels.product(x) + self.damping * x

    def _image(self, x: Tensor) -> Tensor:
        """``R_K x``, (m,) float64."""
        scattered = x.new_zeros(self.block.n)
        scattered[self.kept] = x
        return image(self.rows, scattered)

    def _back(self, y: Tensor) -> Tensor:
        """``R_K^T y``, (s,) float64."""
        return adjoint_image(self.rows, y)[self.kept]

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
