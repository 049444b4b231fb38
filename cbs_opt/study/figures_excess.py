"""Pictures of answers instead of times: excess over the optimum, and what an option changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike

from cbs_opt.report.figure_style import GRID, INK, WIDTH, dress, marker, numbered_style, single
from cbs_opt.study.effects import Effect, bootstrap_mean
from cbs_opt.study.figures import legend_below, plain_ticks, series, styles
from cbs_opt.study.statistics import HEURISTIC, with_excess
from formulations.problem import FloatArray

FLOOR = 1e-4
"""Excesses up to this share are drawn on the axis: the usual gap of a proof does not tell them apart."""
MOST_ROWS = 24
MOST_LINES = 7
NARROW, WIDE = 5.0, 1e3
"""Ranges of a ratio up to which an axis has many ticks, or some."""


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
    optimal = (rows["excess"] <= FLOOR).groupby(rows["label"]).agg(["sum", "size"])
    names = [f"{label} ({optimal['sum'][label]}/{optimal['size'][label]})" for label in labels]
    axes.set_yticks(range(len(labels)), names)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.yaxis.grid(visible=False)
    _excess_axis(axes, rows["excess"], along="x")
    axes.set_xlabel("Objective over the proved optimum (%)")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=8)
    return figure


def excess_against_figure(table: pd.DataFrame, column: str, title: str) -> Figure | None:
    """Draw the mean excess of heuristics over `column`, with the interval over blocks; None for one value.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of one program, with labels.
    column : str
        "n", "damping" or "sparsity".
    title : str
        Of the axis, with the unit.
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
        style = palette[label]
        x = _beside(np.array(list(intervals), dtype=float), places, number - 0.5 * (len(labels) - 1))
        y, low, high = (
            _floored([getattr(interval, name) for interval in intervals.values()])
            for name in ("value", "low", "high")
        )
        axes.vlines(x, low, high, color=style.color, linewidth=1.0, alpha=0.8)
        axes.plot(x, y, label=label, **series(style))
    if column != "sparsity":
        axes.set_xscale("log", base=2 if column == "n" else 10)
    if column == "n":
        plain_ticks(axes.xaxis, FixedLocator([float(place) for place in places]))
    _excess_axis(axes, rows["excess"], along="y")
    axes.set_xlabel(title)
    axes.set_ylabel("Mean excess over the optimum (%)")
    legend_below(figure, axes)
    return figure


def effects_figure(effects: Sequence[Effect]) -> Figure | None:
    """Draw the factors by which options change time and nodes (or objective), with intervals."""
    if not effects:
        return None
    keys = list(dict.fromkeys((e.method, e.option, e.base, e.value) for e in effects))[:MOST_ROWS]
    measures = list(dict.fromkeys(effect.measure for effect in effects))
    methods = {method for method, *_ in keys}
    several = len(methods) > 1
    models = {method.partition(":")[2] for method in methods}
    # Where all solve one formulation, the name of the solver tells them apart.
    shown = {method: method.partition(":")[0] if len(models) == 1 else method for method in methods}
    figure = Figure(figsize=(WIDTH * 1.2, 1.2 + 0.42 * len(keys)), layout="constrained")
    axes = figure.subplots()
    dress(axes)
    for number, measure in enumerate(measures):
        style = numbered_style(number)
        shift = 0.22 * (number - (len(measures) - 1) / 2.0)
        chosen = [
            e for e in effects if e.measure == measure and (e.method, e.option, e.base, e.value) in keys
        ]
        heights = [keys.index((e.method, e.option, e.base, e.value)) + shift for e in chosen]
        values = np.array([effect.ratio.value for effect in chosen])
        lows = np.array([effect.ratio.low for effect in chosen])
        highs = np.array([effect.ratio.high for effect in chosen])
        points = {**marker(style), "markeredgecolor": style.color}
        points["fillstyle"] = "full" if number == 0 else "none"
        lines: dict[str, Any] = {"linestyle": "none", "elinewidth": 1.4, "ecolor": style.color}
        axes.errorbar(values, heights, xerr=[values - lows, highs - values], label=measure, **lines, **points)
    for height in range(len(keys) - 1):
        axes.axhline(height + 0.5, color=GRID, linewidth=0.8)
    names = [
        (f"{shown[method]}: " if several else "") + f"{option}: {base} → {value}"
        for method, option, base, value in keys
    ]
    axes.set_yticks(range(len(keys)), names)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.yaxis.grid(visible=False)
    axes.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xscale("log")
    _ratio_ticks(axes, [v for e in effects for v in (e.ratio.low, e.ratio.high)])
    axes.set_xlabel("Factor, after over before")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(measures), frameon=False, fontsize=8)
    return figure


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
    return np.asarray(100.0 * np.maximum(np.asarray(values, dtype=np.float64), FLOOR))


def _excess_axis(axes: Axes, values: pd.Series, *, along: str) -> None:
    """Set a log axis of per cent that ends where a proof no longer tells excesses apart."""
    top = 100.0 * max(2.0 * float(values.max()), 100.0 * FLOOR)
    floor = 100.0 * FLOOR
    scale, limits = (axes.set_xscale, axes.set_xlim) if along == "x" else (axes.set_yscale, axes.set_ylim)
    axis = axes.xaxis if along == "x" else axes.yaxis
    scale("log")
    limits(floor / 1.5, top)
    axis.set_major_locator(LogLocator(base=10, numticks=9))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"≤ {value:g}" if value <= 1.01 * floor else f"{value:g}")
    )
    axis.set_minor_formatter(NullFormatter())


def _ratio_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Write plain numbers, the more to a decade the narrower the range, with room at both ends."""
    low, high = min(*values, 0.8), max(*values, 1.25)
    axes.set_xlim(low / 1.2, high * 1.2)
    subs: tuple[float, ...] = (1.0,)
    if high / low < NARROW:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    elif high / low < WIDE:
        subs = (1.0, 2.0, 5.0)
    plain_ticks(axes.xaxis, LogLocator(base=10, subs=subs, numticks=20))
