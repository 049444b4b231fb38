"""A model as arrays: what every solver bridge and every file writer is given.

min  constant + linear.x + sum_t value_t x_i(t) x_j(t)
s.t. row_lower <= matrix x <= row_upper
     lower_q <= linear_q.x + sum_t value_t x_i(t) x_j(t) <= upper_q       for every quadratic row q
     x_b = 1  implies  lower_d <= a_d.x <= upper_d                       for every indicator d
     lower <= x <= upper,  x_j integer where `integer_j`
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from formulations.problem import BoolArray, FloatArray, IntArray
from formulations.support import Support


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """The products ``sum_t value_t x_first(t) x_second(t)``, each pair once with first <= second."""

    first: IntArray
    second: IntArray
    value: FloatArray

    def __len__(self) -> int:
        return int(self.value.size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One constraint ``lower <= value.x[index] + terms(x) <= upper``; `terms` may be empty."""

    name: str
    index: IntArray
    value: FloatArray
    lower: float
    upper: float
    terms: Terms


@dataclass(frozen=True, kw_only=True, eq=False)
class Indicator:
    """``x_binary = 1`` implies `row`."""

    binary: int
    row: Row


@dataclass(frozen=True, kw_only=True, eq=False)
class StandardForm:
    """Arrays of one model (module docstring), with the way back to a kept set.

    Attributes
    ----------
    decision : (n,) int array
        Columns of the binaries, in the order of the weights.
    one_means_kept : bool
        Whether a binary at 1 keeps its weight (joint models) or prunes it (selection models).
    support : Support
        What may be kept; its rows are among the others.
    objective_scale : float
        Loss increase per unit of the model's objective.
    """

    name: str
    column_names: tuple[str, ...]
    lower: FloatArray
    upper: FloatArray
    integer: BoolArray
    linear: FloatArray
    terms: Terms
    constant: float
    matrix: csr_matrix
    row_lower: FloatArray
    row_upper: FloatArray
    row_names: tuple[str, ...]
    quadratic_rows: tuple[Row, ...]
    indicators: tuple[Indicator, ...]
    decision: IntArray
    one_means_kept: bool
    support: Support
    objective_scale: float

    @property
    def n_columns(self) -> int:
        """Number of variables."""
        return int(self.linear.size)

    @property
    def is_quadratic(self) -> bool:
        """Whether there are products of variables anywhere."""
        return len(self.terms) > 0 or len(self.quadratic_rows) > 0

    @property
    def total_width(self) -> float:
        """Sum of the widths of the variables' ranges; finite for every model of this package."""
        return float(np.sum(self.upper - self.lower))

    def keep(self, x: FloatArray) -> BoolArray:
        """Kept set of a solver's point, (n,) bool: the set of the support that it leans most to keep.

        Exact for a point that is integral to any tolerance below 1/2, and always inside.
        """
        return self.support.best_mean(x[self.decision] if self.one_means_kept else -x[self.decision])

    def objective(self, x: FloatArray) -> float:
        """Objective of the model at `x`, in the model's units."""
        products = self.terms.value * x[self.terms.first] * x[self.terms.second]
        return float(self.constant + self.linear @ x + products.sum())
