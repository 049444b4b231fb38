"""Pictures of pruning runs, fit for print: colours of Okabe and Ito, each with its own marker and line.

Every function returns a `matplotlib.figure.Figure` built without pyplot, so nothing global changes;
save one with ``figure.savefig("name.pdf")``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbs_opt.report.comparison import evaluated_on
from cbs_opt.report.figure_style import (
    DOTS,
    GRID,
    INK,
    OKABE_ITO,
    Style,
    legend,
    marker,
    numbered_style,
    panels,
    panels_legend,
    percent,
    shortened,
    single,
)
from cbs_opt.report.parts import LayerSummary
from cbs_opt.report.record import PruneReport

MAX_LAYERS = 60
MAX_PANELS = 9
LONGEST_TITLE = 26
Points = dict[str, list[tuple[float, float]]]
"""Points of a curve, by label."""


def styles(reports: Sequence[PruneReport]) -> dict[str, Style]:
    """Return a style for each label, in order of first appearance."""
    labels = dict.fromkeys(report.label for report in reports)
    return {label: numbered_style(number) for number, label in enumerate(labels)}


def accuracy_against_sparsity(reports: Sequence[PruneReport]) -> Figure | None:
    """Return accuracy of each method over achieved sparsity; None where no accuracy was measured."""
    points: Points = {}
    dense = set()
    for report in sorted(reports, key=lambda report: report.sparsity):
        before, after = report.evaluations
        if after is not None and after.accuracy is not None:
            points.setdefault(report.label, []).append((report.sparsity, 100.0 * after.accuracy))
            dense |= set() if before is None or before.accuracy is None else {100.0 * before.accuracy}
    if not points:
        return None
    figure, axes = single(height=4.0)
    _draw_curves(axes, points, styles(reports), linewidth=1.6)
    for value in dense:
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=DOTS)
        axes.annotate(
            f"dense {value:.1f} %",
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK,
        )
    axes.set_xlabel("Sparsity (share of weights that are zero, %)")
    axes.set_ylabel(f"Accuracy on {evaluated_on(reports)} (%)")
    axes.xaxis.set_major_formatter(percent())
    axes.margins(y=0.08)
    legend(axes)
    return figure


def predicted_against_actual(reports: Sequence[PruneReport]) -> Figure | None:
    """Return predicted over measured loss increase on the curvature's samples; None without measurements."""
    points: Points = {}
    for report in sorted(reports, key=lambda report: report.sparsity):
        predicted, actual = report.predicted_loss_increase, report.actual_loss_increase
        if predicted is not None and actual is not None and math.isfinite(predicted + actual):
            points.setdefault(report.label, []).append((predicted, actual))
    if not points:
        return None
    figure, axes = single(height=4.6)
    low, high = _same_scales(axes, np.array([point for curve in points.values() for point in curve]))
    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=DOTS, label="as predicted")
    _draw_curves(axes, points, styles(reports), linewidth=0.8)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel("Predicted loss increase")
    axes.set_ylabel("Measured loss increase")
    legend(axes, outside=True)
    return figure


def _same_scales(axes: Axes, values: np.ndarray) -> tuple[float, float]:
    """Scale both axes by logarithms, near zero linearly where values need it; return limits for both."""
    magnitudes = np.abs(values[values != 0.0])
    smallest = float(magnitudes.min()) if magnitudes.size else 1.0
    largest = float(magnitudes.max()) if magnitudes.size else 1.0
    threshold = max(smallest, 1e-6 * largest)
    if (values > 0.0).all():
        axes.set(xscale="log", yscale="log")
        return 0.5 * threshold, 2.0 * largest
    axes.set_xscale("symlog", linthresh=threshold)
    axes.set_yscale("symlog", linthresh=threshold)
    return min(1.6 * float(values.min()), -0.3 * threshold), 2.0 * largest


def _draw_curves(axes: Axes, points: Points, looks: Mapping[str, Style], *, linewidth: float) -> None:
    for label, style in looks.items():
        if label in points:
            x, y = zip(*points[label], strict=True)
            axes.plot(x, y, linestyle=style.line, linewidth=linewidth, label=label, **marker(style))


