"""How every picture looks: colours of Okabe and Ito, each with its own marker and line; no pyplot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
DOTS = (0, (1, 2))
DASHES = (0, (5, 2))
INK = "#222222"
GRID = "#DDDDDD"
WIDTH = 5.4
ABOVE: dict[str, Any] = {"loc": "outside upper center", "frameon": False, "fontsize": 8}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one method is drawn, told apart without colour by marker and line."""

    color: str
    marker: str
    line: Any


def numbered_style(number: int) -> Style:
    """Return the style of series `number`; no two of the first 42 are alike."""
    color, marker, line = (choices[number % len(choices)] for choices in (OKABE_ITO, MARKERS, LINES))
    return Style(color=color, marker=marker, line=line)


def single(height: float) -> tuple[Figure, Axes]:
    """Return a figure of the usual width with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    dress(axes)
    return figure, axes


def panels(count: int, x_label: str, y_label: str, *, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of small axes, labelled at its left and bottom; `shared`: all have the same limits."""
    columns = 2 if count == 4 else min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 4.2, 0.7 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(y_label, fontsize=8)
    every = list(grid.flat[:count])
    for axes in every:
        dress(axes)
        axes.tick_params(labelsize=7)
    for axes in every[-columns:]:
        axes.set_xlabel(x_label, fontsize=8)
        axes.tick_params(labelbottom=True)
    return figure, every


def panels_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Draw one legend above all panels, each series once, in the order of the fullest panel."""
    drawn: dict[str, Artist] = {}
    for axes in sorted(panels, key=lambda axes: len(axes.get_lines()), reverse=True):
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    figure.legend(list(drawn.values()), list(drawn), ncols=2, **ABOVE)


def shortened(name: str, length: int) -> str:
    """Return a name with its beginning left out where it is longer than `length` characters."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def dress(axes: Axes) -> None:
    """Draw thin grey spines and a grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def marker(style: Style) -> dict[str, Any]:
    """Return the arguments of `plot` for the points of a series."""
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.7}
    return {"color": style.color, "marker": style.marker, "markersize": 6.5, **edge}


def percent() -> FuncFormatter:
    """Return ticks of a share in per cent, without the sign."""
    return FuncFormatter(lambda share, _: f"{100.0 * share:.6g}")


def legend(axes: Axes, *, outside: bool = False) -> None:
    """Draw a legend without a frame, within the axes or above them in as many columns as fit."""
    if not outside:
        axes.legend(frameon=False, fontsize=8)
        return
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure(root=True)
    assert figure is not None
    longest = max((len(str(label)) for label in labels), default=0)
    columns = max(1, min(3, int(figure.get_figwidth() / (0.07 * longest + 0.6))))
    figure.legend(handles, labels, ncols=columns, **ABOVE)
