"""Rows as a study would have them, with numbers that can be worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from cbs_opt.study.results import Results, results_table
from cbs_opt.study.statistics import with_labels


def row(
    method: str,
    instance: str,
    seconds: float,
    *,
    kind: str = "exact",
    proved: bool = True,
    objective: float | None = 1.0,
    **more: Any,
) -> dict[str, Any]:
    """One row; `proved` False means stopped by its limit of ten seconds."""
    options = more.pop("options", {})
    identity = json.dumps([method, instance, options, more.get("seed", 0), more.get("program", "joint")])
    return {
        "run": identity,
        "instance": instance,
        "program": "joint",
        "method": method,
        "kind": kind,
        "options": options,
        "seed": 0,
        "n": 10,
        "n_prune": 5,
        "damping": 1e-5,
        "status": "optimal" if proved else "feasible",
        "limit": None if proved or kind != "exact" else "time",
        "note": "",
        "objective": objective,
        "bound": objective if proved else None,
        "gap": 0.0 if proved else None,
        "proved": proved,
        "seconds": seconds,
        "nodes": 5,
        "time_limit": 10.0,
        "rel_gap": 1e-4,
        "threads": 1,
        "trace": [],
        "versions": {"numpy": "1"},
        "machine": {"cores": 2},
        **more,
    }


def heuristic(method: str, instance: str, objective: float, **more: Any) -> dict[str, Any]:
    """A row of a method that proves nothing."""
    return row(method, instance, 0.01, kind="search", proved=False, objective=objective, **more)


def labelled(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table of the rows, with labels."""
    return with_labels(results_table(rows))


def results(rows: list[dict[str, Any]], *, planned: int | None = None, others: int = 0) -> Results:
    """The rows as what a folder holds."""
    return Results(
        name="made up",
        description="Not measured.",
        table=results_table(rows),
        planned=len(rows) if planned is None else planned,
        others=others,
        left_out=("highs: it takes none of these formulations",),
    )
