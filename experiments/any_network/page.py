"""The table of docs/guides/networks.md: one row a case."""

from __future__ import annotations

from collections.abc import Iterable

from cbs_opt.network.eligible import BIAS, NORM, by_reason
from experiments.any_network.outcome import Outcome
from formulations.errors import CbsError

OF_COURSE = {BIAS, NORM}
"""What is left out of most networks, and not worth a word in the table."""
HEAD = ("network", "batch", "eligible", "result")


def row(outcome: Outcome) -> str:
    """Return network, batch, share of the parameters that may be pruned, and result, as a table's row."""
    result = outcome.result
    if isinstance(result, CbsError):
        share, words = "-", f"refused: {str(result).partition('; ')[0]}"
    else:
        whole = result.n + sum(entry.n for entry in result.left_out)
        reasons = sorted(by_reason(result.left_out).keys() - OF_COURSE)
        share = f"{100 * result.n / whole:.0f} %"
        words = f"pruned; left out: {', '.join(reasons)}" if reasons else "pruned"
    return _line((outcome.case.network, outcome.case.batch, share, words))


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the whole table."""
    return "\n".join([_line(HEAD), _line(["---"] * len(HEAD)), *map(row, outcomes)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
