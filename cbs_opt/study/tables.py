"""The tables of a study's report, cells ready to print: as HTML through the templates, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cbs_opt.report.tables import Column, Table
from cbs_opt.study.effects import Effect
from cbs_opt.study.statistics import (
    HEURISTIC,
    SHIFT_NODES,
    SHIFT_SECONDS,
    charged_seconds,
    shifted_geometric_mean,
    with_excess,
)
from cbs_opt.study.statuses import FAILURES, UNAVAILABLE

MISSING = "-"


def methods_table(table: pd.DataFrame) -> Table:
    """One row a method: how many runs ended how, shifted geometric means, gaps and excesses.

    Of one program, with labels. Bold: the shortest time among the methods that proved most, and the
    least mean excess of a heuristic.
    """
    rated = with_excess(table.assign(charged=charged_seconds(table)))
    columns = (
        "Method",
        "Runs",
        "Proved",
        "Failed",
        "Time (s)",
        "Nodes",
        "Open gap",
        "Excess",
        "Median",
        "Worst",
    )
    rows, times, excesses = [], [], []
    for label, own in rated.groupby("label", sort=False):
        heuristic = own["kind"].isin(HEURISTIC).all()
        failed = own["status"].isin(FAILURES)
        open_gaps = own.loc[~own["proved"] & own["bound"].notna(), "gap"].dropna()
        seconds = shifted_geometric_mean(own["charged"].dropna().to_numpy(float), SHIFT_SECONDS)
        nodes = shifted_geometric_mean(own["nodes"].dropna().to_numpy(float), SHIFT_NODES)
        excess = float(own["excess"].mean())
        proved = int(own["proved"].sum())
        rows.append(
            (
                str(label),
                str(len(own)),
                MISSING if heuristic else str(proved),
                str(int(failed.sum())),
                seconds_text(seconds),
                MISSING if heuristic or math.isnan(nodes) else f"{nodes:.0f}",
                MISSING if open_gaps.empty else percent_text(float(open_gaps.median())),
                percent_text(excess),
                percent_text(float(own["excess"].median())),
                percent_text(float(own["excess"].max())),
            )
        )
        times.append((-proved, seconds) if not heuristic and proved else (0, math.inf))
        excesses.append(excess if heuristic and not math.isnan(excess) else math.inf)
    best = {(times.index(min(times)), 4)} if times and min(times)[0] < 0 else set()
    if np.isfinite(excesses).any():
        best |= {(i, 7) for i, value in enumerate(excesses) if value == min(excesses)}
    return _table(columns, rows, text=1, best=frozenset(best))


def endings_table(table: pd.DataFrame) -> Table | None:
    """Runs that ended without a usable answer: how often, and one of the reasons; None if none did."""
    failed = table[table["status"].isin(FAILURES)]
    if failed.empty:
        return None
    rows = [
        (str(label), str(status).replace("_", " "), str(len(own)), str(own["note"].iloc[0])[:160])
        for (label, status), own in failed.groupby(["label", "status"], sort=False)
    ]
    columns = ("Method", "Ending", "Runs", "Reason given first")
    return Table(
        columns=tuple(Column(name=name, text=name != "Runs") for name in columns), rows=tuple(rows), wrap=True
    )


def effects_table(found: Sequence[Effect]) -> Table | None:
    """Factors by which options change time, nodes or objective, with intervals; None if none varied."""
    if not found:
        return None
    columns = ("Method", "Option", "From", "To", "Measure", "Factor", "95 % interval", "Pairs", "Blocks")
    rows = [
        (
            effect.method,
            effect.option,
            effect.base,
            effect.value,
            effect.measure,
            f"{effect.ratio.value:.3g}",
            f"{effect.ratio.low:.3g} to {effect.ratio.high:.3g}",
            str(effect.pairs),
            str(effect.blocks),
        )
        for effect in found
    ]
    return _table(columns, rows, text=5)


def settings_table(table: pd.DataFrame) -> Table:
    """Limits, versions and machines of the rows; several values mean that the rows do not compare."""
    names = ["time_limit", "rel_gap", "node_limit", "iteration_limit", "threads", "memory_gib", "grace"]
    names += [name for name in table.columns if name.startswith(("version.", "machine."))]
    rows = []
    for name in names:
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in table[name].dropna()]
        if values:
            rows.append((name.replace("_", " "), ", ".join(dict.fromkeys(values))))
    columns = (Column(name="Setting"), Column(name="Value", text=True))
    return Table(columns=columns, rows=tuple(rows), wrap=True)


def unavailable_only(table: pd.DataFrame) -> list[str]:
    """Labels whose every run says that the solver is not there."""
    absent = table["status"].eq(UNAVAILABLE).groupby(table["label"], sort=False).all()
    return [str(label) for label in absent.index[absent]]


def markdown(table: Table) -> str:
    """A table as Markdown."""
    heads = [column.name for column in table.columns]
    lines = ["| " + " | ".join(heads) + " |"]
    sides = [" --- " if c.text or i == 0 else " ---: " for i, c in enumerate(table.columns)]
    lines.append("|" + "|".join(sides) + "|")
    for number, row in enumerate(table.rows):
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
        cells = [f"**{cell}**" if (number, i) in table.best else cell for i, cell in enumerate(cells)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent_text(share: float) -> str:
    """A share as per cent; a dash where there is none."""
    if math.isnan(share):
        return MISSING
    percent = 100.0 * share
    return f"{percent:.0f} %" if percent >= 10.0 or percent == 0.0 else f"{percent:.2g} %"


def seconds_text(seconds: float) -> str:
    """A time to three digits; a dash where there is none."""
    return MISSING if math.isnan(seconds) else f"{seconds:.3g}"


def _table(
    columns: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    *,
    text: int,
    best: frozenset[tuple[int, int]] = frozenset(),
) -> Table:
    heads = tuple(Column(name=name, text=0 < i < text) for i, name in enumerate(columns))
    return Table(columns=heads, rows=tuple(rows), best=best)
