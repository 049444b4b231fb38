"""The tables of a study's report, cells ready to print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from cbs_opt.report.tables import Column, Table
from cbs_opt.study.effects import Effect
from cbs_opt.study.statistics import (
    HEURISTIC,
    SHIFT_NODES,
    SHIFT_SECONDS,
    charged_seconds,
    ranking,
    shifted_geometric_mean,
    with_excess,
)
from cbs_opt.study.statuses import FAILURES, UNAVAILABLE


def percent_text(share: float) -> str:
    """Return a share in per cent, to two digits below ten."""
    return f"{100.0 * share:.0f} %" if share >= 0.1 or share == 0.0 else f"{100.0 * share:.2g} %"


METHODS = (
    Column(name="Method"),
    Column(name="Runs"),
    Column(name="Proved"),
    Column(name="Failed"),
    Column(name="Time (s)", show="{:.3g}".format),
    Column(name="Nodes", show="{:.0f}".format),
    *(Column(name=name, show=percent_text) for name in ("Open gap", "Excess", "Median", "Worst")),
)
TIME, EXCESS = 4, 7
"""Columns of `METHODS` whose best cells are stressed."""
EFFECTS = (
    Column(name="Method"),
    *(Column(name=name, text=True) for name in ("Option", "From", "To", "Measure")),
    Column(name="Factor", show="{:.3g}".format),
    *(Column(name=name) for name in ("95 % interval", "Pairs", "Blocks")),
)
ENDINGS = (
    Column(name="Method"),
    Column(name="Ending", text=True, show=lambda status: status.replace("_", " ")),
    Column(name="Runs"),
    Column(name="Reason given first", text=True, show=lambda note: note[:160]),
)
SETTINGS = ("time_limit", "rel_gap", "node_limit", "iteration_limit", "threads", "memory_gib", "grace")


def methods_table(table: pd.DataFrame) -> Table:
    """Return one row a method: how many runs ended how, shifted geometric means, gaps and excesses.

    Of one program, with labels. Bold: the shortest time among the methods that proved most, and the
    least mean excess of a heuristic.
    """
    rows: list[tuple[Any, ...]] = []
    excesses: dict[int, float] = {}
    rated = with_excess(table.assign(charged=charged_seconds(table)))
    for label, runs in rated.groupby("label", sort=False):
        heuristic = runs["kind"].isin(HEURISTIC).all()
        nodes = shifted_geometric_mean(runs["nodes"].dropna().to_numpy(float), SHIFT_NODES)
        if heuristic and runs["excess"].notna().any():
            excesses[len(rows)] = runs["excess"].mean()
        rows.append(
            (
                label,
                len(runs),
                None if heuristic else runs["proved"].sum(),
                runs["status"].isin(FAILURES).sum(),
                shifted_geometric_mean(runs["charged"].to_numpy(float), SHIFT_SECONDS),
                None if heuristic else nodes,
                runs.loc[~runs["proved"] & runs["bound"].notna(), "gap"].median(),
                runs["excess"].mean(),
                runs["excess"].median(),
                runs["excess"].max(),
            )
        )
    best = {(i, EXCESS) for i, excess in excesses.items() if excess == min(excesses.values())}
    ranks = list(ranking(table).values())
    if ranks and min(ranks)[0] < 0:
        best.add((ranks.index(min(ranks)), TIME))
    return _table(METHODS, rows, best=frozenset(best))


def endings_table(table: pd.DataFrame) -> Table | None:
    """Return how often runs ended without a usable answer, with one of the reasons; None if none did."""
    failed = table[table["status"].isin(FAILURES)].groupby(["label", "status"], sort=False)
    rows = [(*what, len(runs), runs["note"].iloc[0]) for what, runs in failed]
    return _table(ENDINGS, rows, wrap=True) if rows else None


def effects_table(effects: Sequence[Effect]) -> Table | None:
    """Return the factors by which options change time, nodes or objective; None if none varied."""
    rows = [
        (
            *(effect.method, effect.option, effect.base, effect.value, effect.measure, effect.ratio.value),
            f"{effect.ratio.low:.3g} to {effect.ratio.high:.3g}",
            *(effect.pairs, effect.blocks),
        )
        for effect in effects
    ]
    return _table(EFFECTS, rows) if rows else None


def settings_table(table: pd.DataFrame) -> Table:
    """Return limits, versions and machines; several values mean that the rows do not compare."""
    names = [*SETTINGS, *(name for name in table.columns if name.startswith(("version.", "machine.")))]
    rows = []
    for name in names:
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in table[name].dropna()]
        if values:
            rows.append((name.replace("_", " "), ", ".join(dict.fromkeys(values))))
    return _table((Column(name="Setting"), Column(name="Value", text=True)), rows, wrap=True)


def unavailable_only(table: pd.DataFrame) -> list[str]:
    """Return the labels whose every run says that the solver is not there."""
    absent = table["status"].eq(UNAVAILABLE).groupby(table["label"], sort=False).all()
    return [str(label) for label in absent.index[absent]]


def _table(columns: Sequence[Column], rows: Sequence[Sequence[Any]], **more: Any) -> Table:
    cells = (tuple(c.cell(value) for c, value in zip(columns, row, strict=True)) for row in rows)
    return Table(columns=tuple(columns), rows=tuple(cells), **more)
