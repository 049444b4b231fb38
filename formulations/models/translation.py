"""From a Pyomo model of this package to the arrays of its `StandardForm`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from formulations.models.building import asking
from formulations.models.standard_form import Indicator, Row, StandardForm, Terms
from formulations.problem import FloatArray
from formulations.solution import never

if TYPE_CHECKING:
    import pyomo.environ as pyo

NOT_PLAIN = re.compile(r"[^0-9A-Za-z]")
NO_TERMS = Terms(first=np.zeros(0, np.int64), second=np.zeros(0, np.int64), value=np.zeros(0))


@dataclass
class _Columns:
    """Columns in the order in which they are met."""

    position: dict[int, int] = field(default_factory=dict)
    variables: list[Any] = field(default_factory=list)

    def add(self, variable: Any) -> int:
        key = id(variable)
        if key not in self.position:
            self.position[key] = len(self.variables)
            self.variables.append(variable)
        return self.position[key]


def standard_form(model: pyo.ConcreteModel, stopped: Callable[[], bool] = never) -> StandardForm:
    """Return the arrays of a model of this package; linear in the number of its terms.

    Raises `BuildingStopped` once `stopped`, asked between rows, says so.
    """
    import pyomo.environ as pyo
    from pyomo.gdp import Disjunct, Disjunction
    from pyomo.repn import generate_standard_repn

    columns = _Columns()
    decision_variables = model.kept if hasattr(model, "kept") else model.pruned
    decision = [columns.add(decision_variables[i]) for i in model.weights]
    for variable in model.component_data_objects(pyo.Var, active=True, descend_into=(pyo.Block,)):
        columns.add(variable)
    constraints = model.component_data_objects(pyo.Constraint, active=True)
    rows = [_row(c, columns) for c in asking(constraints, stopped)]
    indicators: list[Indicator] = []
    for disjunction in model.component_data_objects(Disjunction, active=True):
        choices = [columns.add(d.binary_indicator_var) for d in disjunction.disjuncts]
        rows.append(_linear_row(disjunction.name, choices, np.ones(len(choices)), 1.0, 1.0))
    for disjunct in model.component_data_objects(Disjunct, active=True):
        binary = columns.add(disjunct.binary_indicator_var)
        for constraint in disjunct.component_data_objects(pyo.Constraint, active=True):
            indicators.append(Indicator(binary=binary, row=_row(constraint, columns)))
    objective = generate_standard_repn(model.loss_increase.expr, quadratic=True, compute_values=True)
    terms = _terms(objective, columns)
    linear_index = [columns.add(v) for v in objective.linear_vars]
    linear = np.zeros(len(columns.variables))
    np.add.at(
        linear, np.array(linear_index, dtype=np.int64), np.array(objective.linear_coefs, dtype=np.float64)
    )
    linear_rows = [row for row in rows if not len(row.terms)]
    return StandardForm(
        name=model.name,
        **_column_arrays(columns.variables),
        linear=linear,
        terms=terms,
        constant=float(objective.constant),
        matrix=_matrix(linear_rows, len(columns.variables)),
        row_lower=np.array([row.lower for row in linear_rows]),
        row_upper=np.array([row.upper for row in linear_rows]),
        row_names=tuple(row.name for row in linear_rows),
        quadratic_rows=tuple(row for row in rows if len(row.terms)),
        indicators=tuple(indicators),
        decision=np.array(decision, dtype=np.int64),
        one_means_kept=hasattr(model, "kept"),
        support=model.support,
        objective_scale=float(pyo.value(model.objective_scale)),
    )


def _column_arrays(variables: list[Any]) -> dict[str, Any]:
    return {
        "column_names": tuple(_plain_name(v.name) for v in variables),
        "lower": np.array([float(v.lb) for v in variables]),
        "upper": np.array([float(v.ub) for v in variables]),
        "integer": np.array([v.is_binary() for v in variables], dtype=np.bool_),
    }


def _plain_name(name: str) -> str:
    """Return a name that MPS, LP and QPLIB readers all take: letters, digits and underscores."""
    return NOT_PLAIN.sub("_", name).strip("_").replace("__", "_")


def _row(constraint: Any, columns: _Columns) -> Row:
    from pyomo.repn import generate_standard_repn

    lower, body, upper = constraint.to_bounded_expression(evaluate_bounds=True)
    repn = generate_standard_repn(body, quadratic=True, compute_values=True)
    shift = float(repn.constant)
    return Row(
        name=_plain_name(constraint.name),
        index=np.array([columns.add(v) for v in repn.linear_vars], dtype=np.int64),
        value=np.array(repn.linear_coefs, dtype=np.float64),
        lower=-np.inf if lower is None else float(lower) - shift,
        upper=np.inf if upper is None else float(upper) - shift,
        terms=_terms(repn, columns),
    )


def _linear_row(name: str, index: list[int], value: FloatArray, lower: float, upper: float) -> Row:
    return Row(
        name=_plain_name(name),
        index=np.array(index, dtype=np.int64),
        value=value,
        lower=lower,
        upper=upper,
        terms=NO_TERMS,
    )


def _terms(repn: Any, columns: _Columns) -> Terms:
    if not repn.quadratic_vars:
        return NO_TERMS
    pairs = [sorted((columns.add(a), columns.add(b))) for a, b in repn.quadratic_vars]
    return Terms(
        first=np.array([pair[0] for pair in pairs], dtype=np.int64),
        second=np.array([pair[1] for pair in pairs], dtype=np.int64),
        value=np.array(repn.quadratic_coefs, dtype=np.float64),
    )


def _matrix(rows: Iterable[Row], n_columns: int) -> csr_matrix:
    listed = list(rows)
    counts = np.array([row.index.size for row in listed], dtype=np.int64)
    return csr_matrix(
        (
            np.concatenate([row.value for row in listed]),
            np.concatenate([row.index for row in listed]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        ),
        shape=(len(listed), n_columns),
    )
