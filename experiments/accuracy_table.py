"""Accuracy over seeds beside the published figures: as a frame, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.published import METHODS as PUBLISHED_METHODS
from experiments.published import published_accuracy

COUNTERPART: Mapping[str, str] = {"magnitude": "magnitude", "woodfisher": "woodfisher", "cbs": "cbs"}
"""Our method -> the published column it is compared with."""
COLUMNS = (
    "network",
    "sparsity",
    "method",
    "seeds",
    "accuracy",
    "accuracy_std",
    "recalibrated",
    "recalibrated_std",
    "published",
    "difference",
    "n_prune",
    "seconds",
)


def accuracy_frame(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a network, sparsity and method.

    Parameters
    ----------
    results : iterable of mapping
        Cells with "network", "sparsity", "method", "accuracy" (per cent), "n_prune", "seconds" and,
        for networks with batch normalisation, "accuracy_recalibrated".

    Returns
    -------
    pandas.DataFrame
        `COLUMNS`: mean accuracy and its sample standard deviation over seeds (NaN for one seed), the
        same with batch-norm statistics estimated anew (over the seeds that have it), the figure
        published for the same method, and the mean minus it (NaN where there is none).
    """
    cells = pd.DataFrame(list(results))
    if cells.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    if "accuracy_recalibrated" not in cells:
        cells["accuracy_recalibrated"] = None
    cells["accuracy_recalibrated"] = cells["accuracy_recalibrated"].astype(float)
    rows = []
    for _, group in cells.groupby(["network", "sparsity", "method"], sort=False):
        network, sparsity, method = (group[name].iloc[0] for name in ("network", "sparsity", "method"))
        mean = float(group["accuracy"].mean())
        figure = published_accuracy(network, COUNTERPART.get(method, ""), sparsity)
        published = float("nan") if figure is None else figure
        rows.append(
            {
                "network": network,
                "sparsity": sparsity,
                "method": method,
                "seeds": len(group),
                "accuracy": mean,
                "accuracy_std": float(group["accuracy"].std(ddof=1)),
                "recalibrated": float(group["accuracy_recalibrated"].mean()),
                "recalibrated_std": float(group["accuracy_recalibrated"].std(ddof=1)),
                "published": published,
                "difference": mean - published,
                "n_prune": int(group["n_prune"].iloc[0]),
                "seconds": float(group["seconds"].mean()),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def markdown_tables(frame: pd.DataFrame, network: str, methods: Sequence[str]) -> str:
    """Write the table of accuracies, then that with batch-norm statistics estimated anew."""
    table = markdown_table(frame, network, methods)
    if frame["recalibrated"].notna().any():
        head = "\nBatch-norm statistics estimated anew on training data:\n\n"
        table += head + markdown_table(frame, network, methods, column="recalibrated")
    return table


def markdown_table(
    frame: pd.DataFrame, network: str, methods: Sequence[str], *, column: str = "accuracy"
) -> str:
    """One line a sparsity: what is published, then ``mean ± standard deviation`` of each method."""
    head = ["sparsity", *(f"{name} (published)" for name in PUBLISHED_METHODS), *methods]
    lines = [_line(head), _line(["---"] * len(head))]
    chosen = frame[frame["network"] == network]
    for sparsity in sorted(chosen["sparsity"].unique()):
        published = (published_accuracy(network, name, float(sparsity)) for name in PUBLISHED_METHODS)
        at = chosen[chosen["sparsity"] == sparsity]
        measured = [_measured(at[at["method"] == method], column) for method in methods]
        cells = [f"{sparsity:g}", *("" if x is None else f"{x:.2f}" for x in published), *measured]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _measured(row: pd.DataFrame, column: str) -> str:
    if row.empty or math.isnan(row[column].iloc[0]):
        return ""
    mean, spread = row[column].iloc[0], row[f"{column}_std"].iloc[0]
    return f"{mean:.2f}" if math.isnan(spread) else f"{mean:.2f} ± {spread:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
