"""Pictures: performance profile, gap against time, traces, excess over the optimum, effects of options.

Fit for print: told apart by colour (Okabe and Ito), marker and line, so also in grey. Every function
returns a `matplotlib.figure.Figure`, or None where a study has nothing to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, NullFormatter
from numpy.typing import ArrayLike

from cbs_opt.report import figure_style
from cbs_opt.report.figure_style import GRID, INK, WIDTH, Style, marker, numbered_style, single
from cbs_opt.study.statistics import (
    CLOCKS,
    HEURISTIC,
    Effect,
    bootstrap_mean,
    clock,
    performance_profile,
    ranking,
    with_excess,
)
from formulations.problem import FloatArray

MOST_LINES = 7
MOST_PANELS = 4
MOST_ROWS = 24
SMALLEST_GAP = 1e-6
SMALLEST_EXCESS = 1e-4
"""Excesses up to this share are drawn on the axis: the usual gap of a proof does not tell them apart."""
LEAST_SECONDS = 1e-3
MARKERS_ON_LINE = 6
LONGEST_OF_TWO = 36
FEW_DECADES = 100.0
"""Ratio of the ends of an axis below which powers of ten alone are too few ticks."""
NARROW, WIDE = 5.0, 1e3
"""Ranges of a ratio up to which an axis has many ticks, or some."""
TRACES = (("objective", "incumbent", "-", "full"), ("bound", "bound", "--", "none"))
"""Columns of a trace, what they are called, and how lines and marks are drawn."""
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False, "fontsize": 8}
"""A legend above the axes."""


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
    del shown[MOST_LINES:]
    palette = styles(table)
    figure, axes = single(height=4.4)
    right = max(2.0 * max(float(proved[label].max()) for label in shown), 4.0)
    for label in shown:
        cases = len(ratios[label])
        x = np.concatenate([[1.0], proved[label], [right]])
        y = np.concatenate([[0.0], np.arange(1, proved[label].size + 1), [proved[label].size]]) / cases
        how = {"drawstyle": "steps-post", "markevery": _spread(len(x)), **_series(palette[label])}
        axes.plot(x, 100.0 * y, label=f"{label} ({proved[label].size}/{cases})", **how)
    axes.set_xscale("log", base=2 if right <= 2.0**14 else 10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlim=(1.0, right), ylim=(-2.0, 102.0), ylabel="Cases proved optimal (%)")
    axes.set_xlabel(f"{CLOCKS[clock(table)]} over that of the fastest method on the case (factor)")
    _legend_below(figure, axes)
    return figure


def gap_figure(table: pd.DataFrame) -> Figure | None:
    """Draw the median gap over all cases against time, as the traces tell; 100 % without a bound."""
    exact = table[~table["kind"].isin(HEURISTIC) & table["bound"].notna()]
    start, end = max(LEAST_SECONDS, 0.5 * float(exact["seconds"].min())), float(exact["seconds"].max())
    if exact.empty or end <= start:
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
        gaps = 100.0 * np.maximum(medians[label], floor)
        axes.plot(times, gaps, label=label, markevery=_spread(times.size), **_series(palette[label]))
    axes.set(xscale="log", yscale="log", xlim=(start, end), ylim=(100.0 * floor / 1.3, 130.0))
    axes.yaxis.set_major_formatter("{x:g}")
    _time_ticks(axes)
    axes.axhline(100.0 * floor, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("counted as optimal", (0.01, 100.0 * floor), xytext=(0, 3), fontsize=8, color=INK, **place)
    axes.set(xlabel="Wall-clock time (s)", ylabel="Median gap (%)")
    _legend_below(figure, axes)
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
    figure, grid = figure_style.panels(len(chosen), "Wall-clock time (s)", "Over the best objective (%)")
    figure.set_size_inches(WIDTH * (1.35 if len(chosen) > 1 else 1.0), 1.2 * figure.get_figheight())
    palette = styles(table)
    for axes, instance in zip(grid, chosen, strict=True):
        best = float(table.loc[table["instance"] == instance, "objective"].min())
        runs = traced[traced["instance"] == instance].drop_duplicates("label")
        _trace_panel(axes, runs, best, palette)
        axes.set_title(str(instance), fontsize=8, color=INK)
    figure_style.panels_legend(figure, grid)
    return figure


def excess_figure(table: pd.DataFrame) -> Figure | None:
    """Draw the excess of heuristics over proved optima: a mark a run, the mean, how many are optimal."""
    rows = _heuristics(table)
    if rows.empty:
        return None
    palette = styles(table)
    means = rows.groupby("label", sort=False)["excess"].mean().sort_values(ascending=False)
    labels = list(means.index[-MOST_ROWS:])
    figure, axes = single(height=1.1 + 0.36 * len(labels))
    for height, label in enumerate(labels):
        values = rows.loc[rows["label"] == label, "excess"].to_numpy(float)
        # Spread evenly in the order of the rows: nothing random in a picture.
        spread = 0.26 * np.linspace(-1.0, 1.0, values.size) if values.size > 1 else np.zeros(1)
        points = {**marker(palette[label]), "markersize": 4.5, "linestyle": "none", "alpha": 0.75}
        axes.plot(_floored(values), height + spread, **points)
        axes.plot([_floored(means[label])] * 2, [height - 0.38, height + 0.38], color=INK, linewidth=1.8)
    axes.plot([], [], color=INK, linewidth=1.8, label="mean")
    optimal = (rows["excess"] <= SMALLEST_EXCESS).groupby(rows["label"]).agg(["sum", "size"])
    names = [f"{label} ({optimal['sum'][label]}/{optimal['size'][label]})" for label in labels]
    axes.set_yticks(range(len(labels)), names)
    axes.set(ylim=(-0.6, len(labels) - 0.4), xlabel="Objective over the proved optimum (%)")
    axes.yaxis.grid(visible=False)
    _excess_axis(axes, rows["excess"], along="x")
    axes.legend(**ABOVE)
    return figure


def excess_against_figure(table: pd.DataFrame, column: str, title: str) -> Figure | None:
    """Draw the mean excess of heuristics over `column`, with the interval over blocks; None for one value.

    `column` is "n", "damping" or "sparsity"; `title` that of its axis, with the unit.
    """
    rows = _heuristics(table)
    places = sorted(rows[column].dropna().unique()) if not rows.empty else []
    if len(places) < 2:
        return None
    palette = styles(table)
    means = rows.groupby("label", sort=False)["excess"].mean().sort_values()
    figure, axes = single(height=4.4)
    labels = list(means.index[:MOST_LINES])
    for number, label in enumerate(labels):
        own = rows[rows["label"] == label]
        intervals = {
            place: bootstrap_mean(at["excess"].to_numpy(float), list(at["instance"]))
            for place, at in own.groupby(column)
        }
        x = _beside(np.array(list(intervals), dtype=float), places, number - 0.5 * (len(labels) - 1))
        y, low, high = _floored(list(intervals.values())).T
        axes.vlines(x, low, high, color=palette[label].color, linewidth=1.0, alpha=0.8)
        axes.plot(x, y, label=label, **_series(palette[label]))
    if column != "sparsity":
        axes.set_xscale("log", base=2 if column == "n" else 10)
    if column == "n":
        _plain_ticks(axes.xaxis, FixedLocator([float(place) for place in places]))
    _excess_axis(axes, rows["excess"], along="y")
    axes.set(xlabel=title, ylabel="Mean excess over the optimum (%)")
    _legend_below(figure, axes)
    return figure


def effects_figure(effects: Sequence[Effect]) -> Figure | None:
    """Draw the factors by which options change time and nodes (or objective), with intervals."""
    if not effects:
        return None
    keys = list(dict.fromkeys(effect.change for effect in effects))[:MOST_ROWS]
    measures = list(dict.fromkeys(effect.measure for effect in effects))
    figure, axes = single(height=1.2 + 0.42 * len(keys))
    figure.set_figwidth(WIDTH * 1.2)
    for number, measure in enumerate(measures):
        style = numbered_style(number)
        shift = 0.22 * (number - (len(measures) - 1) / 2.0)
        chosen = [e for e in effects if e.measure == measure and e.change in keys]
        heights = [keys.index(e.change) + shift for e in chosen]
        values, lows, highs = np.array([e.ratio for e in chosen]).reshape(-1, 3).T
        points = {**marker(style), "markeredgecolor": style.color, "ecolor": style.color, "elinewidth": 1.4}
        points |= {"fillstyle": "full" if number == 0 else "none", "linestyle": "none"}
        axes.errorbar(values, heights, xerr=[values - lows, highs - values], label=measure, **points)
    for height in range(len(keys) - 1):
        axes.axhline(height + 0.5, color=GRID, linewidth=0.8)
    methods = {method for method, *_ in keys}
    # Where all solve one formulation, the name of the solver tells them apart.
    several_models = len({method.partition(":")[2] for method in methods}) > 1
    names = [f"{option}: {base} → {value}" for _, option, base, value in keys]
    if len(methods) > 1:
        shown = [method if several_models else method.partition(":")[0] for method, *_ in keys]
        names = [f"{method}: {name}" for method, name in zip(shown, names, strict=True)]
    axes.set_yticks(range(len(keys)), names)
    axes.set(xscale="log", ylim=(len(keys) - 0.5, -0.5), xlabel="Factor, after over before")
    axes.yaxis.grid(visible=False)
    axes.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    _ratio_ticks(axes, [v for e in effects for v in (e.ratio.low, e.ratio.high)])
    axes.legend(ncols=len(measures), **ABOVE)
    return figure


def _trace_panel(axes: Axes, runs: pd.DataFrame, best: float, palette: dict[str, Style]) -> None:
    scale = max(abs(best), 1e-12)
    for _, run in runs.head(MOST_LINES // 2).iterrows():
        mark = {**marker(palette[run["label"]]), "markersize": 4.5, "drawstyle": "steps-post"}
        for name, shown, line, fill in TRACES:
            points = [(point["seconds"], point[name]) for point in run["trace"] if point[name] is not None]
            if not points:
                continue
            seconds, values = zip(*points, strict=True)
            mark |= {"linestyle": line, "fillstyle": fill, "markevery": _spread(len(points))}
            x, y = np.maximum(seconds, LEAST_SECONDS), 100.0 * (np.asarray(values) - best) / scale
            axes.plot(x, y, linewidth=1.3, label=f"{run['label']}, {shown}", **mark)
    axes.set_xscale("log")
    _time_ticks(axes)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.margins(y=0.1)
    axes.yaxis.set_major_formatter("{x:g}")


def _time_ticks(axes: Axes) -> None:
    """Set ticks on a log axis of seconds, also within a decade, where it has no tick of its own."""
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < FEW_DECADES else (1.0,)
    _plain_ticks(axes.xaxis, LogLocator(base=10, subs=subs, numticks=20))


def _plain_ticks(axis: Axis, locator: Locator) -> None:
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


def _series(style: Style) -> dict[str, Any]:
    """Return the arguments of `plot` for a line with its points."""
    return {"linestyle": style.line, "linewidth": 1.6, **marker(style)}


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend under the picture, where no line passes; long names in one column."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= LONGEST_OF_TWO else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _heuristics(table: pd.DataFrame) -> pd.DataFrame:
    """Return runs of heuristics on blocks whose optimum is proved."""
    rows = with_excess(table)
    return rows[rows["kind"].isin(HEURISTIC) & rows["excess"].notna()]


def _beside(x: FloatArray, places: Sequence[float], number: float) -> FloatArray:
    """Return places moved a little, so that the intervals of several methods stand side by side."""
    share = 0.025 * number
    if places[0] > 0.0 and places[-1] / places[0] > 4.0:
        return np.asarray(x * (places[-1] / places[0]) ** (share / len(places)))
    return np.asarray(x + share * (places[-1] - places[0]) / len(places))


def _floored(values: ArrayLike) -> FloatArray:
    return np.asarray(100.0 * np.maximum(np.asarray(values, dtype=np.float64), SMALLEST_EXCESS))


def _excess_axis(axes: Axes, values: pd.Series, *, along: str) -> None:
    """Set a log axis of per cent that ends where a proof no longer tells excesses apart."""
    top = 100.0 * max(2.0 * float(values.max()), 100.0 * SMALLEST_EXCESS)
    floor = 100.0 * SMALLEST_EXCESS
    axes.set(**{f"{along}scale": "log", f"{along}lim": (floor / 1.5, top)})
    axis = axes.xaxis if along == "x" else axes.yaxis
    _plain_ticks(axis, LogLocator(base=10, numticks=9))
    shown = FuncFormatter(lambda value, _: f"≤ {value:g}" if value <= 1.01 * floor else f"{value:g}")
    axis.set_major_formatter(shown)


def _ratio_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Write plain numbers, the more to a decade the narrower the range, with room at both ends."""
    low, high = min(*values, 0.8), max(*values, 1.25)
    axes.set_xlim(low / 1.2, high * 1.2)
    subs: tuple[float, ...] = (1.0,)
    if high / low < NARROW:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    elif high / low < WIDE:
        subs = (1.0, 2.0, 5.0)
    _plain_ticks(axes.xaxis, LogLocator(base=10, subs=subs, numticks=20))
