"""What may be kept: any so many weights, n of every m, or whole groups.

A support names the kept sets that a block allows. All three are one structure: weights make up *units* that
are kept or pruned whole (a weight by itself, or a group), and units lie in *cells*, in each of which an exact
number is kept (one cell for a count and for groups, one for every m weights in n:m). Rounding, the bound of
a linear function, membership, exchanges and the number of sets follow from that alone.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from formulations.errors import ArgumentError, ShapeError, UnsupportedProblemError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

COUNT, N_OF_M, GROUPS = "count", "n_of_m", "groups"
KINDS = (COUNT, N_OF_M, GROUPS)
"""Kinds of support, as files name them."""


class Cells(NamedTuple):
    """Ranges of units in each of which an exact number is chosen.

    Attributes
    ----------
    start : (c + 1,) int64 array
        Cell ``c`` holds the units ``start[c]`` to ``start[c + 1] - 1``.
    quota : (c,) int64 array
        How many of them are chosen.
    """

    start: IntArray
    quota: IntArray


Size = int | Cells
"""How many are chosen: of all, or in each cell."""


class Support(ABC):
    """The sets of weights that may be kept. See `Count`, `NofM` and `Groups`."""

    kind: ClassVar[str]

    @abstractmethod
    def check(self, n: int) -> None:
        """Raise `ArgumentError` if the support does not fit `n` weights."""

    @abstractmethod
    def kept(self, n: int) -> Size:
        """Return how many units are kept, as kernels take it: a number, or one for each cell."""

    @abstractmethod
    def pruned(self, n: int) -> Size:
        """Return how many units are pruned, in the same form."""

    @abstractmethod
    def n_keep_of(self, n: int) -> int:
        """Return how many of `n` weights are kept; the most of them where sets differ in size."""

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """Return the support as a JSON object, which `support_from_json` reads."""

    @property
    def unit(self) -> IntArray | None:
        """Unit of each weight, (n,) int64; None where each weight is one by itself."""
        return None

    def n_units(self, n: int) -> int:
        """Return the number of units of `n` weights."""
        return n

    def folded(self, values: FloatArray) -> FloatArray:
        """Return the sum of `values`, (n,), over each unit."""
        if self.unit is None:
            return values
        sums = np.bincount(self.unit, weights=values, minlength=self.n_units(values.size))
        return sums.astype(np.float64, copy=False)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return for each weight the entry of its unit; the adjoint of `folded`."""
        return values if self.unit is None else values[self.unit]

    def mean(self, values: FloatArray) -> FloatArray:
        """Return the mean of `values`, (n,), over each unit."""
        return values if self.unit is None else self.folded(values) / self.folded(np.ones(values.size))

    def folded_matrix(self, matrix: FloatArray) -> FloatArray:
        """Return the sums of `matrix`, (n, n), over the weights of either unit, (u, u)."""
        if self.unit is None:
            return matrix
        member = np.zeros((self.n_units(self.unit.size), self.unit.size))
        member[self.unit, np.arange(self.unit.size)] = 1.0
        return np.ascontiguousarray(member @ matrix @ member.T)

    def unit_keep(self, keep: BoolArray) -> BoolArray:
        """Return which units a kept set keeps, (u,): those of which it keeps a weight."""
        if self.unit is None:
            return keep
        units = np.zeros(self.n_units(keep.size), dtype=np.bool_)
        units[self.unit[keep]] = True
        return units

    def cell_starts(self, n: int) -> IntArray:
        """Return where the cells of units begin, and the number of units, (c + 1,) int64."""
        size = self.kept(n)
        return np.array([0, self.n_units(n)]) if isinstance(size, int) else size.start

    def best(self, scores: FloatArray) -> BoolArray:
        """Return the kept set of largest total score; ties go to the first. O(n log n).

        Parameters
        ----------
        scores : (n,) float64 array

        Returns
        -------
        (n,) bool array
            True where kept.
        """
        self.check(scores.size)
        size, folded = self.kept(scores.size), self.folded(scores)
        return self.spread(largest_in(folded, size, np.ones(folded.size, dtype=np.bool_)))

    def largest_sum(self, values: FloatArray) -> float:
        """Return the largest sum of `values`, (n,), over a kept set: what bounds a linear function."""
        return float(values[self.best(values)].sum())

    def best_mean(self, scores: FloatArray) -> BoolArray:
        """Return the kept set of largest total score where a unit counts once, whatever its size."""
        return self.best(scores / self.spread(self.folded(np.ones(scores.size))))

    def most_pruned(self, n: int) -> int:
        """Return how many of `n` weights are pruned; the most of them where sets differ in size."""
        return n - int(-self.largest_sum(-np.ones(n)))

    def largest_pruned_sum(self, values: FloatArray) -> float:
        """Return the largest sum of `values`, (n,), over the weights that a set prunes."""
        return float(values[~self.best(-values)].sum())

    def equations(self, n: int, kept: bool) -> list[tuple[IntArray, FloatArray, float]]:
        """Return the rows that binaries of the weights obey, 1 where kept, or where pruned if not `kept`.

        Each row is the weights in it, their coefficients and the right-hand side: how many units of a cell
        are 1, and that the weights of a unit are equal.
        """
        size = as_cells(self.kept(n) if kept else self.pruned(n), self.n_units(n))
        unit = np.arange(n) if self.unit is None else self.unit
        _, first = np.unique(unit, return_index=True)
        rows = [
            (first[start:stop], np.ones(int(stop - start)), float(quota))
            for start, stop, quota in zip(size.start[:-1], size.start[1:], size.quota, strict=True)
        ]
        for i in np.flatnonzero(first[unit] != np.arange(n)) if n else ():
            rows.append((np.array([first[unit[i]], i]), np.array([-1.0, 1.0]), 0.0))
        return rows

    def contains(self, keep: BoolArray) -> bool:
        """Whether a kept set is one of these."""
        units, size = self.unit_keep(keep), self.kept(keep.size)
        if bool((self.spread(units) != keep).any()):
            return False
        return bool((chosen_in(units, size) == counts_of(size)).all())

    def n_sets(self, n: int) -> int:
        """Return the number of sets of `n` weights."""
        size = self.kept(n)
        if isinstance(size, int):
            return math.comb(self.n_units(n), size)
        pairs = zip(np.diff(size.start).tolist(), size.quota.tolist(), strict=True)
        return math.prod(math.comb(room, count) for room, count in pairs)

    def swaps(self, keep: BoolArray) -> Iterator[tuple[IntArray, IntArray]]:
        """Yield the exchanges of one kept for one pruned unit that stay inside: weights out, weights in."""
        n = keep.size
        units = np.arange(n) if self.unit is None else self.unit
        place = np.searchsorted(self.cell_starts(n), np.arange(self.n_units(n)), side="right")
        members = [np.flatnonzero(units == q) for q in range(self.n_units(n))]
        for leaves in members:
            for enters in members:
                inside = place[units[leaves[0]]] == place[units[enters[0]]]
                if inside and keep[leaves[0]] and not keep[enters[0]]:
                    yield leaves, enters


