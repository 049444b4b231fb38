"""Blocks in exact rational arithmetic: every float64 is a rational number, so nothing is rounded.

Independent of the package: it shares no formula, no scaling and no tolerance with it. The joint value of
a kept set is a quotient of two determinants, found for all sets by fraction-free elimination (Bareiss
1968) along the tree of their prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from operator import mul

import numpy as np

from formulations import BlockProblem
from formulations.channels import ChannelTerm

Keep = tuple[bool, ...]
"""Which weights stay."""


class ExactBlock:
    """The data of a block as integers over common powers of two."""

    def __init__(self, problem: BlockProblem) -> None:
        self.n, self.n_keep, self.n_prune = problem.n, problem.n_keep, problem.n_prune
        self.keeps: list[Keep] | None = None
        if problem.support is not None:
            every = product((False, True), repeat=problem.n)
            self.keeps = [keep for keep in every if problem.allows(np.array(keep, dtype=bool))]
        self.weights = _rational(problem.weights.tolist())
        self.gradient = _rational(problem.gradient_or_zero.tolist())
        if problem.rows is not None:
            unit = _unit(_rational(problem.rows.ravel().tolist()))
            rows = [[int(x * unit) for x in _rational(row)] for row in problem.rows.tolist()]
            columns = [[row[i] for row in rows] for i in range(self.n)]
            self.hessian = [[Fraction(_dot(x, y), unit * unit) for y in columns] for x in columns]
        else:
            assert problem.hessian is not None
            self.hessian = [_rational(row) for row in problem.hessian.tolist()]
        if problem.channels is not None:
            self._add(problem.channels)
        for i in range(self.n):
            self.hessian[i][i] += Fraction(problem.damping)
        # H and g as integers over one unit: the loss of many points is asked for.
        self._unit = _unit([*self.gradient, *(entry for row in self.hessian for entry in row)])
        self._hessian = [[int(entry * self._unit) for entry in row] for row in self.hessian]
        self._gradient = [int(entry * self._unit) for entry in self.gradient]
        self._losses: dict[tuple[float, ...], Fraction] = {}

    def _add(self, channels: ChannelTerm) -> None:
        """Add the blocks of a term over channels."""
        for channel, span in enumerate(channels.spans()):
            moment, scale = channels.moments[channels.moment[channel]], Fraction(channels.scale[channel])
            lines = channels.inputs[span].tolist()
            for i, line in enumerate(lines, span.start):
                for j, other in enumerate(lines, span.start):
                    self.hessian[i][j] += scale * Fraction(moment[line, other])

    def loss(self, new_weights: list[float]) -> Fraction:
        """Loss increase of the model at `new_weights`."""
        key = tuple(new_weights)
        if key not in self._losses:
            self._losses[key] = self._loss(key)
        return self._losses[key]

    def _loss(self, new_weights: tuple[float, ...]) -> Fraction:
        step = [Fraction(u) - w for u, w in zip(new_weights, self.weights, strict=True)]
        unit = _unit(step)
        whole = [int(d * unit) for d in step]
        quadratic = sum(d * _dot(row, whole) for d, row in zip(whole, self._hessian, strict=True))
        return Fraction(quadratic + 2 * unit * _dot(self._gradient, whole), 2 * self._unit * unit * unit)

    def optimum(self, program: str) -> Fraction | None:
        """Least value over all sets of the support; None if it is minus infinity."""
        if self.keeps is not None:
            value = self._selection_value if program == "selection" else self._kept_value
            values = [value(keep) for keep in self.keeps]
            return None if None in values else min(found for found in values if found is not None)
        return self._selection() if program == "selection" else self._joint(range(self.n), self.n_keep)

    def _selection_value(self, keep: Keep) -> Fraction:
        return self.loss([0.0 if not kept else float(w) for kept, w in zip(keep, self.weights, strict=True)])

    def _kept_value(self, keep: Keep) -> Fraction | None:
        return self.joint_value([i for i, kept in enumerate(keep) if kept])

    def _product(self, vector: list[Fraction]) -> list[Fraction]:
        return [sum((h * x for h, x in zip(row, vector, strict=True)), Fraction(0)) for row in self.hessian]

    def joint_value(self, kept: Sequence[int]) -> Fraction | None:
        """Least value with just the weights `kept` left; None if it is minus infinity."""
        return self._joint(kept, len(kept))

    def _selection(self) -> Fraction:
        w = self.weights
        costs = [[self.hessian[i][j] * w[i] * w[j] for j in range(self.n)] for i in range(self.n)]
        linear = [-2 * g * x for g, x in zip(self.gradient, w, strict=True)]
        unit = _unit([*linear, *(cost for row in costs for cost in row)])
        matrix = [[int(cost * unit) for cost in row] for row in costs]
        best = _least_sum(matrix, [int(x * unit) for x in linear], self.n_prune)
        return Fraction(best, 2 * unit)

    def _joint(self, places: Sequence[int], n_keep: int) -> Fraction | None:
        image = self._product(self.weights)
        border = [g - h for g, h in zip(self.gradient, image, strict=True)]
        corner = sum(
            ((h - 2 * g) * w for h, g, w in zip(image, self.gradient, self.weights, strict=True)), Fraction(0)
        )
        border = [border[i] for i in places]
        rows = [[*(self.hessian[i][j] for j in places), edge] for i, edge in zip(places, border, strict=True)]
        unit = _unit([corner, *border, *(entry for row in rows for entry in row)])
        matrix = [[int(entry * unit) for entry in row] for row in (*rows, [*border, corner])]
        best = _least_quotient(matrix, n_keep)
        return None if best is None else best / (2 * unit)


def _dot(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(map(mul, first, second))


def _rational(values: list[float]) -> list[Fraction]:
    return [Fraction(value) for value in values]


def _unit(values: list[Fraction]) -> int:
    """A power of two that makes all `values` whole."""
    return max((value.denominator for value in values), default=1)


def _least_sum(matrix: list[list[int]], linear: list[int], size: int) -> int:
    """Least ``y.A y + c.y`` over binary ``y`` with `size` ones."""
    n = len(linear)
    best: int | None = None
    stack = [(0, 0, 0, linear)]
    while stack:
        first, chosen, total, slopes = stack.pop()
        if chosen == size:
            best = total if best is None else min(best, total)
            continue
        for i in range(first, n - (size - chosen) + 1):
            following = [slope + 2 * entry for slope, entry in zip(slopes, matrix[i], strict=True)]
            stack.append((i + 1, chosen + 1, total + slopes[i] + matrix[i][i], following))
    assert best is not None
    return best


def _least_quotient(matrix: list[list[int]], size: int) -> Fraction | None:
    """Least corner of the Schur complement of `size` indices; None if a block is not definite."""
    best = (1, 0)
    stack = [(matrix, 1, size)]
    while stack:
        table, pivot, left = stack.pop()
        count = len(table) - 1
        if left == 0:
            corner = table[-1][-1]
            if corner * best[1] < best[0] * pivot:
                best = (corner, pivot)
            continue
        for i in range(count - left + 1):
            lead = table[i]
            if lead[i] <= 0:
                return None
            if left == 1:
                following = [[(lead[i] * table[-1][-1] - lead[-1] * lead[-1]) // pivot]]
            else:
                following = [
                    [
                        (lead[i] * x - row[i] * y) // pivot
                        for x, y in zip(row[i + 1 :], lead[i + 1 :], strict=True)
                    ]
                    for row in table[i + 1 :]
                ]
            stack.append((following, lead[i], left - 1))
    return Fraction(*best)
