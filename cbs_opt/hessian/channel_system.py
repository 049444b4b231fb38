"""Solves with ``H = R^T R + C + damping I``, C block-diagonal over channels, restricted to kept weights.

With ``D = C_KK + damping I``, factored channel by channel, and the m x m matrix ``M = I + R_K D^-1 R_K^T``,

    H_KK^-1 = D^-1 - D^-1 R_K^T M^-1 R_K D^-1          (Woodbury)

so that nothing larger than a channel or than m x m is factored. ``M`` may be formed in single precision:
then this inverse is only nearly that of H_KK, and conjugate gradients with it as the preconditioner bring
the solution to double precision in a few steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.dense import DenseHessian
from cbs_opt.hessian.operators import Factor, Hessian, PlainHessian
from cbs_opt.hessian.products import adjoint_image, damped, factorise, image, inverse_of_factor, solved
from formulations.errors import ShapeError, UnsupportedProblemError

DENSE_LIMIT = 4_096
"""Largest block whose whole Hessian is formed because of its term over channels."""
GROUP = 2_048
"""Columns of neighbouring channels that one product takes at once."""
SINGLE_LIMIT = 1e4
"""Largest diagonal entry of M that single precision is trusted with."""
RESIDUAL = 1e-11
"""Residual in the norm of H^-1, relative to the right-hand side, at which refinement ends."""
REFINEMENTS = 50


class _Factored(NamedTuple):
    """The kept weights of one channel and the Cholesky factor of their block of D."""

    kept: Tensor
    factor: Tensor


class ChannelHessian(Hessian):
    """``A = R^T R + C`` with C block-diagonal over output channels, or a matrix in the place of ``R^T R``."""

    def __init__(self, base: PlainHessian, channels: ChannelTerm) -> None:
        if channels.n != base.n:
            found = f"a term of {channels.n} weights beside {base.n}"
            raise ShapeError("channels", found, "take the term within the range of the block")
        self.base, self.channels = base, channels
        self.n = base.n
        self.by_channels = base.by_rows

    def product(self, x: Tensor) -> Tensor:
        return self.base.product(x) + self.channels.product(x)

    def diagonal(self) -> Tensor:
        return self.base.diagonal() + self.channels.diagonal()

    def quadratic(self, step: Tensor) -> float:
        return self.base.quadratic(step) + float(step @ self.channels.product(step))

    def dense(self) -> Tensor:
        return self.base.dense() + self.channels.dense()

    def plain(self, purpose: str) -> PlainHessian:
        if self.n > DENSE_LIMIT:
            found = f"{purpose} on {self.n} weights with a layer-input term"
            remedy = f"cut blocks of at most {DENSE_LIMIT}, leave the term out, or search by greedy_obs"
            raise UnsupportedProblemError("partition", found, f'{remedy}, program="joint"')
        return DenseHessian(self.dense())

    def without_channels(self) -> Hessian:
        return self.base

    def factored(
        self, dampings: Sequence[float], keep: Tensor | None = None, name: str = ""
    ) -> Iterator[Factor]:
        for damping in dampings:
            yield self.system(damping, keep, name)

    def system(
        self, damping: float, keep: Tensor | None = None, name: str = "", precision: torch.dtype | None = None
    ) -> ChannelSystem:
        """Return ``H_KK`` for one damping, in the precision of the rows or another."""
        return ChannelSystem(self, self.base.kept(keep), damping, name, precision or self.base.precision)


class ChannelSystem:
    """``H_KK`` of a `ChannelHessian`, factored once for solves and its inverse's diagonal: a `Factor`.

    `kept` (s,) are the kept weights in increasing order. The products with the rows, where the work is, are
    taken in `precision`. Solutions are in float64 whatever it is; the diagonal of the inverse is not.
    Raises `NotPositiveDefiniteError` if ``C_KK + damping I`` is singular.
    O(m^2 s + sum of m k^2 over channels of k kept weights); memory beyond the block O(m^2 + sum of k^2).
    Where ``s <= m``, or there is a matrix for rows, ``H_KK`` is formed instead: O(m s^2).
    """

    def __init__(
        self, hessian: ChannelHessian, kept: Tensor, damping: float, name: str, precision: torch.dtype
    ) -> None:
        self.hessian, self.kept = hessian, kept
        self.damping, self.name, self.precision = damping, name, precision
        self.member = torch.zeros(hessian.n, dtype=torch.bool, device=kept.device)
        self.member[kept] = True
        self.channels = hessian.channels.restricted(self.member)
        self.whole: Tensor | None = None
        if len(kept) <= hessian.base.rank:
            self.whole = self._factorise(damped(hessian.base.part(kept) + self.channels.dense(), damping))
            return
        self.rows = hessian.base.data
        self.parts = self._factored()
        inner = self._inner_matrix()
        if precision != torch.float64 and float(inner.diagonal().amax()) > SINGLE_LIMIT:
            self.precision = torch.float64
            inner = self._inner_matrix()
        self.inner = self._factorise(inner)

    def _factorise(self, matrix: Tensor) -> Tensor:
        return factorise(matrix, self.name, self.damping)

    def _factored(self) -> list[_Factored]:
        """Return the factors of D, in one piece of memory: between temporaries they would leave holes."""
        channels = self.channels.channels
        squares = [(channel.stop - channel.start) ** 2 for channel in channels]
        storage = torch.empty(sum(squares), dtype=torch.float64, device=self.kept.device)
        parts = []
        for channel, piece in zip(channels, torch.split(storage, squares), strict=True):
            matrix = damped(channel.matrix(), self.damping)
            # By columns, as LAPACK has it.
            factor = piece.view_as(matrix).T.copy_(self._factorise(matrix))
            parts.append(_Factored(self.kept[channel.start : channel.stop], factor))
        return parts

    def solve(self, right: Tensor, removed: Tensor | None = None) -> Tensor:
        """See `Factor`."""
        if removed is not None:
            right = right + self.hessian.channels.product(removed)[self.kept]
            right = right + self.hessian.base.cross(self.kept, removed)
        if self.whole is not None:
            return solved(self.whole, right)
        solution, settled = self._refined(right)
        if not settled and self.precision != torch.float64:
            self.precision = torch.float64
            self.inner = self._factorise(self._inner_matrix())
            solution, _ = self._refined(right)
        return solution

    def inverse_diagonal(self) -> Tensor:
        """Return ``diag(H_KK^-1)``, (s,) float64 in the precision of the system; O(m^2 s)."""
        if self.whole is not None:
            diagonal: Tensor = torch.cholesky_inverse(self.whole).diagonal()
            return diagonal
        inverse = inverse_of_factor(self.inner, self.precision)
        diagonals = []
        for group in _groups(self.parts):
            alone = torch.cat([torch.cholesky_inverse(part.factor).diagonal() for part in group])
            spread = torch.cat([self._spread(part) for part in group])
            seen = (spread @ inverse.T).square_().sum(dim=1).double()
            diagonals.append((alone - seen).maximum(torch.finfo(self.precision).eps * alone))
        return torch.cat(diagonals)

    def schur_diagonal(self) -> Tensor:
        """Return ``diag(H_PP - H_PK H_KK^-1 H_KP)`` of the weights P that are not kept, (n - s,) float64.

        In the precision of the system; O(m^2 (n - s) + sum of m k p over channels of k kept weights and
        p others).
        """
        if self.whole is not None:
            return self._dense_schur_diagonal(self.whole)
        inverse = inverse_of_factor(self.inner, self.precision)
        parts = iter(self.parts)
        part = next(parts, None)
        diagonals = []
        for channel in self.hessian.channels.channels:
            member = torch.zeros(channel.stop - channel.start, dtype=torch.bool, device=self.kept.device)
            inside = part if part is not None and int(part.kept[0]) < channel.stop else None
            if inside is not None:
                member[inside.kept - channel.start] = True
                part = next(parts, None)
            others = (~member).nonzero().squeeze(1)
            if not len(others):
                continue
            outer = self.rows.index_select(1, others + channel.start).to(self.precision).T
            diagonal = channel.diagonal()[others] + self.damping
            if inside is not None:
                cross = channel.matrix()[member][:, others]
                cross = torch.linalg.solve_triangular(inside.factor, cross, upper=False)
                diagonal = (diagonal - cross.square().sum(dim=0)).clamp_min(self.damping)
                outer = outer - cross.to(self.precision).T @ self._half(inside)
            diagonals.append(diagonal + (outer @ inverse.T).square_().sum(dim=1).double())
        return torch.cat(diagonals) if diagonals else torch.zeros_like(self.inner[0, :0])

    def _dense_schur_diagonal(self, factor: Tensor) -> Tensor:
        diagonal = self.hessian.diagonal() + self.damping
        pieces = [diagonal[:0]]
        for others in torch.split((~self.member).nonzero().squeeze(1), GROUP):
            cross = self.hessian.base.entries(self.kept, others)
            cross = cross + self.hessian.channels.entries(self.kept, others)
            cross = torch.linalg.solve_triangular(factor, cross, upper=False)
            pieces.append((diagonal[others] - cross.square().sum(dim=0)).clamp_min(self.damping))
        return torch.cat(pieces)

    def _inner_matrix(self) -> Tensor:
        """Return ``M = I + R_K D^-1 R_K^T``, accumulated in float64 over groups of channels."""
        inner = torch.eye(self.rows.shape[0], dtype=torch.float64, device=self.kept.device)
        for group in _groups(self.parts):
            half = torch.cat([self._half(part) for part in group])
            inner += (half.T @ half).double()
        return inner

    def _half(self, part: _Factored) -> Tensor:
        """Return ``L^-1 R_k^T``, (k, m), of one channel with ``L L^T = D_k``."""
        columns = self.rows.index_select(1, part.kept).to(self.precision)
        half: Tensor = torch.linalg.solve_triangular(part.factor.to(self.precision), columns.T, upper=False)
        return half

    def _spread(self, part: _Factored) -> Tensor:
        """Return ``D_k^-1 R_k^T``, (k, m)."""
        upper = part.factor.to(self.precision).T
        spread: Tensor = torch.linalg.solve_triangular(upper, self._half(part), upper=True)
        return spread

    def _apply_inverse(self, right: Tensor) -> Tensor:
        """Return ``H_KK^-1 right`` as far as the precision of M goes, by a fixed positive matrix."""
        first = self._by_channel(right)
        return first - self._by_channel(self._back(solved(self.inner, self._image(first))))

    def _refined(self, right: Tensor) -> tuple[Tensor, bool]:
        """Run conjugate gradients preconditioned by `_apply_inverse`, and whether they came to the goal."""
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
        """Return ``H_KK x``, (s,) float64."""
        return self._back(self._image(x)) + self.channels.product(x) + self.damping * x

    def _image(self, x: Tensor) -> Tensor:
        """Return ``R_K x``, (m,) float64."""
        scattered = x.new_zeros(self.hessian.n)
        scattered[self.kept] = x
        return image(self.rows, scattered)

    def _back(self, y: Tensor) -> Tensor:
        """Return ``R_K^T y``, (s,) float64."""
        return adjoint_image(self.rows, y)[self.kept]

    def _by_channel(self, right: Tensor) -> Tensor:
        """Return ``D^-1 right``."""
        pieces = torch.split(right, [len(part.kept) for part in self.parts])
        return torch.cat([solved(part.factor, piece) for piece, part in zip(pieces, self.parts, strict=True)])


def _groups(parts: list[_Factored]) -> Iterator[list[_Factored]]:
    """Return neighbouring channels with at most `GROUP` kept weights together (or one channel alone)."""
    group: list[_Factored] = []
    size = 0
    for part in parts:
        if group and size + len(part.kept) > GROUP:
            yield group
            group, size = [], 0
        group.append(part)
        size += len(part.kept)
    if group:
        yield group
