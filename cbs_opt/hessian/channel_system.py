"""Solves with ``H = R^T R + C + damping I``, C block-diagonal over channels, restricted to kept weights.

With ``D = C_KK + damping I``, factored channel by channel, and the m x m matrix ``M = I + R_K D^-1 R_K^T``,

    H_KK^-1 = D^-1 - D^-1 R_K^T M^-1 R_K D^-1          (Woodbury)

so that nothing larger than a channel or than m x m is factored. ``M`` may be formed in single precision:
then this inverse is only nearly that of H_KK, and conjugate gradients with it as the preconditioner bring
the solution to double precision in a few steps.

Where weights Q leave the kept ones, ``E = D^-1`` and ``Z = D^-1 R^T`` lose ``E_KQ E_QQ^-1`` times ``E_QK``
and ``Z_Q``, channel by channel, and M loses ``Z_Q^T E_QQ^-1 Z_Q``: rank q instead of rank s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.dense import DenseHessian
from cbs_opt.hessian.operators import Factor, Hessian, PlainHessian
from cbs_opt.hessian.products import adjoint_image, damped, factorise, image, solved
from formulations.errors import ShapeError, UnsupportedProblemError
from formulations.problem import SPLIT_LARGEST

DENSE_LIMIT = 4_096
"""Largest block whose whole Hessian is formed because of its term over channels."""
GROUP = 2_048
"""Columns of neighbouring channels that one product takes at once."""
MANY = 3
"""A system is made anew where more than one in so many of its weights leave."""
SINGLE_LIMIT = 1e5
"""Largest diagonal entry of M that single precision is trusted with."""
CONDITION_LIMIT = 1e5
"""Largest condition of D, by a bound, that single precision is trusted with."""
SINGLE_RANGE = (1e-25, 1e25)
"""Dampings whose inverses, and those of matrices so conditioned, single precision can hold."""
BAND = 256
"""Lines of a triangle that one product takes at once."""
RESIDUAL = 1e-11
"""Residual in the norm of H^-1, relative to the right-hand side, at which refinement ends."""
REFINEMENTS = 50


class _Part(NamedTuple):
    """The kept weights of one channel, the inverse of their block of D, and that times their rows, (k, m)."""

    kept: Tensor
    inverse: Tensor
    spread: Tensor


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

    def parts(self) -> tuple[PlainHessian, ChannelTerm] | None:
        return (self.base, self.channels) if self.n > SPLIT_LARGEST and self.base.by_rows else None

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
    taken in `precision`, and so are the inverses of the channels where D is well enough conditioned.
    Solutions are in float64 whatever it is; the diagonal of the inverse is not.
    Raises `NotPositiveDefiniteError` if ``C_KK + damping I`` is singular.
    O(m^2 s + sum of m k^2 over channels of k kept weights); memory beyond the block
    O(m^2 + m s + sum of k^2).
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
        self.parts = self._inverted()
        self.seen = self._seen()
        if precision != torch.float64 and max(self.seen.diagonal().tolist(), default=0.0) >= SINGLE_LIMIT:
            self._go_double()
        self.inner = self._factorise(damped(self.seen, 1.0))

    def without(self, leaving: Tensor) -> ChannelSystem:
        """Return the system of the kept weights but for indices `leaving` (q,), in increasing order.

        O(m^2 q + sum of m k q over channels) where few leave; made anew where many do, or where H_KK is
        formed.
        """
        member = self.member.clone()
        member[leaving] = False
        kept = self.kept[member[self.kept]]
        few = len(leaving) * MANY <= len(self.kept) and len(kept) > self.hessian.base.rank
        if self.whole is not None or not few:
            return ChannelSystem(self.hessian, kept, self.damping, self.name, self.precision)
        system = copy(self)
        system.kept, system.member = kept, member
        system.channels = self.hessian.channels.restricted(member)
        system.seen = self.seen.clone()
        parts, lost = [], []
        for part in self.parts:
            stays = member[part.kept]
            if not bool(stays.all()):
                part, gone = self._less(part, stays)
                lost.append(gone)
            if len(part.kept):
                parts.append(part)
        for group in _groups(lost):
            gone = torch.cat(group)
            _add_lower(system.seen, gone.T, gone, -1.0)
        system.parts = parts
        system.inner = self._factorise(damped(system.seen, 1.0))
        return system

    def _less(self, part: _Part, stays: Tensor) -> tuple[_Part, Tensor]:
        """Return a channel without the weights where `stays` is False, and G, where M loses ``G^T G``."""
        inside, outside = stays.nonzero().squeeze(1), (~stays).nonzero().squeeze(1)
        across = part.inverse.index_select(0, outside)
        factor = self._factorise(across.index_select(1, outside))
        across = torch.linalg.solve_triangular(factor, across.index_select(1, inside), upper=False)
        gone = part.spread.index_select(0, outside)
        gone = torch.linalg.solve_triangular(factor.to(self.precision), gone, upper=False)
        inverse = part.inverse.index_select(0, inside).index_select(1, inside)
        inverse.addmm_(across.T, across, alpha=-1)
        spread = part.spread.index_select(0, inside).addmm_(across.T.to(self.precision), gone, alpha=-1)
        return _Part(part.kept[inside], inverse, spread), gone

    def _factorise(self, matrix: Tensor) -> Tensor:
        return factorise(matrix, self.name, self.damping)

    def _inverted(self) -> list[_Part]:
        """Return the inverses of D, in one piece of memory: between temporaries they would leave holes."""
        channels = self.channels.channels
        squares = [(channel.stop - channel.start) ** 2 for channel in channels]
        held = SINGLE_RANGE[0] < self.damping < SINGLE_RANGE[1]
        single = held and self.channels.norm_bound() <= CONDITION_LIMIT * self.damping
        dtype = self.precision if single else torch.float64
        storage = torch.empty(sum(squares), dtype=dtype, device=self.kept.device)
        shape = len(self.kept), self.rows.shape[0]
        spreads = torch.empty(shape, dtype=self.precision, device=self.kept.device)
        parts = []
        for channel, piece in zip(channels, torch.split(storage, squares), strict=True):
            matrix = damped(channel.matrix(), self.damping).to(dtype)
            inverse = torch.cholesky_inverse(self._factorise(matrix), out=piece.view_as(matrix))
            span = slice(channel.start, channel.stop)
            part = _Part(self.kept[span], inverse, spreads[span])
            self._spread(part)
            parts.append(part)
        return parts

    def _spread(self, part: _Part) -> None:
        columns = self.rows.index_select(1, part.kept).to(self.precision)
        torch.mm(part.inverse.to(self.precision), columns.T, out=part.spread)

    def _seen(self) -> Tensor:
        """Return ``R_K D^-1 R_K^T`` accumulated in float64 over groups of channels: see `_add_lower`."""
        m = self.rows.shape[0]
        seen = torch.zeros(m, m, dtype=torch.float64, device=self.kept.device)
        first = 0
        for group in _groups([part.spread for part in self.parts]):
            spread = torch.cat(group)
            columns = self.rows.index_select(1, self.kept[first : first + len(spread)]).to(self.precision)
            _add_lower(seen, columns, spread, 1.0)
            first += len(spread)
        return seen

    def _go_double(self) -> None:
        """Make inverses and M anew in double precision."""
        self.precision = torch.float64
        self.parts = self._inverted()
        self.seen = self._seen()

    def solve(self, right: Tensor, removed: Tensor | None = None) -> Tensor:
        """See `Factor`."""
        if removed is not None:
            right = right + self.hessian.channels.product(removed)[self.kept]
            right = right + self.hessian.base.cross(self.kept, removed)
        if self.whole is not None:
            return solved(self.whole, right)
        solution, settled = self._refined(right)
        if not settled and self.precision != torch.float64:
            self._go_double()
            self.inner = self._factorise(damped(self.seen, 1.0))
            solution, _ = self._refined(right)
        return solution

    def nearly_solve(self, right: Tensor) -> Tensor:
        """Return ``H_KK^-1 right``, (s,) float64, as far as the precision of the system goes; O(m s)."""
        return self._apply_inverse(right) if self.whole is None else solved(self.whole, right)

    def alone(self) -> Tensor:
        """Return ``diag(D^-1)``, (s,) float64, nowhere below `inverse_diagonal`; where H_KK is not formed."""
        return torch.cat([part.inverse.diagonal().double() for part in self.parts])

    def inverse_diagonal(self, places: Tensor | None = None) -> Tensor:
        """Return ``diag(H_KK^-1)``, (s,) float64 in the precision of the system; O(m^2 s).

        Of the kept weights at `places` (p,), in increasing order, if any are given: O(m^2 p).
        """
        if self.whole is not None:
            diagonal: Tensor = torch.cholesky_inverse(self.whole).diagonal()
            return diagonal if places is None else diagonal[places]
        alone = self.alone()
        spreads = [part.spread for part in self.parts]
        if places is not None:
            alone = alone[places]
            sizes = [len(part.kept) for part in self.parts]
            ends = torch.tensor(sizes, device=places.device).cumsum(0)
            counts = torch.searchsorted(places, ends).diff(prepend=ends.new_zeros(1))
            starts = (ends - torch.tensor(sizes, device=places.device)).tolist()
            chosen = torch.split(places, counts.tolist())
            spreads = [
                spread.index_select(0, within - start)
                for spread, within, start in zip(spreads, chosen, starts, strict=True)
                if len(within)
            ]
        seen = self._seen_lengths(spreads)
        return (alone - seen).maximum(torch.finfo(self.precision).eps * alone)

    def _seen_lengths(self, vectors: list[Tensor]) -> Tensor:
        """Return ``v.M^-1 v`` for the lines v of all `vectors`, each (k, m), in float64; O(m^2) a line."""
        factor = self.inner.to(self.precision)
        lengths = [self.inner.new_zeros(0)]
        for group in _groups(vectors):
            halves = torch.linalg.solve_triangular(factor, torch.cat(group).T, upper=False)
            lengths.append(halves.square_().sum(dim=0).double())
        return torch.cat(lengths)

    def schur_diagonal(self) -> Tensor:
        """Return ``diag(H_PP - H_PK H_KK^-1 H_KP)`` of the weights P that are not kept, (n - s,) float64.

        In the precision of the system; O(m^2 (n - s) + sum of m k p over channels of k kept weights and
        p others).
        """
        if self.whole is not None:
            return self._dense_schur_diagonal(self.whole)
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
                diagonal = diagonal - (cross * (inside.inverse @ cross.to(inside.inverse))).sum(dim=0)
                diagonal = diagonal.clamp_min(self.damping)
                outer = outer - cross.to(self.precision).T @ inside.spread
            diagonals.append(diagonal + self._seen_lengths([outer]))
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

    def _apply_inverse(self, right: Tensor) -> Tensor:
        """Return ``H_KK^-1 right`` as far as the precision goes, by a fixed positive matrix."""
        scale = float(right.abs().max()) or 1.0  # single precision has fewer exponents
        pieces = torch.split(right / scale, [len(part.kept) for part in self.parts])
        parts = list(zip(self.parts, pieces, strict=True))
        seen = right.new_zeros(len(self.inner))
        for part, piece in parts:
            seen += part.spread.T @ piece.to(self.precision)
        inner = solved(self.inner, seen).to(self.precision)
        solution = torch.cat(
            [part.inverse @ piece.to(part.inverse) - part.spread @ inner for part, piece in parts]
        )
        return scale * solution.to(right)

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


def _add_lower(total: Tensor, left: Tensor, right: Tensor, sign: float) -> None:
    """Add ``sign left right`` to `total` (m, m), of which no more than the lower triangle is right.

    By bands, each as long as it has entries of that triangle: little more than half of the whole product.
    """
    for start in range(0, len(total), BAND):
        end = start + BAND
        total[start:end, :end].add_(left[start:end] @ right[:, :end], alpha=sign)


def _groups(pieces: list[Tensor]) -> Iterator[list[Tensor]]:
    """Return neighbouring pieces of at most `GROUP` lines together (or one piece alone)."""
    group: list[Tensor] = []
    size = 0
    for piece in pieces:
        if group and size + len(piece) > GROUP:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece)
    if group:
        yield group
