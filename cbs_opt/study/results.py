"""The rows of a study as a table: in memory, and as Parquet for other programs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cbs_opt.study.store import Row, read_plan, read_rows
from formulations.files import write_atomically

PARQUET = "results.parquet"

FIRST = (
    *("run", "instance", "block", "n", "n_prune", "damping", "program", "method", "kind", "options", "seed"),
    *("status", "limit", "note", "objective", "bound", "certified_bound", "gap", "proved"),
    *("seconds", "cpu_seconds", "nodes", "iterations", "peak_memory"),
    *("time_limit", "rel_gap", "node_limit", "iteration_limit", "threads", "grace", "memory_gib", "started"),
)
"""Columns that every table has, in this order; an option, a version and the machine follow."""
NUMBERS = (
    *("damping", "objective", "bound", "certified_bound", "gap", "seconds", "cpu_seconds"),
    *("nodes", "iterations", "peak_memory", "node_limit", "iteration_limit"),
)
GROUPS = {"options": "option", "versions": "version", "machine": "machine"}
"""Mappings in a row, and what their entries are called as columns: ``option.search``."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a folder holds of a study.

    Attributes
    ----------
    name, description : str
    table : pandas.DataFrame
        One row a run of the plan that is done, in the order of the plan; see `results_table`.
    planned : int
        Runs of the plan.
    others : int
        Rows of runs that the plan no longer has.
    left_out : tuple of str
        Combinations that do not exist.
    """

    name: str
    description: str
    table: pd.DataFrame
    planned: int
    others: int
    left_out: tuple[str, ...]


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Read the folder of a study, finished or not.

    Raises
    ------
    StudyFolderError
        If it holds none, or is damaged.
    """
    plan = read_plan(Path(folder))
    rows = read_rows(Path(folder))
    fingerprints = [run["run"] for run in plan["runs"]]
    done = [rows[fingerprint] for fingerprint in fingerprints if fingerprint in rows]
    return Results(
        name=plan["name"],
        description=plan["description"],
        table=results_table(done),
        planned=len(fingerprints),
        others=len(rows) - len(done),
        left_out=tuple(plan["left_out"]),
    )


def results_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return rows as a data frame.

    Returns
    -------
    pandas.DataFrame
        The columns of `FIRST`; ``option.<name>``, ``version.<name>`` and ``machine.<name>``; `trace`, a
        list of points with seconds, nodes, objective and bound; `extra`, JSON text. `options` is JSON
        text too, so that it can be grouped by.
    """
    flat = [_flat(row) for row in rows]
    table = pd.DataFrame(flat)
    named = [name for name in table.columns if name not in FIRST and name not in ("trace", "extra")]
    table = table.reindex(columns=[*FIRST, *named, "trace", "extra"])
    table = table.astype(dict.fromkeys(NUMBERS, float))
    table["proved"] = table["proved"].eq(True)
    return table


def write_parquet(folder: Path, rows: Iterable[Row]) -> Path:
    """Write the rows as ``results.parquet``, atomically; the path of the file."""
    table = results_table(rows)
    for name in table.columns:
        if name.startswith("option."):
            # One option may be a number for one solver and a word for another.
            table[name] = table[name].map(lambda value: value if pd.isna(value) else json.dumps(value))
    buffer = io.BytesIO()
    table.to_parquet(buffer, engine="pyarrow", index=False)
    write_atomically(folder / PARQUET, buffer.getvalue())
    return folder / PARQUET


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name not in GROUPS}
    for name, prefix in GROUPS.items():
        flat |= {f"{prefix}.{key}": value for key, value in row.get(name, {}).items()}
    flat["options"] = json.dumps(row["options"], sort_keys=True)
    flat["trace"] = row.get("trace") or []
    flat["extra"] = json.dumps(row.get("extra") or {}, sort_keys=True)
    return flat
