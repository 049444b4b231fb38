"""Draw the picture of the README: accuracy against sparsity, the published methods and ours.

    python -m experiments.first_picture

It reads ``docs/results/accuracy.csv``, whose rows say from which publication, or by which command and recipe,
each figure comes, and writes ``docs/figures/accuracy_light.svg`` and ``accuracy_dark.svg``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from cbs_opt.report.figure_style import OKABE_ITO

RESULTS = Path("docs/results/accuracy.csv")
FIGURES = Path("docs/figures")
PANELS = {"mlpnet_mnist": "MLPNet on MNIST", "resnet20_cifar10": "ResNet20 on CIFAR-10"}
BOTTOM, TOP = 5.0, 101.0
SPACING = 5.2
"""Least distance between two names at the right edge, in points of accuracy."""
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, _ = OKABE_ITO


@dataclass(frozen=True, kw_only=True)
class Line:
    """How one method is drawn."""

    name: str
    color: str
    marker: str
    dashed: bool = False
    ours: bool = False


LINES = {
    "magnitude": Line(name="magnitude", color="#8A8A8A", marker="o"),
    "woodfisher": Line(name="WoodFisher", color=ORANGE, marker="v"),
    "cbs": Line(name="CBS", color=GREEN, marker="^"),
    "chita": Line(name="CHITA", color=PURPLE, marker="D"),
    "chita_staged": Line(name="CHITA++, in stages", color=PURPLE, marker="D", dashed=True),
    "fast": Line(name='ours, "fast"', color=SKY, marker="s", ours=True),
    "balanced": Line(name='ours, "balanced"', color=BLUE, marker="s", ours=True),
    "best": Line(name='ours, "best"', color=VERMILION, marker="s", ours=True),
}


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of the page that the picture lies on."""

    ink: str
    grid: str
    paper: str


THEMES = {
    "light": Theme(ink="#24292F", grid="#DDDDDD", paper="#FFFFFF"),
    "dark": Theme(ink="#E6EDF3", grid="#3A4048", paper="#0D1117"),
}


def draw(results: pd.DataFrame, theme: Theme) -> Figure:
    """Return the picture, one panel a network.

    Parameters
    ----------
    results : pandas.DataFrame
        Columns of `experiments.accuracy_page`; see `drawn` for what is shown.
    theme : Theme

    Returns
    -------
    matplotlib.figure.Figure
        With a transparent background.
    """
    figure = Figure(figsize=(10.6, 3.9), layout="constrained")
    figure.patch.set_alpha(0.0)
    results = drawn(results)
    panels = figure.subplots(1, len(PANELS))
    for axes, (network, title) in zip(panels, PANELS.items(), strict=True):
        _dress(axes, theme)
        _panel(axes, results[results["network"] == network], theme)
        axes.set_title(title, loc="left", color=theme.ink, fontsize=11, fontweight="bold")
        axes.set_xlabel("weights pruned, %", color=theme.ink)
    panels[0].set_ylabel("test accuracy, %", color=theme.ink)
    return figure


def drawn(results: pd.DataFrame) -> pd.DataFrame:
    """Return what the picture shows: sparsities of published figures, statistics as recipes say."""
    shown = results[results["network"].isin(list(PANELS)) & (results["statistics"] != "kept")]
    published = shown.loc[shown["seeds"] == "published", ["network", "sparsity"]].drop_duplicates()
    return shown.merge(published, on=["network", "sparsity"])


def spread(heights: Sequence[float], spacing: float) -> list[float]:
    """Return heights at least `spacing` apart, in the order of `heights` and near them.

    Names that are too close form a group around their mean; groups that meet are merged.
    """
    order = np.argsort(heights, kind="stable")
    groups: list[list[float]] = []
    for height in np.asarray(heights, dtype=float)[order]:
        groups.append([float(height)])
        while len(groups) > 1 and _lowest(groups[-1], spacing) < _highest(groups[-2], spacing) + spacing:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [
        _lowest(group, spacing) + spacing * position for group in groups for position in range(len(group))
    ]
    result = [0.0] * len(placed)
    for index, height in zip(order, placed, strict=True):
        result[int(index)] = height
    return result


def _lowest(group: Sequence[float], spacing: float) -> float:
    """Return the height of the lowest name of a group; never below the first one's place on the axis."""
    return max(float(np.mean(group)) - spacing * (len(group) - 1) / 2.0, BOTTOM + spacing / 2.0)


def _highest(group: Sequence[float], spacing: float) -> float:
    return _lowest(group, spacing) + spacing * (len(group) - 1)


def _place(sparsity: pd.Series | np.ndarray) -> np.ndarray:
    """Return the place of a sparsity on the axis, where halving the kept weights is one step everywhere."""
    return -np.log2(1.0 - np.asarray(sparsity, dtype=float))


def _dress(axes: Axes, theme: Theme) -> None:
    axes.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=8.5)


def _panel(axes: Axes, results: pd.DataFrame, theme: Theme) -> None:
    sparsities = np.array(sorted(results["sparsity"].unique()))
    ends = []
    for method, line in LINES.items():
        rows = results[results["method"] == method].sort_values("sparsity")
        if rows.empty:
            continue
        color = theme.ink if method == "magnitude" else line.color
        axes.plot(
            _place(rows["sparsity"]),
            rows["accuracy"],
            color=color,
            alpha=1.0 if line.ours else 0.75,
            linestyle=(0, (4, 1.6)) if line.dashed else "-",
            linewidth=2.4 if line.ours else 1.2,
            marker=line.marker,
            markersize=6 if line.ours else 4,
            markeredgecolor=theme.paper,
            markeredgewidth=0.6,
            zorder=3 if line.ours else 2,
            clip_on=False,
        )
        ends.append((line, color, float(rows["accuracy"].iloc[-1])))
    places = _place(sparsities)
    reach = float(places[-1] - places[0])
    axes.xaxis.set_major_locator(FixedLocator(places.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{100 * sparsity:g}" for sparsity in sparsities])
    axes.set_xlim(float(places[0]) - 0.03 * reach, float(places[-1]) + 0.03 * reach)
    axes.set_ylim(BOTTOM, TOP)
    _name_ends(axes, float(places[-1]), reach, ends)


def _name_ends(axes: Axes, edge: float, reach: float, ends: Sequence[tuple[Line, str, float]]) -> None:
    """Write name and last value of every line to the right of it, tied to its end by a hair."""
    heights = [height for *_, height in ends]
    placed = spread(heights, SPACING)
    for (line, color, height), beside in zip(ends, placed, strict=True):
        axes.text(
            edge + 0.07 * reach,
            beside,
            f"{line.name} {height:.1f}",
            color=color,
            fontsize=9 if line.ours else 8.5,
            fontweight="bold" if line.ours else "normal",
            verticalalignment="center",
        )
    hairs = [
        [(edge + 0.02 * reach, height), (edge + 0.06 * reach, beside)]
        for height, beside in zip(heights, placed, strict=True)
    ]
    colors = [color for _, color, _ in ends]
    axes.add_collection(LineCollection(hairs, colors=colors, linewidths=0.6, alpha=0.6, clip_on=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both pictures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.first_picture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--out", type=Path, default=FIGURES, help=f"default {FIGURES}")
    options = parser.parse_args(arguments)
    results = pd.read_csv(options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        # Names of parts of the file are made from this, so that the same numbers give the same file.
        with mpl.rc_context({"svg.hashsalt": "cbs-opt"}):
            draw(results, theme).savefig(options.out / f"accuracy_{name}.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
