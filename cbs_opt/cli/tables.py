"""Tables for a terminal: plain text, columns set apart by spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbs_opt.network.evaluation import Evaluation
    from cbs_opt.report.record import PruneReport

MISSING = "-"


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table whose first `left` columns are text and the others numbers."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = (
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(placed).rstrip()

    return [line(headings), "  ".join("-" * width for width in widths), *map(line, rows)]


def comparison_lines(reports: Sequence[PruneReport]) -> list[str]:
    """One line a report, under the accuracy of the network before pruning."""
    from cbs_opt.report.comparison import evaluations
    from cbs_opt.report.text import gap_text

    headings = (
        "method",
        "sparsity",
        "accuracy",
        "loss",
        "predicted increase",
        "measured increase",
        "certified gap",
        "seconds",
    )
    rows = []
    for report in reports:
        after, certified = evaluations(report)[1], report.certified
        rows.append(
            (
                report.label,
                f"{report.sparsity:.4f}",
                _accuracy(after),
                MISSING if after is None else _value(after.loss),
                _value(report.predicted_loss_increase),
                _value(report.actual_loss_increase),
                MISSING if certified is None or certified.gap is None else gap_text(certified.gap),
                f"{report.total_seconds:.2f}",
            )
        )
    dense = evaluations(reports[0])[0]
    first = f"before pruning: accuracy {_accuracy(dense)}, {reports[0].n} prunable weights"
    return [first, *text_table(headings, rows)]


def _accuracy(evaluation: Evaluation | None) -> str:
    accuracy = None if evaluation is None else evaluation.accuracy
    return MISSING if accuracy is None else f"{accuracy:.2%}"


def _value(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"