@dataclass(frozen=True)
class Count(Support):
    """Any `n_keep` weights.

    Parameters
    ----------
    n_keep : int
        At least 0.

    Raises
    ------
    ArgumentError
        If `n_keep` is no whole number from 0 on.
    """

    kind: ClassVar[str] = COUNT

    n_keep: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_keep", whole_number("n_keep", self.n_keep, 0))

    def __str__(self) -> str:
        return f"{self.n_keep} weights"

    def check(self, n: int) -> None:
        """Raise `ArgumentError` if the support does not fit `n` weights."""
        if self.n_keep > n:
            raise ArgumentError("support", f"keeps {self.n_keep} of {n} weights", f"choose one from 0 to {n}")

    def kept(self, n: int) -> int:
        """Return how many weights are kept."""
        return self.n_keep

    def pruned(self, n: int) -> int:
        """Return how many weights are pruned."""
        return n - self.n_keep

    def n_keep_of(self, n: int) -> int:
        """Return how many of `n` weights are kept."""
        return self.n_keep

    def as_json(self) -> dict[str, Any]:
        """Return the support as a JSON object."""
        return {"kind": self.kind, "n_keep": self.n_keep}


@dataclass(frozen=True)
class NofM(Support):
    """`n` kept of every `m` consecutive weights: "2:4" is ``NofM(2, 4)``.

    The weights are taken in the order of the block, `m` at a time from the first on. Their number must be a
    multiple of `m`: a remainder is refused, as no rule for it is common to all hardware.

    Parameters
    ----------
    n, m : int
        ``0 <= n <= m`` and ``m >= 1``.

    Raises
    ------
    ArgumentError
        If `n` or `m` is no whole number or out of range.
    """

    kind: ClassVar[str] = N_OF_M

    n: int
    m: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", whole_number("m", self.m, 1))
        object.__setattr__(self, "n", whole_number("n", self.n, 0))
        if self.n > self.m:
            raise ArgumentError("n", f"{self.n} kept of {self.m}", f"choose one from 0 to {self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check(self, n: int) -> None:
        """Raise `ArgumentError` if `m` does not divide `n`."""
        rest = n % self.m
        if rest:
            found = f"{self} of {n} weights leaves a remainder of {rest}"
            remedy = f"pass a multiple of {self.m} weights, such as {n - rest} or {n - rest + self.m}"
            raise ArgumentError("support", found, f"{remedy}, or leave the last {rest} out of the block")

    def kept(self, n: int) -> Cells:
        """Return `n` for each cell of `m` weights."""
        return self._cells(n, self.n)

    def pruned(self, n: int) -> Cells:
        """Return `m` less `n` for each cell of `m` weights."""
        return self._cells(n, self.m - self.n)

    def n_keep_of(self, n: int) -> int:
        """Return how many of `n` weights are kept."""
        return n // self.m * self.n

    def as_json(self) -> dict[str, Any]:
        """Return the support as a JSON object."""
        return {"kind": self.kind, "n": self.n, "m": self.m}

    def _cells(self, n: int, count: int) -> Cells:
        cells = n // self.m
        return Cells(np.arange(0, n + 1, self.m), np.full(cells, count, dtype=np.int64))


@dataclass(frozen=True)
class Groups(Support):
    """`n_keep` groups of weights, each kept or pruned whole.

    Parameters
    ----------
    groups : sequence of int
        The group of each weight, any whole numbers. Groups may be of unequal size; `n_keep` counts groups.
    n_keep : int
        From 0 to the number of groups.

    Raises
    ------
    ArgumentError
        If a label or `n_keep` is no whole number, or `n_keep` is out of range.
    """

    kind: ClassVar[str] = GROUPS

    groups: tuple[int, ...]
    n_keep: int

    def __init__(self, groups: Sequence[int] | np.ndarray, n_keep: int) -> None:
        labels = np.asarray(groups)
        if labels.ndim != 1:
            raise ShapeError("groups", f"{labels.ndim} dimensions", "pass one label for each weight")
        if labels.size and labels.dtype.kind not in "iu":
            raise ArgumentError("groups", f"labels of dtype {labels.dtype}", "pass whole numbers")
        # Names mean nothing: supports that part the weights alike are equal.
        _, unit = np.unique(labels, return_inverse=True)
        object.__setattr__(self, "groups", tuple(unit.reshape(-1).tolist()))
        n_groups = int(unit.max()) + 1 if unit.size else 0
        object.__setattr__(self, "n_keep", whole_number("n_keep", n_keep, 0))
        if self.n_keep > n_groups:
            raise ArgumentError(
                "n_keep", f"{n_keep} of {n_groups} groups", f"choose one from 0 to {n_groups}"
            )

    def __str__(self) -> str:
        return f"{self.n_keep} of {self.n_groups} groups"

    def __repr__(self) -> str:
        """Return counts in one line; the labels are left out."""
        return f"Groups({len(self.groups)} weights in {self.n_groups} groups, n_keep={self.n_keep})"

    @cached_property
    def unit(self) -> IntArray:
        """Group of each weight, (n,) int64, numbered from 0."""
        labels = np.array(self.groups, dtype=np.int64)
        labels.flags.writeable = False
        return labels

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return max(self.groups) + 1 if self.groups else 0

    def check(self, n: int) -> None:
        """Raise `ArgumentError` if there is not one label for each of `n` weights."""
        if len(self.groups) != n:
            raise ShapeError("support", f"labels of {len(self.groups)} weights for {n}", f"pass {n} labels")

    def n_units(self, n: int) -> int:
        """Return the number of groups."""
        return self.n_groups

    def kept(self, n: int) -> int:
        """Return how many groups are kept."""
        return self.n_keep

    def pruned(self, n: int) -> int:
        """Return how many groups are pruned."""
        return self.n_groups - self.n_keep

    def n_keep_of(self, n: int) -> int:
        """Return the most weights that a set keeps: those of the largest groups."""
        return int(np.sort(np.bincount(self.unit, minlength=0))[::-1][: self.n_keep].sum())

    def as_json(self) -> dict[str, Any]:
        """Return the support as a JSON object."""
        return {"kind": self.kind, "groups": list(self.groups), "n_keep": self.n_keep}


def n_of_m(text: str) -> NofM | None:
    """Return the support that "n:m" names, such as "2:4"; None unless 1 <= n <= m."""
    found = re.fullmatch(r"(\d+):(\d+)", text.replace(" ", ""))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        return None
    return NofM(int(found[1]), int(found[2]))


def support_from_json(entry: Mapping[str, Any]) -> Support:
    """Return the support that `Support.as_json` described.

    Raises
    ------
    ArgumentError
        If the entry describes none, naming the kinds that there are.
    """
    kind = entry.get("kind")
    try:
        if kind == COUNT:
            return Count(entry["n_keep"])
        if kind == N_OF_M:
            return NofM(entry["n"], entry["m"])
        if kind == GROUPS:
            return Groups(entry["groups"], entry["n_keep"])
    except KeyError as error:
        raise ArgumentError("support", f"{kind} without {error}", "write it with as_json") from None
    raise ArgumentError("support", f"kind {kind!r}", f"use one of: {', '.join(KINDS)}")


TAKEN: Mapping[str, tuple[str, ...]] = {
    "enumeration": KINDS,
    "greedy_obs": KINDS,
    "swap_search": KINDS,
    "lower_bound": KINDS,
    "branch_and_bound": KINDS,
    "outer_approximation": KINDS,
}
"""Kinds of support that each method of this package takes; what is not listed takes counts."""


def require_support(support: Support | None, method: str) -> None:
    """Refuse a support that `method` cannot take, naming the methods that can; None is a count.

    Raises
    ------
    UnsupportedProblemError
        If `TAKEN` does not have the kind of the support for the method.
    """
    if support is None or support.kind in TAKEN.get(method, (COUNT,)):
        return
    able = ", ".join(name for name, kinds in TAKEN.items() if support.kind in kinds)
    found = f"{support} ({support.kind}), which {method} does not take"
    raise UnsupportedProblemError("support", found, f"use one of: {able}")


def whole_number(name: str, value: Any, least: int) -> int:
    """Return a whole number of at least `least` as an int, else raise `ArgumentError`."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or value % 1 != 0 or value < least:
        raise ArgumentError(name, f"{value!r}", f"pass a whole number >= {least}")
    return int(value)


def kept_size(support: Support, n: int) -> Size | Groups:
    """Return what relaxations of the joint program take: how many units are kept, groups as they are."""
    return support if isinstance(support, Groups) else support.kept(n)


def pruned_size(support: Support, n: int) -> Size | Groups:
    """Return what relaxations of the selection program take: how many units go, groups as they are."""
    return support if isinstance(support, Groups) else support.pruned(n)


def counts_of(size: Size) -> IntArray:
    """Return how many units are chosen in each cell."""
    return np.array([size]) if isinstance(size, int) else size.quota


def chosen_in(chosen: BoolArray, size: Size) -> IntArray:
    """Return how many of the units chosen lie in each cell of `size`."""
    if isinstance(size, int):
        return np.array([int(chosen.sum())])
    running = np.concatenate(([0], np.cumsum(chosen, dtype=np.int64)))
    return np.asarray(running[size.start[1:]] - running[size.start[:-1]])


def largest_in(values: FloatArray, size: Size, free: BoolArray) -> BoolArray:
    """Return where the largest values of the free units are, so many in each cell; ties go to the first."""
    index = np.flatnonzero(free)
    chosen = np.zeros(values.size, dtype=np.bool_)
    if isinstance(size, int):
        chosen[index[np.argsort(-values[index], kind="stable")[:size]]] = True
        return chosen
    order, rank = ranked_in(values, size, free)
    cell = np.searchsorted(size.start, order, side="right") - 1
    chosen[order[rank < size.quota[cell]]] = True
    return chosen


def as_cells(size: Size, n_units: int) -> Cells:
    """Return a size as cells: one of all units where it is a number."""
    if isinstance(size, Cells):
        return size
    return Cells(np.array([0, n_units]), np.array([size]))


def ranked_in(values: FloatArray, size: Cells, free: BoolArray) -> tuple[IntArray, IntArray]:
    """Return the free units by cell and then by decreasing value, and the rank of each in its cell."""
    index = np.flatnonzero(free)
    cell = np.searchsorted(size.start, index, side="right") - 1
    place = np.lexsort((-values[index], cell))
    first = np.searchsorted(cell, cell)
    return index[place], np.arange(index.size) - first
