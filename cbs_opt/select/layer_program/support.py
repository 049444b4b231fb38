"""What the rows of a layer may keep: a number of inputs each or together, or n of every m consecutive ones.

A support cuts the inputs into groups of one size and keeps a number in each; a count is the case of a single
group. All functions take every row at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from cbs_opt.system.checks import finite_number, one_of
from formulations.errors import ArgumentError, ShapeError, UnsupportedProblemError
from formulations.support import Count, NofM, Support, n_of_m

Swaps = tuple[Tensor, Tensor, Tensor]
"""Rows, leaving and entering inputs of a number of swaps, (swaps,) int64 each."""


class LayerSupport(ABC):
    """What every row of a layer may keep: `formulations.support`, for all rows at once in torch.

    Kept masks are closed under swaps within groups of consecutive inputs.
    """

    @abstractmethod
    def group(self, inputs: int) -> int:
        """Return the number of inputs in a group."""

    @abstractmethod
    def counts(self, rows: int, inputs: int) -> Tensor:
        """Return how many weights each row keeps of every group, (rows,) int64."""

    @abstractmethod
    def take(self, rows: Tensor) -> LayerSupport:
        """Return the support of some rows."""

    def total(self, rows: int, inputs: int) -> int:
        """Return how many weights all rows keep together."""
        return int(self.counts(rows, inputs).sum()) * (inputs // self.group(inputs))

    def settled(self, keep: Tensor) -> LayerSupport:
        """Return the support of sets that were found (r, n), in which every row has a count of its own."""
        return self

    def of_row(self, kept: int) -> Support:
        """Return what one row may keep that keeps so many, as the programs of `formulations` take it."""
        return Count(kept)

    def best(self, scores: Tensor) -> Tensor:
        """Return the kept masks of the largest sum of scores (r, n), bool. O(r n log n)."""
        rows, inputs = scores.shape
        size = self.group(inputs)
        counts = self.counts(rows, inputs).to(scores.device)
        if size == inputs and rows and scores.device.type == "cpu" and bool((counts == counts[0]).all()):
            return _largest(scores, int(counts[0]))
        return _first(scores.reshape(rows, -1, size), counts).view(rows, inputs)

    def droppable(self, keep: Tensor) -> Tensor:
        """Return which kept weights may go while their group still holds more than it has to, (r, n) bool."""
        rows, inputs = keep.shape
        grouped = keep.view(rows, -1, self.group(inputs))
        counts = self.counts(rows, inputs).to(keep.device)
        more = grouped.sum(-1, keepdim=True) > counts.view(-1, 1, 1)
        return (grouped & more).view(rows, inputs)

    def exchanges(self, costs: Tensor, gains: Tensor, limits: Tensor) -> Swaps:
        """Return up to `limits` (r,) swaps a row that no two of share an input, best first.

        `costs` (r, n) is what each kept weight costs if it leaves, infinite where pruned; `gains` what each
        pruned weight brings if it enters, -infinity where kept. Only pairs that gain more than they cost are
        taken. O(r n log n).
        """
        rows, inputs = costs.shape
        size = self.group(inputs)
        pairs = min(size // 2, int(limits.max())) if rows else 0
        cheap = costs.view(rows, -1, size).topk(pairs, dim=-1, largest=False)
        dear = gains.view(rows, -1, size).topk(pairs, dim=-1)
        profit = (dear.values - cheap.values).view(rows, -1)
        first = torch.arange(0, inputs, size, device=costs.device).view(-1, 1)
        leaving, entering = ((found.indices + first).view(rows, -1) for found in (cheap, dear))
        order = profit.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1]).to(order).expand_as(order)
        )
        row, pair = ((profit > 0.0) & (rank < limits.view(-1, 1))).nonzero(as_tuple=True)
        return row, leaving[row, pair], entering[row, pair]


def _one_by_one() -> UnsupportedProblemError:
    found = "a method that goes row by row, on rows without counts of their own"
    return UnsupportedProblemError("support", found, 'choose another method, or budget="rows"')


def _first(grouped: Tensor, counts: Tensor) -> Tensor:
    """Return where the largest counts (r,) of scores (r, groups, size) are, by sorting."""
    most = int(counts.max()) if len(counts) else 0
    index = grouped.topk(most, dim=-1).indices
    taken = torch.arange(most, device=grouped.device) < counts.view(-1, 1, 1)
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, index, taken.expand_as(index))


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return where the largest `count` of every row (r, n) are: by a threshold, several times as fast."""
    if not 0 < count < scores.shape[1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    place = scores.shape[1] - count
    least = torch.from_numpy(np.partition(scores.numpy(), place, axis=1)[:, place])
    keep = scores >= least.unsqueeze(1)
    tied = keep.sum(1) != count
    if bool(tied.any()):
        keep[tied] = _first(scores[tied].unsqueeze(1), torch.full((int(tied.sum()),), count)).squeeze(1)
    return keep


@dataclass(frozen=True, eq=False)
class RowCounts(LayerSupport):
    """Every row keeps `n_keep` inputs, or a number of its own where that is a tensor (r,) int64."""

    n_keep: int | Tensor

    def group(self, inputs: int) -> int:
        return inputs

    def counts(self, rows: int, inputs: int) -> Tensor:
        counts = torch.as_tensor(self.n_keep).expand(rows)
        if bool(((counts < 0) | (counts > inputs)).any()):
            found = f"{int(counts.min())} to {int(counts.max())} of {inputs} inputs"
            raise ArgumentError("n_keep", found, f"keep 0 to {inputs} inputs of every row")
        return counts

    def take(self, rows: Tensor) -> RowCounts:
        if not isinstance(self.n_keep, Tensor) or not self.n_keep.ndim:
            return self
        return RowCounts(self.n_keep[rows.to(self.n_keep.device)])


@dataclass(frozen=True)
class LayerCount(LayerSupport):
    """All rows together keep `n_keep` weights: one multiplier decides how many each has.

    Sets are chosen over the whole layer; once they are, every row has the count that it was given.
    """

    n_keep: int

    def group(self, inputs: int) -> int:
        return inputs

    def counts(self, rows: int, inputs: int) -> Tensor:
        raise _one_by_one()

    def take(self, rows: Tensor) -> LayerSupport:
        raise _one_by_one()

    def total(self, rows: int, inputs: int) -> int:
        if not 0 <= self.n_keep <= rows * inputs:
            found = f"{self.n_keep} of {rows} x {inputs} weights"
            raise ArgumentError("n_keep", found, f"keep 0 to {rows * inputs} weights")
        return self.n_keep

    def settled(self, keep: Tensor) -> RowCounts:
        return RowCounts(keep.sum(1))

    def best(self, scores: Tensor) -> Tensor:
        count = self.total(*scores.shape)
        flat = scores.reshape(1, -1)
        return RowCounts(count).best(flat).view(scores.shape)


@dataclass(frozen=True)
class RowPattern(LayerSupport):
    """Every row keeps n of each m consecutive inputs, as a `NofM` says."""

    pattern: NofM

    def group(self, inputs: int) -> int:
        m = self.pattern.m
        if inputs % m:
            found = f"{self.pattern} on {inputs} inputs, which {m} does not divide"
            raise ShapeError("sparsity", found, f"leave this layer out, or use an m that divides {inputs}")
        return m

    def counts(self, rows: int, inputs: int) -> Tensor:
        return torch.full((rows,), self.pattern.n)

    def take(self, rows: Tensor) -> RowPattern:
        return self

    def of_row(self, kept: int) -> NofM:
        return self.pattern


Sparsity = float | str
"""A share of zeros in [0, 1), the same in every row; or "n:m", which keeps n of m consecutive inputs."""


def checked_sparsity(sparsity: Sparsity) -> Sparsity:
    """Return a sparsity as a float in [0, 1) or as "n:m", else raise `ArgumentError`."""
    if isinstance(sparsity, str):
        pattern = n_of_m(sparsity)
        if pattern is None:
            remedy = 'pass a number in [0, 1), or "n:m" with 1 <= n <= m, such as "2:4"'
            raise ArgumentError("sparsity", f"{sparsity!r}", remedy)
        return str(pattern)
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool) or not 0.0 <= sparsity < 1.0:
        raise ArgumentError("sparsity", f"{sparsity!r}", 'pass a number in [0, 1), or "n:m", such as "2:4"')
    return finite_number("sparsity", sparsity)


BUDGETS = ("rows", "layer")
"""Whether every row of a layer has as many zeros, or all rows together."""


def support_of(sparsity: Sparsity, shape: tuple[int, int], budget: str = "rows") -> LayerSupport:
    """Return what a layer of a shape (rows, inputs) keeps at a sparsity.

    n:m; or ``inputs - round(sparsity inputs)`` of every row; or as many on average, by the budget "layer".
    Raises `ArgumentError` for n:m with that budget: a pattern leaves no choice between rows.
    """
    rows, inputs = shape
    one_of("budget", budget, BUDGETS)
    sparsity = checked_sparsity(sparsity)
    stated = n_of_m(sparsity) if isinstance(sparsity, str) else None
    if stated is not None:
        if budget != "rows":
            raise ArgumentError(
                "budget", f"{budget!r} with {sparsity}", 'use "rows": every row has the pattern'
            )
        pattern = RowPattern(stated)
        pattern.group(inputs)
        return pattern
    kept = inputs - round(float(sparsity) * inputs)
    return LayerCount(rows * kept) if budget == "layer" else RowCounts(kept)
