"""Write the table of accuracies: published figures, and ours by recipes that users call by name.

    python -m experiments.accuracy_page --ledger runs/recipes/results.jsonl

It reads the ledger of `experiments.recipes` and writes ``docs/results/accuracy.csv``, a row a cell that
says from which publication, or by which command on which commit, a figure comes, and prints the tables of
``docs/results/accuracy.md``. Cells of patterns such as 2:4 go to ``patterns.csv`` beside it. Cells that a
file has and the ledger has not stay as they are.
`experiments.first_picture` draws the picture from the same file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cbs_opt.recipe.named import NAMES
from experiments.first_picture import RESULTS
from experiments.ledger import Ledger
from experiments.published import ACCURACY, METHODS, SOURCES
from experiments.recipes import MAGNITUDE

SOURCE = {"cbs": "Yu et al., ICML 2022", "chita": "Benbaki et al., ICML 2023"}
"""Short names of `experiments.published.SOURCES`."""
BY_PAPER = {
    **dict.fromkeys(("magnitude", "woodfisher", "cbs"), "cbs"),
    "chita": "chita",
    "chita_staged": "chita",
}
RUN = ("network", "recipe", "recalibrate", "sparsity", "seed")
"""What tells a run from others: of those that several ledgers have the last one counts."""
COLUMNS = (
    "network",
    "method",
    "statistics",
    "sparsity",
    "accuracy",
    "deviation",
    "seeds",
    "samples",
    "seconds",
    "source",
    "commit",
)
PUBLISHED = "published"
PATTERNS = "patterns.csv"
CELL = ["network", "method", "statistics", "sparsity"]
"""What a figure is known by."""


def frame(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return published and measured figures.

    Parameters
    ----------
    results : iterable of mapping
        Cells of `experiments.recipes`.

    Returns
    -------
    pandas.DataFrame
        `COLUMNS`: mean accuracy in per cent and its sample standard deviation over seeds (NaN for one), the
        number of seeds ("published" for figures that others published), mean samples differentiated and
        processor seconds, "anew" or "kept" for batch-norm statistics, and where a figure comes from.
    """
    rows = [
        _published(network, share, method)
        for network in ACCURACY
        for share in ACCURACY[network]
        for method in METHODS
    ]
    cells = pd.DataFrame(list(results))
    if not cells.empty:
        groups = cells.groupby(["network", "recipe", "recalibrate", "sparsity"], sort=True)
        rows += [_measured(*key, group) for key, group in groups]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def with_earlier(figures: pd.DataFrame, earlier: pd.DataFrame) -> pd.DataFrame:
    """Return figures, and those measured earlier of cells that they have not."""
    measured = pd.concat([table[table["seeds"] != PUBLISHED] for table in (earlier, figures)])
    measured = measured.drop_duplicates(CELL, keep="last").sort_values(
        CELL, key=lambda column: column.map(str)
    )
    return pd.concat([figures[figures["seeds"] == PUBLISHED], measured], ignore_index=True)


def _published(network: str, sparsity: float, method: str) -> dict[str, Any]:
    paper = BY_PAPER[method]
    assert paper in SOURCES
    return {
        "network": network,
        "method": method,
        "statistics": "",
        "sparsity": sparsity,
        "accuracy": ACCURACY[network][sparsity][method],
        "seeds": PUBLISHED,
        "source": SOURCE[paper],
    }


def _measured(
    network: str, recipe: str, recalibrate: bool, sparsity: float | str, cells: pd.DataFrame
) -> dict[str, Any]:
    command = (
        f"python -m experiments.recipes --network {network} --recipes {recipe} --sparsity {_share(sparsity)}"
    )
    return {
        "network": network,
        "method": recipe,
        "statistics": "anew" if recalibrate else "kept",
        "sparsity": sparsity,
        "accuracy": round(float(cells["accuracy"].mean()), 4),
        "deviation": round(float(cells["accuracy"].std(ddof=1)), 4),
        "seeds": str(len(cells)),
        "samples": round(float(cells["samples"].mean())),
        "seconds": round(float(cells["processor_seconds"].mean()), 1),
        "source": f"{command} --seeds {len(cells)}" + ("" if recalibrate else " --keep-statistics"),
        "commit": " ".join(sorted(set(cells["commit"]))),
    }


def _share(sparsity: float | str) -> str:
    return sparsity if isinstance(sparsity, str) else f"{sparsity:g}"


def table(figures: pd.DataFrame, network: str) -> str:
    """Return the Markdown table of a network: a line a method, a column a sparsity, then the cost."""
    own = figures[figures["network"] == network].fillna({"statistics": ""})
    shares = sorted(own["sparsity"].unique())
    lines = [_line(["", *map(_share, shares), "samples", "processor seconds"])]
    lines.append(_line(["---"] * (len(shares) + 3)))
    order = [(method, "") for method in METHODS]
    order += [(name, statistics) for name in (MAGNITUDE, *NAMES) for statistics in ("anew", "kept")]
    for method, statistics in order:
        rows = own[(own["method"] == method) & (own["statistics"] == statistics)]
        if rows.empty:
            continue
        cells = [_cell(rows[rows["sparsity"] == share]) for share in shares]
        lines.append(
            _line(
                [_label(method, statistics), *cells, _range(rows["samples"], 0), _range(rows["seconds"], 0)]
            )
        )
    return "\n".join(lines) + "\n"


def _label(method: str, statistics: str) -> str:
    if not statistics:
        return f"{method}, published"
    return (method if method == MAGNITUDE else f'`"{method}"`') + (
        "" if statistics == "anew" else ", statistics kept"
    )


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    row = rows.iloc[0]
    if row["seeds"] == PUBLISHED:
        return f"{row['accuracy']:.2f}"
    spread = f" ± {row['deviation']:.2f}" if int(row["seeds"]) > 1 else ""
    return f"{row['accuracy']:.2f}{spread} ({row['seeds']})"


def _range(values: pd.Series, digits: int) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    low, high = (f"{value:,.{digits}f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _added(figures: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return figures with those of a file of which they have no other, written back to it."""
    if path.is_file():
        figures = with_earlier(figures, pd.read_csv(path))
    figures.to_csv(path, index=False)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.accuracy_page", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ledger", type=Path, nargs="+", required=True, help="of experiments.recipes")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default {RESULTS}")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.ledger if not path.is_file()]
    if missing:
        parser.error(f"--ledger: no file {', '.join(missing)}; python -m experiments.recipes writes one")
    cells = {
        tuple(str(entry.get(field)) for field in RUN): entry
        for path in options.ledger
        for entry in Ledger(path).results()
    }
    entries = list(cells.values())
    patterns = [entry for entry in entries if isinstance(entry["sparsity"], str)]
    shares = [entry for entry in entries if not isinstance(entry["sparsity"], str)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    beside = options.out.with_name(PATTERNS)
    figures = _added(frame(shares), options.out)
    for network in figures["network"].unique():
        sys.stdout.write(f"{network}\n\n{table(figures, network)}\n")
    if not patterns and not beside.is_file():
        return 0
    found = frame(patterns)
    figures = _added(found[found["seeds"] != PUBLISHED], beside)
    for network in figures["network"].unique():
        sys.stdout.write(f"{network}, patterns\n\n{table(figures, network)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
