"""What commands print: JSON or plain text, and nothing of a solver on standard output."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from cbs_opt.report.numbers import MISSING as MISSING
from cbs_opt.report.numbers import bound_text
from cbs_opt.system.plain import plain

if TYPE_CHECKING:
    from cbs_opt.report.record import PruneReport


def show(value: Any, lines: Iterable[str], as_json: bool) -> None:
    """Print a value as JSON, or the lines that say the same."""
    typer.echo(json.dumps(plain(value), allow_nan=False) if as_json else "\n".join(lines))


def number(value: float | None) -> str:
    """Return an objective to nine digits, as many as a gap of 1e-6 needs and some more."""
    return MISSING if value is None else f"{value:.9g}"


def lower(bound: float | None) -> str:
    """Return a lower bound to nine digits, rounded down: what is printed is a bound too."""
    return MISSING if bound is None else bound_text(bound, 9)


def aligned(values: Mapping[str, str]) -> list[str]:
    """Return a line for each name and its value, the values below each other."""
    width = max(map(len, values))
    return [f"{name.ljust(width)}  {value}" for name, value in values.items()]


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return the lines of a table whose first `left` columns are text and the others numbers."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    sides = ["<"] * left + [">"] * len(widths)

    def line(cells: Sequence[str]) -> str:
        placed = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=False))
        return "  ".join(placed).rstrip()

    return [line(headings), "  ".join("-" * width for width in widths), *map(line, rows)]


def comparison_lines(reports: Sequence[PruneReport]) -> list[str]:
    """Return one line a report, under the accuracy of the network before pruning."""
    from cbs_opt.report.tables import COLUMNS, OVERVIEW, results_table

    table = results_table(reports, OVERVIEW)
    dense = reports[0].evaluations[0]
    accuracy = COLUMNS["accuracy"].cell(dense and dense.accuracy)
    first = f"before pruning: accuracy {accuracy}, {reports[0].n} prunable weights"
    return [first, *text_table([column.name.lower() for column in table.columns], table.rows)]


@contextmanager
def solver_messages_on_stderr() -> Iterator[None]:
    """Send what native code writes to file descriptor 1 to standard error.

    SCIP and Gurobi announce an interrupt there, whatever their output options say.
    """
    sys.stdout.flush()
    stdout, stderr = 1, 2
    kept = os.dup(stdout)
    os.dup2(stderr, stdout)
    try:
        yield
    finally:
        if os.name == "posix":
            # What C buffered must leave before the descriptor is standard output again.
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, stdout)
        os.close(kept)


def yes_no(value: bool) -> str:
    """Return "yes" or "no"."""
    return "yes" if value else "no"
