"""Results behind a page, in a committed file beside it: pages keep what the ledger of a run no longer has.

``docs/results/admm.jsonl`` holds what `docs/results/admm.md` shows, a result a line as in a `Ledger`. A page
is made of that file and of the ledger of a run: new cells stand in the place of those of the same settings,
and both together are written back.

A result with ``seeds`` is the mean over these; its numbers have the digits that the page showed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.ledger import Ledger, line
from formulations.files import write_atomically

BESIDE = Path("docs/results")
"""Where pages and the results behind them are."""


def with_known(known: Path, *ledgers: Path) -> list[dict[str, Any]]:
    """Return the results of a committed file and of ledgers, the last of each key in the place of the first.

    Parameters
    ----------
    known : Path
        The file beside a page.
    *ledgers : Path
        Of runs. A file that is not there holds no results.

    Returns
    -------
    list of dict
    """
    return list(
        {entry["key"]: entry for path in (known, *ledgers) for entry in Ledger(path).results()}.values()
    )


def keep_known(known: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write results with their keys to the file beside a page, whole or not at all."""
    write_atomically(known, b"".join(line(entry) for entry in results))


def commits(results: Iterable[Mapping[str, Any]]) -> str:
    """Return the commits of results in order, each once; a result may name several."""
    return ", ".join(sorted({one for entry in results for one in entry["commit"].split(", ")}))


def seeds(results: Iterable[Mapping[str, Any]]) -> int:
    """Return how many seeds there are among results, those behind means included."""
    return len({seed for entry in results for seed in entry.get("seeds") or [entry["seed"]]})
