"""The table of docs/guides/networks.md: one row a case."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.any_network.outcome import Outcome
from formulations.errors import CbsError

HEAD = ("network", "batch", "eligible", "result")


def row(outcome: Outcome) -> str:
    """Return network, batch, share of the parameters that may be pruned, and result, as a table's row."""
    result = outcome.result
    if isinstance(result, CbsError):
        share, words = "-", f"refused: {getattr(result, 'found', result)}"
    else:
        total = sum(parameter.numel() for parameter in outcome.trial.model.parameters())
        share, words = f"{result.n / total:.0%}".replace("%", " %"), "pruned"
    return _line((outcome.case.network, outcome.case.batch, share, words))


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the whole table."""
    return "\n".join([_line(HEAD), _line(["---"] * len(HEAD)), *map(row, outcomes)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
