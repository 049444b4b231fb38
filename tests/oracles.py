"""Independent checks for the tests: model points built by hand, and readers of exported files."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from formulations import BlockProblem
from formulations.loss import update
from formulations.models.scaling import diagonal_split, factor, scale_block
from formulations.models.standard_form import Row, StandardForm


def model_point(problem: BlockProblem, form: StandardForm, keep: np.ndarray) -> np.ndarray:
    """The point of a model that stands for a kept set, column by column from the names."""
    block = scale_block(problem)
    pruned = (~keep).astype(float)
    new_weights = update(problem, keep) / block.weight_scale if form.one_means_kept else np.zeros(problem.n)
    costs = block.pair_costs
    split = diagonal_split(block)
    reduced = block.hessian - np.diag(split)
    image = factor(reduced) @ (new_weights if form.one_means_kept else block.weights * pruned)
    values = {"pruned": pruned, "kept": keep.astype(float), "new_weight": new_weights, "image": image}
    values["square"] = new_weights**2
    values["share"] = pruned * (np.triu(costs, 1) @ pruned)
    point = np.empty(form.n_columns)
    for column, name in enumerate(form.column_names):
        stem, *index = re.split(r"_(?=\d)", name)
        if stem == "both":
            i, j = map(int, index)
            point[column] = pruned[i] * pruned[j]
        elif stem in values:
            point[column] = values[stem][int(index[0])]
        else:
            # Binaries of disjuncts: keep_i and prune_i.
            i = int(re.search(r"\d+", name).group())
            point[column] = float(keep[i]) if name.startswith("keep") else pruned[i]
    return point


def row_value(row: Row, point: np.ndarray) -> float:
    """Left-hand side of a row."""
    products = row.terms.value * point[row.terms.first] * point[row.terms.second]
    return float(row.value @ point[row.index] + products.sum())


def worst_violation(form: StandardForm, point: np.ndarray) -> float:
    """Largest violation of any bound, row, cone or active indicator."""
    left = form.matrix @ point
    excess = [form.lower - point, point - form.upper, form.row_lower - left, left - form.row_upper]
    rows = list(form.quadratic_rows)
    rows += [d.row for d in form.indicators if point[d.binary] > 0.5]
    for row in rows:
        value = row_value(row, point)
        excess.append(np.array([row.lower - value, value - row.upper]))
    return max(float(e.max(initial=-np.inf)) for e in excess)


@dataclass
class QplibModel:
    """A QPLIB file as dense arrays: ``min 1/2 x.Q x + b.x + q`` and quadratic rows."""

    kind: str
    quadratic: np.ndarray
    linear: np.ndarray
    constant: float
    row_quadratics: dict[int, np.ndarray]
    matrix: np.ndarray
    left: np.ndarray
    right: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    integer: np.ndarray
    names: dict[int, str]

    def objective(self, x: np.ndarray) -> float:
        return float(0.5 * x @ self.quadratic @ x + self.linear @ x + self.constant)

    def rows(self, x: np.ndarray) -> np.ndarray:
        values = self.matrix @ x
        for index, quadratic in self.row_quadratics.items():
            values[index] += 0.5 * x @ quadratic @ x
        return values


class _Lines:
    def __init__(self, text: str) -> None:
        self._lines = iter([line.split("#")[0].split() for line in text.splitlines()])

    def take(self) -> list[str]:
        return next(self._lines)

    def counted(self) -> list[list[str]]:
        return [self.take() for _ in range(int(self.take()[0]))]

    def vector(self, size: int) -> np.ndarray:
        values = np.full(size, float(self.take()[0]))
        for index, value in self.counted():
            values[int(index) - 1] = float(value)
        return values


def _symmetric(entries: list[list[str]], size: int) -> np.ndarray:
    matrix = np.zeros((size, size))
    for i, j, value in entries:
        assert int(i) >= int(j), "QPLIB lists the lower triangle"
        matrix[int(i) - 1, int(j) - 1] = matrix[int(j) - 1, int(i) - 1] = float(value)
    return matrix


def read_qplib(text: str) -> QplibModel:
    """Parse the kinds of QPLIB file that this project writes, after the published layout."""
    lines = _Lines(text)
    lines.take()
    kind = lines.take()[0]
    assert lines.take() == ["minimize"]
    n, m = int(lines.take()[0]), int(lines.take()[0])
    quadratic = _symmetric(lines.counted(), n) if kind[0] != "L" else np.zeros((n, n))
    linear = lines.vector(n)
    constant = float(lines.take()[0])
    grouped: dict[int, list[list[str]]] = {}
    for row, *entry in lines.counted() if kind[2] not in "NBL" else []:
        grouped.setdefault(int(row) - 1, []).append(entry)
    matrix = np.zeros((m, n))
    for row, column, value in lines.counted():
        matrix[int(row) - 1, int(column) - 1] = float(value)
    infinity = float(lines.take()[0])
    left, right = lines.vector(m), lines.vector(m)
    left[left <= -infinity], right[right >= infinity] = -np.inf, np.inf
    lower, upper, integer = np.zeros(n), np.ones(n), np.ones(n)
    if kind[1] != "B":
        lower, upper, integer = lines.vector(n), lines.vector(n), lines.vector(n)
    for size in (n, m, n):
        lines.vector(size)
    names = {int(index) - 1: name for index, name in lines.counted()}
    assert len(lines.counted()) == m
    return QplibModel(
        kind=kind,
        quadratic=quadratic,
        linear=linear,
        constant=constant,
        row_quadratics={row: _symmetric(entries, n) for row, entries in grouped.items()},
        matrix=matrix,
        left=left,
        right=right,
        lower=lower,
        upper=upper,
        integer=integer,
        names=names,
    )
