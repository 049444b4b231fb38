"""Widths of layers for a budget of time or operations: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from cbs_opt.system.checks import finite_number
from formulations.errors import ArgumentError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """What one layer costs at every pair of choices of the sets that it depends on.

    `sets` names one or two sets, `table` has an axis for each, with an entry for each of its choices.
    """

    sets: tuple[str, ...]
    table: FloatArray


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The choice of a width for every set.

    Attributes
    ----------
    choice : mapping of str to int
        Index of the choice of each set.
    error : float
        Sum of the errors of the choices.
    bound : float
        No choice within the budget has a smaller error.
    cost, budget : float
    """

    choice: Mapping[str, int]
    error: float
    bound: float
    cost: float
    budget: float

    @property
    def gap(self) -> float:
        """How far above the bound the error is."""
        return max(self.error - self.bound, 0.0)


def choose_widths(
    errors: Mapping[str, ArrayLike],
    costs: Sequence[Cost],
    budget: float,
    *,
    fixed: float = 0.0,
    argument: str = "budget",
) -> Widths:
    """Return the choice of least error within a budget, with a bound; HiGHS proves it.

    Parameters
    ----------
    errors : mapping of str to (c,) array
        Error of each choice of each set.
    costs : sequence of Cost
        What layers cost, in milliseconds, operations or anything that adds up.
    budget : float
        What all of them may cost together with `fixed`.
    fixed : float, default 0
    argument : str, default "budget"
        What messages call the budget.

    Raises
    ------
    ArgumentError
        If a table does not fit the sets, or the cheapest choice is above the budget.

    Notes
    -----
    A binary for each choice of a set; a layer that depends on two sets has one for each pair, which sum up to
    those of the sets: the relaxation is tight for every layer by itself.
    """
    curves = {name: _curve(name, values) for name, values in errors.items()}
    tables = [_checked(entry, curves) for entry in costs]
    finite_number(argument, budget)
    start = {name: place for name, place in zip(curves, _starts(curves.values()), strict=True)}
    singles = sum(curve.size for curve in curves.values())
    pairs = [entry for entry in tables if len(entry.sets) == 2]
    places = [singles + place for place in _starts([entry.table.reshape(-1) for entry in pairs])]
    size = singles + sum(entry.table.size for entry in pairs)
    price, rows, wanted = np.zeros(size), [], []
    for name, curve in curves.items():
        row = np.zeros(size)
        row[start[name] : start[name] + curve.size] = 1.0
        rows.append(row)
        wanted.append(1.0)
    for entry in tables:
        if len(entry.sets) == 1:
            price[start[entry.sets[0]] : start[entry.sets[0]] + entry.table.size] += entry.table
    for entry, place in zip(pairs, places, strict=True):
        price[place : place + entry.table.size] = entry.table.reshape(-1)
        index = place + np.arange(entry.table.size).reshape(entry.table.shape)
        for axis, name in enumerate(entry.sets):
            for number in range(entry.table.shape[axis]):
                row = np.zeros(size)
                row[index.take(number, axis)] = 1.0
                row[start[name] + number] = -1.0
                rows.append(row)
                wanted.append(0.0)
    goal = np.zeros(size)
    for name, curve in curves.items():
        goal[start[name] : start[name] + curve.size] = curve
    scale = max(float(np.abs(goal).max(initial=0.0)), 1e-300)
    whole = np.zeros(size, dtype=np.int64)
    whole[:singles] = 1.0
    exact = LinearConstraint(np.array(rows), wanted, wanted)
    room = budget - fixed
    unit = max(float(np.abs(price).max(initial=0.0)), abs(room), 1e-300)
    result = milp(
        goal / scale,
        constraints=[exact, LinearConstraint(price / unit, -np.inf, room / unit)],
        integrality=whole,
        bounds=Bounds(0.0, 1.0),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        least = fixed + _cheapest(price, exact, whole, unit)
        found = f"{budget:g}, and the cheapest choice costs {least:g}"
        raise ArgumentError(argument, found, "allow that much, or offer smaller widths")
    choice = {
        name: int(np.argmax(result.x[start[name] : start[name] + curve.size]))
        for name, curve in curves.items()
    }
    cost = fixed + sum(float(entry.table[tuple(choice[name] for name in entry.sets)]) for entry in tables)
    error = math.fsum(float(curves[name][place]) for name, place in choice.items())
    bound = min(float(result.mip_dual_bound) * scale, error)
    return Widths(choice=choice, error=error, bound=bound, cost=cost, budget=budget)


def enumerated_widths(
    errors: Mapping[str, ArrayLike], costs: Sequence[Cost], budget: float, *, fixed: float = 0.0
) -> Widths | None:
    """Return the best choice by trying all of them; None if none is within the budget. For small tables."""
    curves = {name: _curve(name, values) for name, values in errors.items()}
    best: Widths | None = None
    for places in product(*(range(curve.size) for curve in curves.values())):
        choice = dict(zip(curves, places, strict=True))
        cost = fixed + sum(float(entry.table[tuple(choice[name] for name in entry.sets)]) for entry in costs)
        error = math.fsum(float(curves[name][place]) for name, place in choice.items())
        if cost <= budget and (best is None or error < best.error):
            best = Widths(choice=choice, error=error, bound=error, cost=cost, budget=budget)
    return best


def _starts(parts: object) -> list[int]:
    sizes = [len(part) for part in parts]  # type: ignore[attr-defined]
    return [0, *np.cumsum(sizes).tolist()][: len(sizes)]


def _curve(name: str, values: ArrayLike) -> FloatArray:
    curve = np.asarray(values, dtype=np.float64)
    if curve.ndim != 1 or not curve.size or not np.isfinite(curve).all():
        found = f"shape {curve.shape}" if curve.ndim != 1 or not curve.size else "NaN or infinity"
        raise ArgumentError(f"errors[{name!r}]", found, "pass one finite error for each choice")
    return curve


def _checked(cost: Cost, curves: Mapping[str, FloatArray]) -> Cost:
    unknown = [name for name in cost.sets if name not in curves]
    if unknown or not 1 <= len(cost.sets) <= 2 or len(set(cost.sets)) < len(cost.sets):
        raise ArgumentError("costs", f"a table of {cost.sets}", "name one or two different sets with errors")
    shape = tuple(curves[name].size for name in cost.sets)
    if cost.table.shape != shape or not np.isfinite(cost.table).all():
        found = f"a table of shape {cost.table.shape} for {cost.sets}"
        raise ArgumentError("costs", found, f"pass finite numbers of shape {shape}")
    return cost


def _cheapest(price: FloatArray, exact: LinearConstraint, whole: NDArray[np.int64], unit: float) -> float:
    result = milp(price / unit, constraints=[exact], integrality=whole, bounds=Bounds(0.0, 1.0))
    assert result.x is not None
    return float(price @ result.x)
