"""Blocks in exact rational arithmetic: every float64 is a rational number, so nothing is rounded.

Independent of the package: it shares no formula, no scaling and no tolerance with it. The joint value of
a kept set is a quotient of two determinants, found for all sets by fraction-free elimination (Bareiss
1968) along the tree of their prefixes.
"""

from __future__ import annotations

from fractions import Fraction

from formulations import BlockProblem


class ExactBlock:
    """The data of a block as rational numbers."""

    def __init__(self, problem: BlockProblem) -> None:
        self.n, self.n_keep, self.n_prune = problem.n, problem.n_keep, problem.n_prune
        self.weights = _rational(problem.weights.tolist())
        self.gradient = _rational(problem.gradient_or_zero.tolist())
        if problem.rows is not None:
            rows = [_rational(row) for row in problem.rows.tolist()]
            places = range(self.n)
            self.hessian = [
                [sum((row[i] * row[j] for row in rows), Fraction(0)) for j in places] for i in places
            ]
        else:
            assert problem.hessian is not None
            self.hessian = [_rational(row) for row in problem.hessian.tolist()]
        for i in range(self.n):
            self.hessian[i][i] += Fraction(problem.damping)

    def loss(self, new_weights: list[float]) -> Fraction:
        """Loss increase of the model at `new_weights`."""
        step = [Fraction(u) - w for u, w in zip(new_weights, self.weights, strict=True)]
        image = self._product(step)
        return sum(((g + h / 2) * d for g, h, d in zip(self.gradient, image, step, strict=True)), Fraction(0))

    def optimum(self, program: str) -> Fraction | None:
        """Least value over all sets of the right size; None if it is minus infinity."""
        return self._selection() if program == "selection" else self._joint()

    def _product(self, vector: list[Fraction]) -> list[Fraction]:
        return [sum((h * x for h, x in zip(row, vector, strict=True)), Fraction(0)) for row in self.hessian]

    def _selection(self) -> Fraction:
        w = self.weights
        costs = [[self.hessian[i][j] * w[i] * w[j] for j in range(self.n)] for i in range(self.n)]
        linear = [-2 * g * x for g, x in zip(self.gradient, w, strict=True)]
        unit = _unit([*linear, *(cost for row in costs for cost in row)])
        matrix = [[int(cost * unit) for cost in row] for row in costs]
        best = _least_sum(matrix, [int(x * unit) for x in linear], self.n_prune)
        return Fraction(best, 2 * unit)

    def _joint(self) -> Fraction | None:
        image = self._product(self.weights)
        border = [g - h for g, h in zip(self.gradient, image, strict=True)]
        corner = sum(
            ((h - 2 * g) * w for h, g, w in zip(image, self.gradient, self.weights, strict=True)), Fraction(0)
        )
        unit = _unit([corner, *border, *(entry for row in self.hessian for entry in row)])
        rows = [[*row, edge] for row, edge in zip(self.hessian, border, strict=True)]
        matrix = [[int(entry * unit) for entry in row] for row in (*rows, [*border, corner])]
        best = _least_quotient(matrix, self.n_keep)
        return None if best is None else best / (2 * unit)


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
