"""Fill the tables of the catalogue from the registries while the site is built."""

from __future__ import annotations

from typing import Any

import numpy as np

from cbs_opt.select.methods import Method, available_methods
from formulations.models import MODELS
from formulations.problem import PROGRAMS, BlockProblem
from formulations.solvers import bridge, models_for, solver_names


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each marker ``<!-- methods -->``, ``<!-- options -->``, ... by its table."""
    for marker, table in TABLES.items():
        if (place := f"<!-- {marker} -->") in markdown:
            markdown = markdown.replace(place, table())
    return markdown


def methods_table() -> str:
    """One row a method: what it looks at and what it needs."""
    rows = [
        (
            f"`{method.name}`",
            method.kind,
            method.summary.replace("|", "\\|"),
            _words(method.programs),
            "-" if method.blockwise else "yes",
            "yes" if method.randomized else "-",
            "yes" if method.needs_curvature else "-",
        )
        for method in available_methods()
    ]
    head = ("method", "kind", "what it does", "programs", "matrix-free", "random", "needs curvature")
    return _table(head, rows)


def options_table() -> str:
    """One row a method and program that takes options, with their defaults."""
    rows = [
        (f"`{method.name}`", program, _defaults(method))
        for method in available_methods()
        for program in method.programs
        if method.options
    ]
    return _table(("method", "program", "options and defaults"), rows)


def formulations_table() -> str:
    """One row a formulation: its program, its kind, what a solver must take, its size."""
    block = BlockProblem(weights=np.ones(100), rows=np.eye(100), n_prune=50)
    rows = []
    for spec in MODELS.values():
        size = spec.size(block)
        sizes = f"{size.variables} / {size.linear_rows} / {size.quadratic_rows}"
        rows.append((f"`{spec.name}`", spec.program, spec.kind, ", ".join(sorted(spec.needs)), sizes))
    head = ("formulation", "program", "kind", "a solver must take", "variables / rows / cones at n = 100")
    return _table(head, rows)


def solvers_table() -> str:
    """One row a bridge: which formulations of each program it can take."""
    rows = [
        (
            f"`{name}`",
            ", ".join(sorted(bridge(name).capabilities)),
            *(_words(models_for(name, program)) or "-" for program in PROGRAMS),
        )
        for name in solver_names()
    ]
    return _table(("solver", "takes", *(f"{program} formulations" for program in PROGRAMS)), rows)


TABLES = {
    "methods": methods_table,
    "options": options_table,
    "formulations": formulations_table,
    "solvers": solvers_table,
}


def _defaults(method: Method) -> str:
    return ", ".join(f"`{name}={default!r}`" for name, default in method.options.items())


def _words(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