def sparsity_by_layer(reports: Sequence[PruneReport]) -> Figure:
    """Return the sparsity of each layer: bars for one report, a dot a method for several.

    Of reports at several sparsities those at the largest requested one are drawn.
    """
    chosen = at_largest_sparsity(reports)
    names = [layer.name for layer in chosen[0].layers][:MAX_LAYERS]
    rows = np.arange(len(names))
    row_height = min(0.45, max(0.28, 0.14 * len(chosen) + 0.1))
    figure, axes = single(height=max(1.8, 1.0 + row_height * len(names)) + 0.12 * len(chosen))
    palette = styles(reports)
    if len(chosen) == 1:
        values = [layer.sparsity for layer in chosen[0].layers[:MAX_LAYERS]]
        axes.barh(rows, values, height=0.62, color=OKABE_ITO[0])
        for row, layer in zip(rows, chosen[0].layers, strict=False):
            inside = layer.sparsity > 0.3
            axes.annotate(
                f"{layer.sparsity:.1%} of {layer.n}",
                (layer.sparsity, row),
                xytext=(-4 if inside else 4, 0),
                textcoords="offset points",
                ha="right" if inside else "left",
                va="center",
                fontsize=8,
                color="white" if inside else INK,
            )
    else:
        spread = np.linspace(-0.3, 0.3, len(chosen))
        for shift, report in zip(spread, chosen, strict=True):
            by_name = {layer.name: layer.sparsity for layer in report.layers}
            x = [by_name.get(name, math.nan) for name in names]
            axes.plot(x, rows + shift, linestyle="none", label=report.label, **marker(palette[report.label]))
        for row in rows[:-1]:
            axes.axhline(row + 0.5, color=GRID, linewidth=0.8)
    total = chosen[0].sparsity
    axes.axvline(total, color=INK, linewidth=0.9, linestyle=DOTS, label=f"whole network {total:.1%}")
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(percent())
    hidden = len(chosen[0].layers) - len(names)
    axes.set_xlabel("Sparsity (%)" + (f"; {hidden} further layers not shown" if hidden else ""))
    axes.yaxis.grid(visible=False)
    low = min(layer.sparsity for report in chosen for layer in report.layers)
    axes.set_xlim(0.0 if len(chosen) == 1 else max(0.0, min(low, total - 0.1) - 0.02), 1.01)
    legend(axes, outside=True)
    return figure


def weights_before_and_after(report: PruneReport) -> Figure | None:
    """Return histograms of the largest layers: all weights before, kept ones after; None without any."""
    layers = [layer for layer in report.layers if layer.weight_histogram_before is not None]
    if not layers:
        return None
    largest = sorted(layers, key=lambda layer: -layer.n)[:MAX_PANELS]
    shown = [layer for layer in layers if layer in largest]
    figure, every = panels(len(shown), "Weight", "Weights in bin")
    for axes, layer in zip(every, shown, strict=True):
        _histogram(axes, layer)
    panels_legend(figure, every[:1])
    return figure


def at_largest_sparsity(reports: Sequence[PruneReport]) -> list[PruneReport]:
    """Return the reports at the largest requested sparsity, one a label."""
    largest = max(report.requested_sparsity for report in reports)
    chosen = {report.label: report for report in reports if report.requested_sparsity == largest}
    return list(chosen.values())


def _histogram(axes: Axes, layer: LayerSummary) -> None:
    highest = 10
    filled: dict[str, Any] = {"fill": True, "color": OKABE_ITO[4]}
    outlined: dict[str, Any] = {"fill": False, "edgecolor": INK, "linewidth": 1.0}
    for histogram, label, drawing in (
        (layer.weight_histogram_after, "kept, after", filled),
        (layer.weight_histogram_before, "all, before", outlined),
    ):
        if histogram is not None:
            axes.stairs(histogram.counts, histogram.edges, baseline=0.5, label=label, **drawing)
            highest = max(highest, *histogram.counts)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 1.5 * highest)
    name = shortened(layer.name, LONGEST_TITLE)
    axes.set_title(f"{name}\n{layer.sparsity:.1%} of {layer.n} zero", fontsize=8, color=INK)
