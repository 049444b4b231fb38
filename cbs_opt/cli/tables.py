"""Tables for a terminal: plain text, columns set apart by spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cbs_opt.report.numbers import MISSING as MISSING

if TYPE_CHECKING:
    from cbs_opt.report.record import PruneReport


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return the lines of a table whose first `left` columns are text and the others numbers."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = (
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
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
