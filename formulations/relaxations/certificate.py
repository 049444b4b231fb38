"""What certificates of either relaxation share: the linearised bound, fixings, and their proof.

A point of a convex relaxation gives a linear underestimate: with ``chosen`` the kept weights (joint) or
the pruned ones (selection),

    value of a set >= base + (sum of cost_i over the chosen weights of the set).

The bound is the minimum over all sets of the support. Forcing one weight in or out exchanges two
costs; if that lifts the bound above the value of a known set, every set at least as good has the weight
the other way: it is *fixed*.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations.cells import size_left
from formulations.dense_forms import UNDERFLOW, error_factor
from formulations.problem import BlockProblem, BoolArray, FloatArray
from formulations.relaxations.certified import largest_sum
from formulations.solution import Subject
from formulations.support import Cells, Support, as_cells, largest_in, ranked_in


@dataclass(frozen=True, kw_only=True, eq=False)
class Fixing:
    """Weights that every set of value at most `cutoff` keeps, and such that every one prunes.

    Attributes
    ----------
    keep, prune : (n,) bool arrays
        True where fixed as kept, and as pruned.
    cutoff : float
        In units of the loss.
    """

    keep: BoolArray
    prune: BoolArray
    cutoff: float

    def __post_init__(self) -> None:
        for name in ("keep", "prune"):
            array = np.array(getattr(self, name), dtype=np.bool_)
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __repr__(self) -> str:
        """Return counts in one line; the arrays are left out."""
        kept, pruned = int(self.keep.sum()), int(self.prune.sum())
        return f"Fixing({kept} kept, {pruned} pruned of {self.keep.size}, cutoff={self.cutoff:.6g})"

    @property
    def free(self) -> BoolArray:
        """True where nothing is fixed, (n,)."""
        return ~(self.keep | self.prune)

    @property
    def count(self) -> int:
        """Number of fixed weights."""
        return int(self.keep.sum() + self.prune.sum())

    @staticmethod
    def by_count(problem: BlockProblem) -> Fixing:
        """Return what holds for every set of the right size: no weight fixed, or all if all or none stay."""
        keep = np.full(problem.n, problem.n_prune == 0)
        prune = np.full(problem.n, problem.n_keep == 0)
        return Fixing(keep=keep & ~prune, prune=prune, cutoff=math.inf)


@dataclass(frozen=True, kw_only=True)
class Linearisation:
    """``value >= base + sum of cost over the chosen``, each figure computed in float64.

    Attributes
    ----------
    base : float
    lost : float
        Bound on the rounding error of `base`.
    cost, error : (n,) arrays
        Costs and bounds on their absolute rounding errors.
    """

    base: float
    lost: float
    cost: FloatArray
    error: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class RelaxationCertificate(ABC):
    """Evidence for a lower bound that one pass over the block checks.

    Attributes
    ----------
    subject : Subject or None
        Program, count and fingerprint of the block that it was made for. Nothing rests on it, as
        everything is computed anew from the block at hand; `formulations.verify` compares it.
    rho : float or None
        Relative damping of the block, `FisherShape.rho`; descriptive.
    effective_rank : float or None
        ``tr(F)^2 / tr(F^2)`` of the block's Fisher matrix, `FisherShape.effective_rank`; descriptive.
    fixing : Fixing or None
        Weights that this certificate proves fixed.
    basis : certificate or None
        An earlier certificate whose fixings this one presumes.
    """

    chosen_are_kept: ClassVar[bool]
    """Whether the costs are paid by kept weights, or by pruned ones."""

    subject: Subject | None = None
    rho: float | None = None
    effective_rank: float | None = None
    fixing: Fixing | None = None
    basis: RelaxationCertificate | None = None

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name of the relaxation."""

    @property
    def program(self) -> str:
        """The program that it bounds."""
        return "joint" if self.chosen_are_kept else "selection"

    @property
    def n_fixed(self) -> int:
        """Number of weights proved fixed."""
        return 0 if self.fixing is None else self.fixing.count

    @abstractmethod
    def linearisation(self, problem: BlockProblem, given: Fixing) -> Linearisation | None:
        """Return the linear underestimate on the sets that obey `given`; None if it is not proved valid."""

    def lower_bound(self, problem: BlockProblem) -> float:
        """Recompute the bound with one product with ``H``, less twice a proven bound on all rounding.

        With a `basis`, whose fixings are proved first, the bound is the smaller of the restricted
        bound and the cutoff. ``-inf`` if anything does not fit the block or is not proved.
        """
        return self._proved(problem, 2.0)

    def proves_bound(self, problem: BlockProblem, bound: float) -> bool:
        """Whether `bound` is proved: what one machine lowered by twice the rounding, another may by 1.5."""
        return bound <= self._proved(problem, 1.5)

    def _proved(self, problem: BlockProblem, caution: float) -> float:
        given = self._proved_basis(problem)
        line = None if given is None else self.linearisation(problem, given)
        if line is None or given is None:
            return -math.inf
        return min(self._restricted(problem, line, given, caution), given.cutoff)

    def proves_fixing(self, problem: BlockProblem) -> bool:
        """Whether every weight listed in `fixing` is proved fixed, by one product with ``H``."""
        if self.fixing is None:
            return True
        if not self.fixing.keep.shape == self.fixing.prune.shape == (problem.n,):
            return False
        found = self.fixed_below(problem, self.fixing.cutoff)
        if found is None:
            return False
        return bool((found.keep >= self.fixing.keep).all() and (found.prune >= self.fixing.prune).all())

    def fixed_below(self, problem: BlockProblem, cutoff: float) -> Fixing | None:
        """Weights that every set of value at most `cutoff` keeps or prunes; None without a proof."""
        given = self._proved_basis(problem)
        line = None if given is None else self.linearisation(problem, given)
        if line is None or given is None or not cutoff <= given.cutoff:
            return None
        if problem.support is not None:
            return self._fixed_inside(problem, line, given, cutoff)
        chosen, others, free, count = self._parts(problem, given)
        index = np.flatnonzero(free)
        chosen, others = chosen.copy(), others.copy()
        if not 0 < count < index.size:
            # What is left has one way only, or none.
            (chosen if count else others)[index] = True
        else:
            cost = line.cost[index]
            order = np.argsort(cost, kind="stable")
            last_in, first_out = cost[order[count - 1]], cost[order[count]]
            inside, outside = order[:count], order[count:]
            bound = self._restricted(problem, line, given)
            leave = _rise(bound, first_out, cost[inside])
            enter = _rise(bound, cost[outside], last_in)
            chosen[index[inside[leave > cutoff]]] = True
            others[index[outside[enter > cutoff]]] = True
        keep, prune = (chosen, others) if self.chosen_are_kept else (others, chosen)
        return Fixing(keep=keep, prune=prune, cutoff=cutoff)

    def _proved_basis(self, problem: BlockProblem) -> Fixing | None:
        if self.basis is None:
            return Fixing.by_count(problem)
        # What every good set of one program has in common says nothing about the other one.
        if self.basis.program != self.program or not self.basis.proves_fixing(problem):
            return None
        return self.basis.fixing

    def _choice(self, problem: BlockProblem, given: Fixing) -> _Choice:
        """Return what `given` leaves of a support that is no count."""
        chosen, others = (given.keep, given.prune) if self.chosen_are_kept else (given.prune, given.keep)
        return _Choice.of(problem.sets, chosen, others, self.chosen_are_kept)

    def _restricted_inside(
        self, problem: BlockProblem, line: Linearisation, given: Fixing, caution: float
    ) -> float:
        """`_restricted` for a support that is no count: sums over units, so many in each cell."""
        choice, support = self._choice(problem, given), problem.sets
        if not choice.possible:
            return math.inf
        cost, size_of, error = (support.folded(x) for x in (line.cost, np.abs(line.cost), line.error))
        total = float(cost[choice.chosen].sum()) - choice.largest(-cost)
        magnitude = float(size_of[choice.chosen].sum()) + choice.largest(size_of)
        lost = line.lost + float(error[choice.chosen].sum()) + choice.largest(error)
        # Units are summed over before their costs are.
        lost += error_factor(2 * problem.n + 16) * magnitude + UNDERFLOW
        return line.base + total - caution * lost

    def _fixed_inside(
        self, problem: BlockProblem, line: Linearisation, given: Fixing, cutoff: float
    ) -> Fixing | None:
        """`fixed_below` for a support that is no count: exchanges within each cell."""
        choice, support = self._choice(problem, given), problem.sets
        if not choice.possible:
            return None
        bound = self._restricted_inside(problem, line, given, 2.0)
        cost = support.folded(line.cost)
        order, rank = ranked_in(-cost[choice.free], choice.size, np.ones(int(choice.free.sum()), np.bool_))
        units, ranked = np.flatnonzero(choice.free)[order], cost[choice.free][order]
        cell = np.searchsorted(choice.size.start, order, side="right") - 1
        first, quota = choice.size.start[cell], choice.size.quota[cell]
        inside = rank < quota
        # Where a cell has one way only nothing can be exchanged: both places are its own.
        last_in = ranked[np.clip(first + quota - 1, first, None)]
        first_out = ranked[np.minimum(first + quota, choice.size.start[cell + 1] - 1)]
        one_way = (quota == 0) | (quota == choice.size.start[cell + 1] - first)
        new, old = np.where(inside, first_out, ranked), np.where(inside, ranked, last_in)
        # Sums over groups have been rounded too.
        slack = error_factor(2 * problem.n + 16) * (np.abs(new) + np.abs(old))
        fixed = one_way | (_rise(bound, new, old) - slack > cutoff)
        chosen = choice.chosen.copy()
        others = ~choice.chosen & ~choice.free
        chosen[units[fixed & inside]] = True
        others[units[fixed & ~inside]] = True
        masks = support.spread(chosen), support.spread(others)
        keep, prune = masks if self.chosen_are_kept else masks[::-1]
        return Fixing(keep=keep, prune=prune, cutoff=cutoff)

    def _parts(self, problem: BlockProblem, given: Fixing) -> tuple[BoolArray, BoolArray, BoolArray, int]:
        """Chosen, not chosen and free weights under `given`, and how many free ones to choose."""
        if self.chosen_are_kept:
            return given.keep, given.prune, given.free, problem.n_keep - int(given.keep.sum())
        return given.prune, given.keep, given.free, problem.n_prune - int(given.prune.sum())

    def _restricted(
        self, problem: BlockProblem, line: Linearisation, given: Fixing, caution: float = 2.0
    ) -> float:
        """Minimum of the underestimate over the sets that obey `given`, rounded down."""
        if problem.support is not None:
            return self._restricted_inside(problem, line, given, caution)
        chosen, _, free, count = self._parts(problem, given)
        if not 0 <= count <= int(free.sum()):
            return math.inf
        cost, rest = line.cost[chosen], line.cost[free]
        total = float(cost.sum()) - largest_sum(-rest, count)
        magnitude = float(np.abs(cost).sum()) + largest_sum(np.abs(rest), count)
        lost = line.lost + float(line.error[chosen].sum()) + largest_sum(line.error[free], count)
        # A sum of n terms in any order, and the additions around it.
        lost += error_factor(problem.n + 16) * magnitude + UNDERFLOW
        return line.base + total - caution * lost


