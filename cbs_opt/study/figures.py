"""Pictures of exact methods: performance profile, gap against time, traces of incumbent and bound.

Fit for print: told apart by colour (Okabe and Ito), marker and line, so also in grey. Every function
returns a `matplotlib.figure.Figure`, or None where a study has nothing to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, NullFormatter

from cbs_opt.report.figure_style import INK, WIDTH, Style, dress, marker, numbered_style, single
from cbs_opt.study.statistics import (
    CLOCKS,
    HEURISTIC,
    clock,
    performance_profile,
    ranking,
)
from formulations.problem import FloatArray

MOST_LINES = 7
MOST_PANELS = 4
SMALLEST_GAP = 1e-6
LEAST_SECONDS = 1e-3
MARKERS_ON_LINE = 6
LONGEST_OF_TWO = 36
FEW_DECADES = 100.0
"""Ratio of the ends of an axis below which powers of ten alone are too few ticks."""


def styles(table: pd.DataFrame) -> dict[str, Style]:
    """Return a style for each label, the same in every picture of a study.

    Exact methods come in the order of what they proved: pictures draw the first few, whose colours differ.
    """
    ranks = ranking(table)
    return {label: numbered_style(i) for i, label in enumerate(sorted(ranks, key=ranks.__getitem__))}


def profile_figure(table: pd.DataFrame) -> Figure | None:
    """Draw the share of cases that each method proves within a factor of the fastest one's time.

    Methods that proved nothing have no line; of more than `MOST_LINES` those that proved most and
    fastest are drawn. The legend has the cases proved.
    """
    ratios = performance_profile(table)
    proved = {label: values[np.isfinite(values)] for label, values in ratios.items()}
    shown = [label for label in ratios if proved[label].size]
    if len(ratios) < 2 or not shown:
        return None
    shown.sort(key=lambda label: (-proved[label].size, float(np.log(proved[label]).mean())))
    palette = styles(table)
    figure, axes = single(height=4.4)
    largest = max(float(proved[label].max()) for label in shown[:MOST_LINES])
    right = max(2.0 * largest, 4.0)
    for label in shown[:MOST_LINES]:
        cases = len(ratios[label])
        x = np.concatenate([[1.0], proved[label], [right]])
        y = np.concatenate([[0.0], np.arange(1, proved[label].size + 1), [proved[label].size]]) / cases
        style = palette[label]
        how = {"drawstyle": "steps-post", "markevery": _spread(len(x)), **series(style)}
        axes.plot(x, 100.0 * y, label=f"{label} ({proved[label].size}/{cases})", **how)
    axes.set_xscale("log", base=2 if right <= 2.0**14 else 10)
    axes.set_xlim(1.0, right)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-2.0, 102.0)
    axes.set_xlabel(f"{CLOCKS[clock(table)]} over that of the fastest method on the case (factor)")
    axes.set_ylabel("Cases proved optimal (%)")
    legend_below(figure, axes)
    return figure


def gap_figure(table: pd.DataFrame) -> Figure | None:
    """Draw the median gap over all cases against time, as the traces tell; 100 % without a bound."""
    exact = table[~table["kind"].isin(HEURISTIC)]
    exact = exact[exact["bound"].notna()]
    if exact.empty:
        return None
    start = max(LEAST_SECONDS, 0.5 * float(exact["seconds"].min()))
    end = float(exact["seconds"].max())
    if end <= start:
        return None
    times = np.geomspace(start, end, 200)
    floor = max(SMALLEST_GAP, float(exact["rel_gap"].max()))
    palette = styles(table)
    medians = {
        str(label): np.median([_gap_at(run, times) for _, run in rows.iterrows()], axis=0)
        for label, rows in table[table["label"].isin(exact["label"])].groupby("label", sort=False)
    }
    order = sorted(medians, key=lambda label: float(np.log(np.maximum(medians[label], floor)).mean()))
    figure, axes = single(height=4.4)
    for label in order[:MOST_LINES]:
        style = palette[label]
        gaps = 100.0 * np.maximum(medians[label], floor)
        axes.plot(times, gaps, label=label, markevery=_spread(times.size), **series(style))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(start, end)
    _time_ticks(axes)
    axes.set_ylim(100.0 * floor / 1.3, 130.0)
    axes.axhline(100.0 * floor, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("counted as optimal", (0.01, 100.0 * floor), xytext=(0, 3), fontsize=8, color=INK, **place)
    axes.set_xlabel("Wall-clock time (s)")
    axes.set_ylabel("Median gap (%)")
    legend_below(figure, axes)
    return figure


def traces_figure(table: pd.DataFrame) -> Figure | None:
    """Draw incumbent and bound against time on the blocks with the longest traces, a panel each.

    Both relative to the best objective of the study on that block.
    """
    traced = table[table["trace"].map(len) > 2]
    if traced.empty:
        return None
    lengths = traced.assign(points=traced["trace"].map(len)).groupby("instance", sort=False)["points"].max()
    chosen = list(lengths.sort_values(ascending=False).index[:MOST_PANELS])
    columns = min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(
        figsize=(WIDTH * (1.0 if columns == 1 else 1.35), 0.6 + 2.3 * lines), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False)
    palette = styles(table)
    for axes, instance in zip(grid.flat, chosen, strict=False):
        best = float(table.loc[table["instance"] == instance, "objective"].min())
        runs = traced[traced["instance"] == instance].drop_duplicates("label")
        _trace_panel(axes, runs, best, palette)
        axes.set_title(str(instance), fontsize=8, color=INK)
    for axes in list(grid.flat)[len(chosen) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("Wall-clock time (s)", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("Over the best objective (%)", fontsize=8)
    entries: dict[str, Artist] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(str(label), handle)
    where: dict[str, Any] = {"loc": "outside upper center", "ncols": 2, "frameon": False, "fontsize": 8}
    figure.legend(handles=list(entries.values()), labels=list(entries), **where)
    return figure


def _trace_panel(axes: Axes, runs: pd.DataFrame, best: float, palette: dict[str, Style]) -> None:
    dress(axes)
    scale = max(abs(best), 1e-12)
    for _, run in runs.head(MOST_LINES // 2).iterrows():
        style = palette[run["label"]]
        for name, line in (("objective", "-"), ("bound", "--")):
            points = [(point["seconds"], point[name]) for point in run["trace"] if point[name] is not None]
            if not points:
                continue
            seconds, values = zip(*points, strict=True)
            axes.plot(
                np.maximum(seconds, LEAST_SECONDS),
                100.0 * (np.asarray(values) - best) / scale,
                drawstyle="steps-post",
                linestyle=line,
                linewidth=1.3,
                markevery=_spread(len(points)),
                label=f"{run['label']}, {'incumbent' if name == 'objective' else 'bound'}",
                **{**marker(style), "markersize": 4.5, "fillstyle": "full" if line == "-" else "none"},
            )
    axes.set_xscale("log")
    _time_ticks(axes)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.margins(y=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=8)


def _time_ticks(axes: Axes) -> None:
    """Set ticks on a log axis of seconds, also within a decade, where it has no tick of its own."""
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < FEW_DECADES else (1.0,)
    plain_ticks(axes.xaxis, LogLocator(base=10, subs=subs, numticks=20))


def plain_ticks(axis: Axis, locator: Locator) -> None:
    """Write plain numbers at the places of `locator`, and nothing between them."""
    axis.set_major_locator(locator)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _gap_at(run: pd.Series, times: FloatArray) -> FloatArray:
    """Return the gap of a run at given times: 1 before its first bound, its last one after its end."""
    gaps = np.ones(times.size)
    points = [(p["seconds"], p["objective"], p["bound"]) for p in run["trace"]]
    if pd.notna(run["bound"]):
        points.append((run["seconds"], run["objective"], run["bound"]))
    for seconds, objective, bound in points:
        if objective is not None and bound is not None:
            gap = (objective - bound) / max(abs(objective), 1e-12)
            gaps[times >= seconds] = min(max(gap, 0.0), 1.0)
    return gaps


def _spread(points: int) -> Sequence[int]:
    """Return indices of a few markers along a line."""
    return sorted({round(i) for i in np.linspace(0, points - 1, min(points, MARKERS_ON_LINE))})


def series(style: Style) -> dict[str, Any]:
    """Return the arguments of `plot` for a line with its points."""
    return {"linestyle": style.line, "linewidth": 1.6, **marker(style)}


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend under the picture, where no line passes; long names in one column."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= LONGEST_OF_TWO else 1
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 8}
    figure.legend(handles=handles, labels=labels, **where)
