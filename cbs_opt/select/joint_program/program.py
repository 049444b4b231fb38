"""The joint program of one block in the space of its rows: every figure of a kept set in O(m^2) memory.

With ``a = w - g / damping``, ``M = damping I + R_K R_K^T`` and ``y = M^-1 (R w - R_K a_K)`` the best new
weights of a kept set K are ``u_K = h_K`` with ``h = a + R^T y``, and the residual of the pruned weights is
``damping h_P``: one vector `h`, the *level*, ranks both. With ``q_i = r_i^T M^-1 r_i``, the *leverage*,

    dropping i in K costs        1/2 cost_i,  cost_i = damping h_i^2 / (1 - q_i)
    adding j in P alone gains    1/2 gain_j,  gain_j = damping h_j^2 / (1 + q_j)

since ``[H_KK^-1]_ii = (1 - q_i) / damping`` and the Schur complement of j is ``damping (1 + q_j)``
(Woodbury). Nothing of size n^2 or s^2 is formed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from cbs_opt.hessian import products
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.rows import RowsHessian
from formulations.support import NofM


class Evaluated(Protocol):
    """A kept set (n,) with its objective; its program adds what it needs to know of it."""

    @property
    def keep(self) -> Tensor:
        """True where the weight stays, (n,)."""
        ...

    @property
    def value(self) -> float:
        """The objective."""
        ...


Kept = TypeVar("Kept", bound=Evaluated)


class Program(ABC, Generic[Kept]):
    """The joint program of a block, as the searches see it.

    `support` is what exchanges keep to, None where they keep to the count. `offset` is taken off at the end
    of an evaluation, which then has its rounding. `made` is when making the program began and ended, by
    `time.monotonic`, where that took an eigendecomposition.
    """

    block: FisherBlock
    anchor: Tensor
    offset: float
    support: NofM | None = None
    made: tuple[float, float] | None = None

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.block.n

    @abstractmethod
    def at(self, keep: Tensor) -> Kept:
        """Return a kept set, evaluated from scratch."""

    @abstractmethod
    def exchanged(self, kept: Kept, leaving: Tensor, entering: Tensor) -> Kept:
        """Return the kept set after an exchange of indices, evaluated."""

    def dropped(self, kept: Kept, leaving: Tensor) -> Kept:
        """Return what is left of a kept set, exact enough to rank its weights by what they cost."""
        return self.exchanged(kept, leaving, leaving[:0])

    @abstractmethod
    def costs(self, kept: Kept, precision: torch.dtype | None = None) -> Tensor:
        """Return ``cost_i``, twice what dropping each kept weight costs, (s,) float64.

        What it needs of the inverse is in the precision of the rows, or another where that is a choice.
        """

    def cheapest(self, kept: Kept, number: int) -> Tensor:
        """Return the kept weights that cost least, cheapest first, (number,) int64."""
        return kept.keep.nonzero().squeeze(1)[self.costs(kept).argsort(stable=True)[:number]]

    def state(self, kept: Kept) -> dict[str, Tensor]:
        """Return a kept set as a journal keeps it, for `restored`."""
        return {"keep": kept.keep}

    def restored(self, state: Mapping[str, Tensor]) -> Kept:
        """Return the kept set of which `state` was made, to the same bits."""
        return self.at(state["keep"])

    def saliency(self) -> Tensor:
        """Return what removing each weight alone costs, (n,) float64."""
        everything = torch.ones(self.n, dtype=torch.bool, device=self.anchor.device)
        return 0.5 * self.costs(self.at(everything), torch.float64)


def exchange(keep: Tensor, leaving: Tensor, entering: Tensor) -> Tensor:
    """Return a copy of a kept set after an exchange of indices."""
    keep = keep.clone()
    keep[leaving] = False
    keep[entering] = True
    return keep


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptSet:
    """A kept set (n,), its objective and the small system that describes it, float64.

    `gram` (m, m) is ``R_K R_K^T``, `target` (m,) ``R w - R_K a_K``, `factor` (m, m) the lower Cholesky factor
    of ``M`` and `dual` (m,) ``y = M^-1 target``.
    """

    keep: Tensor
    value: float
    gram: Tensor
    target: Tensor
    factor: Tensor
    dual: Tensor


class JointProgram(Program[KeptSet]):
    """The joint program of one block, prepared for many evaluations.

    See `PlainHessian.row_form` for how a dense Hessian, and more rows than weights, become rows. These stay
    in their precision; what is computed from them is accumulated in float64.
    Raises `NotPositiveDefiniteError` if ``H`` is singular.
    """

    def __init__(self, block: FisherBlock, support: NofM | None = None) -> None:
        self.support = support
        plain = block.hessian.plain("this search of the joint program")
        began = time.monotonic()
        self.rows, self.damping = plain.row_form(block.damping, block.name)
        if self.rows is not plain.data:
            self.made = began, time.monotonic()
        self.block = replace(block, hessian=RowsHessian(self.rows), damping=self.damping)
        weights, slope = block.weights.double(), block.slope
        self.anchor = weights - slope / self.damping
        self.pull = products.image(self.rows, weights)
        self.offset = 0.5 * float(slope @ slope) / self.damping

    def at(self, keep: Tensor) -> KeptSet:
        """Return a kept set, evaluated from scratch; O(m^2 s + m^3)."""
        index = keep.nonzero().squeeze(1)
        target = self.pull - self._image_of(index)
        return self._solved(keep, products.inner_gram(self.rows, index), target)

    def exchanged(self, kept: KeptSet, leaving: Tensor, entering: Tensor) -> KeptSet:
        """Return the kept set after an exchange of indices; O(m^2 (changes + m))."""
        gram = kept.gram + products.inner_gram(self.rows, entering) - products.inner_gram(self.rows, leaving)
        target = kept.target - self._image_of(entering) + self._image_of(leaving)
        return self._solved(exchange(kept.keep, leaving, entering), gram, target)

    def state(self, kept: KeptSet) -> dict[str, Tensor]:
        """Return the set with the sums that exchanges brought to it, which have a rounding of their own."""
        return {"keep": kept.keep, "gram": kept.gram, "target": kept.target}

    def restored(self, state: Mapping[str, Tensor]) -> KeptSet:
        """Return the kept set of which `state` was made, to the same bits; O(m^3)."""
        return self._solved(state["keep"], state["gram"], state["target"])

    def levels(self, kept: KeptSet) -> Tensor:
        """Return ``h = a + R^T y``, (n,) float64: new weights on K, residual over damping on P; O(m n)."""
        return self.anchor + products.adjoint_image(self.rows, kept.dual)

    def leverages(
        self, kept: KeptSet, precision: torch.dtype = torch.float64, index: Tensor | None = None
    ) -> Tensor:
        """Return ``q_i = r_i^T M^-1 r_i`` of the weights `index` (all by default), float64.

        Computed in `precision`; O(m^2) a weight.
        """
        inverse = products.inverse_of_factor(kept.factor, precision)
        count = self.n if index is None else len(index)
        leverages = torch.empty(count, dtype=torch.float64, device=inverse.device)
        for span, columns in products.column_pieces(self.rows, index, precision):
            leverages[span] = (inverse @ columns).square_().sum(dim=0)
        return leverages

    def moved_leverages(self, leverages: Tensor, before: KeptSet, after: KeptSet) -> Tensor:
        """Return `leverages` of `before` brought to `after` in the precision of the rows.

        A change of b columns moves ``M^-1`` by rank b (Woodbury): O(m n b), worth it while b < m.
        """
        changed = (before.keep != after.keep).nonzero().squeeze(1)
        columns = self.rows.index_select(1, changed).double()
        solved = torch.cholesky_solve(columns, before.factor)
        sign = torch.where(after.keep[changed], 1.0, -1.0).double()
        core = torch.diag(sign) + columns.T @ solved
        inverse, solved = torch.linalg.inv(core).to(self.rows.dtype), solved.T.to(self.rows.dtype)
        moved = leverages.clone()
        for span, piece in products.column_pieces(self.rows, dtype=self.rows.dtype):
            product = solved @ piece
            moved[span] -= (product * (inverse @ product)).sum(dim=0)
        return moved.clamp_min_(0.0)

    def costs(self, kept: KeptSet, precision: torch.dtype | None = None) -> Tensor:
        index = kept.keep.nonzero().squeeze(1)
        precision = precision or self.rows.dtype
        slack = (1.0 - self.leverages(kept, precision, index)).clamp_min(torch.finfo(precision).eps)
        return self.damping * self.levels(kept)[index].square() / slack

    def _image_of(self, index: Tensor) -> Tensor:
        """Return ``R_I a_I``, (m,) float64."""
        total = torch.zeros_like(self.pull)
        for span, columns in products.column_pieces(self.rows, index):
            total += columns @ self.anchor[index[span]]
        return total

    def _solved(self, keep: Tensor, gram: Tensor, target: Tensor) -> KeptSet:
        factor = products.factorise(products.damped(gram, self.damping), self.block.name, self.damping)
        dual = products.solved(factor, target)
        removed = torch.where(keep, 0.0, self.anchor)
        value = 0.5 * self.damping * float(dual @ target + removed @ removed) - self.offset
        return KeptSet(keep=keep, gram=gram, target=target, factor=factor, dual=dual, value=value)
