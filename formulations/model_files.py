"""Models as text: free MPS, CPLEX LP and QPLIB, all from the same `StandardForm`.

Numbers are written with 17 significant digits, so that reading them back gives the same model.
Objectives are in the units of the model; multiply by ``objective_scale`` for the loss increase.

Sources: the MPS extensions QUADOBJ and QCMATRIX and the LP format as CPLEX documents them; QPLIB,
Furini et al. (2019), appendix B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from formulations.models.standard_form import Row, StandardForm, Terms

INFINITY = 1e30
TERMS_PER_LINE = 4
"""LP readers refuse long lines."""


def _number(value: float) -> str:
    return f"{value:.17g}"


def _linear_rows(form: StandardForm) -> Iterator[tuple[str, list[tuple[int, float]], float, float]]:
    """Name, entries and sides of every linear row."""
    matrix = form.matrix
    for r in range(matrix.shape[0]):
        part = slice(matrix.indptr[r], matrix.indptr[r + 1])
        entries = [(int(j), float(v)) for j, v in zip(matrix.indices[part], matrix.data[part], strict=True)]
        yield form.row_names[r], entries, float(form.row_lower[r]), float(form.row_upper[r])


def _all_rows(form: StandardForm) -> Iterator[tuple[str, list[tuple[int, float]], float, float]]:
    """`_linear_rows`, then the linear parts of the quadratic rows."""
    yield from _linear_rows(form)
    for row in form.quadratic_rows:
        entries = [(int(j), float(v)) for j, v in zip(row.index, row.value, strict=True)]
        yield row.name, entries, row.lower, row.upper


def _sense(lower: float, upper: float) -> str:
    if lower == upper:
        return "E"
    return "L" if np.isfinite(upper) else "G"


def mps_text(form: StandardForm) -> str:
    """Return the model in free MPS format, with QUADOBJ and QCMATRIX sections for the products."""
    rows = list(_all_rows(form))
    lines = [f"NAME {form.name}", "ROWS", " N objective"]
    lines += [f" {_sense(lower, upper)} {name}" for name, _, lower, upper in rows]
    lines += ["COLUMNS", *_mps_columns(form, rows), "RHS"]
    # The constant of the objective is the negated right-hand side of its row.
    lines.append(f" RHS objective {_number(-form.constant)}")
    for name, _, lower, upper in rows:
        lines.append(f" RHS {name} {_number(upper if np.isfinite(upper) else lower)}")
    ranged = [(n, u - lo) for n, _, lo, u in rows if np.isfinite(lo) and np.isfinite(u) and lo != u]
    if ranged:
        lines += ["RANGES", *(f" RNG {name} {_number(width)}" for name, width in ranged)]
    lines.append("BOUNDS")
    for j, name in enumerate(form.column_names):
        lines.append(f" LO BND {name} {_number(form.lower[j])}")
        lines.append(f" UP BND {name} {_number(form.upper[j])}")
    if len(form.terms):
        # 1/2 x.Q x, one triangle.
        lines += ["QUADOBJ", *(" " + " ".join(entry) for entry in _half_form(form, form.terms))]
    for row in form.quadratic_rows:
        lines += [f"QCMATRIX {row.name}", *_mps_full_form(form, row.terms)]
    return "\n".join([*lines, "ENDATA", ""])


def _mps_columns(
    form: StandardForm, rows: list[tuple[str, list[tuple[int, float]], float, float]]
) -> Iterator[str]:
    entries: list[list[str]] = [[] for _ in form.column_names]
    for i in np.flatnonzero(form.linear):
        entries[i].append(f"objective {_number(form.linear[i])}")
    for row_name, row, _, _ in rows:
        for column, value in row:
            entries[column].append(f"{row_name} {_number(value)}")
    inside = False
    for j, name in enumerate(form.column_names):
        if bool(form.integer[j]) != inside:
            yield f" MARKER 'MARKER' '{'INTEND' if inside else 'INTORG'}'"
            inside = not inside
        # A column without entries has to be named all the same.
        yield from (f" {name} {entry}" for entry in entries[j] or ["objective 0"])
    if inside:
        yield " MARKER 'MARKER' 'INTEND'"


def _half_form(form: StandardForm, terms: Terms) -> Iterator[tuple[str, str, str]]:
    """Entries of ``Q`` in ``1/2 x.Q x``, each pair once."""
    names = form.column_names
    for i, j, value in zip(terms.first, terms.second, terms.value, strict=True):
        yield names[i], names[j], _number(2.0 * value if i == j else value)


def _mps_full_form(form: StandardForm, terms: Terms) -> Iterator[str]:
    """Entries of ``Q`` in ``x.Q x``, both triangles."""
    names = form.column_names
    for i, j, value in zip(terms.first, terms.second, terms.value, strict=True):
        if i == j:
            yield f" {names[i]} {names[j]} {_number(value)}"
        else:
            yield f" {names[i]} {names[j]} {_number(0.5 * value)}"
            yield f" {names[j]} {names[i]} {_number(0.5 * value)}"


def lp_text(form: StandardForm) -> str:
    """Return the model in CPLEX LP format; the constant is a column fixed at 1."""
    names = form.column_names
    objective = [f"{value:+.17g} {names[j]}" for j, value in enumerate(form.linear) if value != 0.0]
    objective.append(f"{form.constant:+.17g} constant_one")
    lines = ["Minimize", " objective:", *_wrapped(objective)]
    if len(form.terms):
        # The bracket of an objective is halved.
        lines += [" + [", *_wrapped(_lp_products(form, form.terms, 2.0)), " ] / 2"]
    lines.append("Subject To")
    quadratic = {row.name: row for row in form.quadratic_rows}
    for name, entries, lower, upper in _all_rows(form):
        lines += _lp_row(form, name, entries, lower, upper, quadratic.get(name))
    lines.append("Bounds")
    for j, name in enumerate(names):
        lines.append(f" {_number(form.lower[j])} <= {name} <= {_number(form.upper[j])}")
    lines.append(" constant_one = 1")
    lines += ["Binaries", *(f" {names[j]}" for j in np.flatnonzero(form.integer))]
    return "\n".join([*lines, "End", ""])


def _lp_row(
    form: StandardForm,
    name: str,
    entries: list[tuple[int, float]],
    lower: float,
    upper: float,
    quadratic: Row | None,
) -> list[str]:
    left = _wrapped(f"{value:+.17g} {form.column_names[j]}" for j, value in entries)
    if quadratic is not None:
        left += [" + [", *_wrapped(_lp_products(form, quadratic.terms, 1.0)), " ]"]
    if lower == upper:
        return [f" {name}:", *left, f" = {_number(upper)}"]
    lines: list[str] = []
    if np.isfinite(upper):
        lines += [f" {name}:", *left, f" <= {_number(upper)}"]
    if np.isfinite(lower):
        lines += [f" {name}_lower:" if lines else f" {name}:", *left, f" >= {_number(lower)}"]
    return lines


def _lp_products(form: StandardForm, terms: Terms, factor: float) -> Iterator[str]:
    names = form.column_names
    for i, j, value in zip(terms.first, terms.second, terms.value, strict=True):
        product = f"{names[i]} ^2" if i == j else f"{names[i]} * {names[j]}"
        yield f"{factor * value:+.17g} {product}"


def _wrapped(terms: Iterable[str]) -> list[str]:
    listed = list(terms)
    return [
        "  " + " ".join(listed[start : start + TERMS_PER_LINE])
        for start in range(0, len(listed), TERMS_PER_LINE)
    ]


def qplib_text(form: StandardForm) -> str:
    """Return the model in QPLIB format; binaries of mixed models are integers in [0, 1]."""
    mixed = not bool(form.integer.all())
    diagonal = bool(np.all(form.terms.first == form.terms.second))
    kind = ("D" if diagonal else "C") if len(form.terms) else "L"
    kind += "M" if mixed else "B"
    kind += "Q" if form.quadratic_rows else "L"
    rows = list(_all_rows(form))
    lines = [form.name, kind, "minimize", f"{form.n_columns} # variables", f"{len(rows)} # constraints"]
    if len(form.terms):
        lines += _counted(_qplib_products(form.terms), "quadratic terms in the objective")
    linear = [f"{j + 1} {_number(value)}" for j, value in enumerate(form.linear) if value != 0.0]
    lines += ["0 # default linear coefficient of the objective", *_counted(linear, "others")]
    lines.append(f"{_number(form.constant)} # constant of the objective")
    if form.quadratic_rows:
        first = form.matrix.shape[0] + 1
        products = [
            f"{first + q} {entry}"
            for q, row in enumerate(form.quadratic_rows)
            for entry in _qplib_products(row.terms)
        ]
        lines += _counted(products, "quadratic terms in the constraints")
    entries = [f"{r + 1} {j + 1} {_number(v)}" for r, row in enumerate(rows) for j, v in row[1]]
    lines += _counted(entries, "linear terms in the constraints")
    lines.append(f"{_number(INFINITY)} # infinity")
    lines += _qplib_vector([row[2] for row in rows], -INFINITY, "left-hand side")
    lines += _qplib_vector([row[3] for row in rows], INFINITY, "right-hand side")
    if mixed:
        lines += _qplib_vector(list(form.lower), 0.0, "lower bound")
        lines += _qplib_vector(list(form.upper), 1.0, "upper bound")
        kinds = [f"{j + 1} 1" for j in np.flatnonzero(form.integer)]
        lines += ["0 # default variable type", *_counted(kinds, "integer variables")]
    for what in ("primal start", "constraint dual start", "bound dual start"):
        lines += [f"0 # default {what}", "0 # others"]
    lines += _counted([f"{j + 1} {name}" for j, name in enumerate(form.column_names)], "variable names")
    lines += _counted([f"{r + 1} {row[0]}" for r, row in enumerate(rows)], "constraint names")
    return "\n".join([*lines, ""])


def _qplib_products(terms: Terms) -> list[str]:
    """Lower triangle of ``Q`` in ``1/2 x.Q x``."""
    return [
        f"{j + 1} {i + 1} {_number(2.0 * value if i == j else value)}"
        for i, j, value in zip(terms.first, terms.second, terms.value, strict=True)
    ]


def _counted(lines: list[str], what: str) -> list[str]:
    return [f"{len(lines)} # {what}", *lines]


def _qplib_vector(values: list[float], default: float, what: str) -> list[str]:
    clipped = [min(max(float(value), -INFINITY), INFINITY) for value in values]
    others = [f"{r + 1} {_number(value)}" for r, value in enumerate(clipped) if value != default]
    return [f"{_number(default)} # default {what}", *_counted(others, "others")]