@dataclass(frozen=True)
class _Choice:
    """What fixings leave of a support: free units, and how many of each cell are still to be chosen.

    Attributes
    ----------
    chosen, free : (u,) bool arrays
    size : Cells
        Of the free units, in their order.
    possible : bool
        Whether a set obeys the fixings.
    """

    chosen: BoolArray
    free: BoolArray
    size: Cells
    possible: bool

    @staticmethod
    def of(support: Support, chosen: BoolArray, others: BoolArray, kept: bool) -> _Choice:
        """Return what is left once some weights are chosen, which means kept or pruned, and others not."""
        n = chosen.size
        picked, left_out = support.unit_keep(chosen), support.unit_keep(others)
        free = ~(picked | left_out)
        whole = as_cells(support.kept(n) if kept else support.pruned(n), picked.size)
        size = size_left(whole, picked, np.flatnonzero(free))
        assert isinstance(size, Cells)
        room = np.diff(size.start)
        possible = not bool((picked & left_out).any() or (size.quota < 0).any() or (size.quota > room).any())
        return _Choice(picked, free, size, possible)

    def largest(self, values: FloatArray) -> float:
        """Return the largest sum of the values of free units that can be chosen."""
        rest = values[self.free]
        return float(rest[largest_in(rest, self.size, np.ones(rest.size, dtype=np.bool_))].sum())


def _rise(bound: float, new: FloatArray | float, old: FloatArray | float) -> FloatArray:
    """``bound + new - old`` rounded down: the bound once one cost has replaced another."""
    slack = error_factor(8) * (abs(bound) + np.abs(new) + np.abs(old))
    return np.asarray(bound + (new - old) - slack)
