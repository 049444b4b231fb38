"""How every picture looks: colours of Okabe and Ito, each with its own marker and line; no pyplot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
INK = "#222222"
GRID = "#DDDDDD"
WIDTH = 5.4


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one method is drawn, told apart without colour by marker and line."""

    color: str
    marker: str
    line: Any


def numbered_style(number: int) -> Style:
    """The style of series `number`; no two of the first 42 are alike."""
    return Style(
        color=OKABE_ITO[number % len(OKABE_ITO)],
        marker=MARKERS[number % len(MARKERS)],
        line=LINES[number % len(LINES)],
    )


def single(height: float) -> tuple[Figure, Axes]:
    """A figure of the usual width with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    dress(axes)
    return figure, axes


def dress(axes: Axes) -> None:
    """Thin grey spines and grid, behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def marker(style: Style) -> dict[str, Any]:
    """Arguments of `plot` for the points of a series."""
    return {
        "color": style.color,
        "marker": style.marker,
        "markersize": 6.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
    }


def percent() -> FuncFormatter:
    """Ticks of a share as per cent, without the sign."""
    return FuncFormatter(lambda share, _: f"{100.0 * share:.6g}")


def legend(axes: Axes, *, outside: bool = False) -> None:
    """A legend without a frame, within the axes or above them in as many columns as there is room for."""
    if not outside:
        axes.legend(frameon=False, fontsize=8)
        return
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure(root=True)
    assert figure is not None
    longest = max((len(str(label)) for label in labels), default=0)
    columns = max(1, min(3, int(figure.get_figwidth() / (0.07 * longest + 0.6))))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
