"""Pictures of pruning runs, fit for print: colours of Okabe and Ito, each with its own marker and line.

Every function returns a `matplotlib.figure.Figure` built without pyplot, so nothing global changes;
save one with ``figure.savefig("name.pdf")``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbs_opt.report.comparison import evaluated_on
from cbs_opt.report.figure_style import (
    GRID,
    INK,
    OKABE_ITO,
    WIDTH,
    Style,
    dress,
    legend,
    marker,
    numbered_style,
    percent,
    single,
)
from cbs_opt.report.parts import LayerSummary
from cbs_opt.report.record import PruneReport

MAX_LAYERS = 60
MAX_PANELS = 9
LONGEST_TITLE = 26


def styles(reports: Sequence[PruneReport]) -> dict[str, Style]:
    """A style for each label, in order of first appearance."""
    labels = dict.fromkeys(report.label for report in reports)
    return {label: numbered_style(number) for number, label in enumerate(labels)}


def accuracy_against_sparsity(reports: Sequence[PruneReport]) -> Figure | None:
    """Accuracy of each method over achieved sparsity; None where no accuracy was measured."""
    measured = [(report, accuracy) for report in reports if (accuracy := _accuracy(report)) is not None]
    if not measured:
        return None
    figure, axes = single(height=4.0)
    for label, style in styles(reports).items():
        own = sorted((r.sparsity, 100.0 * accuracy) for r, accuracy in measured if r.label == label)
        if own:
            x, y = zip(*own, strict=True)
            axes.plot(x, y, linestyle=style.line, linewidth=1.6, label=label, **marker(style))
    before = [report.evaluations[0] for report, _ in measured]
    for value in {dense.accuracy for dense in before if dense and dense.accuracy is not None}:
        axes.axhline(100.0 * value, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            f"dense {100.0 * value:.1f} %",
            (0.99, 100.0 * value),
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
    """Predicted over measured loss increase on the curvature's samples; None where nothing was measured."""
    known = [
        (report, report.predicted_loss_increase, report.actual_loss_increase)
        for report in reports
        if report.predicted_loss_increase is not None and report.actual_loss_increase is not None
    ]
    points = [(r, p, a) for r, p, a in known if math.isfinite(p) and math.isfinite(a)]
    if not points:
        return None
    figure, axes = single(height=4.6)
    values = np.array([[p, a] for _, p, a in points])
    magnitudes = np.abs(values[values != 0.0])
    smallest = float(magnitudes.min()) if magnitudes.size else 1.0
    largest = float(magnitudes.max()) if magnitudes.size else 1.0
    threshold = max(smallest, 1e-6 * largest)
    low = -2.0 * largest if (values < 0).any() else 0.5 * threshold
    high = 2.0 * largest
    if (values <= 0).any():
        axes.set_xscale("symlog", linthresh=threshold)
        axes.set_yscale("symlog", linthresh=threshold)
        low = min(1.6 * float(values.min()), -0.3 * threshold)
    else:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label="as predicted")
    for label, style in styles(reports).items():
        own = sorted((r.sparsity, p, a) for r, p, a in points if r.label == label)
        if own:
            _, x, y = zip(*own, strict=True)
            axes.plot(x, y, linestyle=style.line, linewidth=0.8, label=label, **marker(style))
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel("Predicted loss increase")
    axes.set_ylabel("Measured loss increase")
    legend(axes, outside=True)
    return figure


def sparsity_by_layer(reports: Sequence[PruneReport]) -> Figure:
    """Sparsity of each layer: bars for one report, a dot a method for several.

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
    axes.axvline(total, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label=f"whole network {total:.1%}")
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
    """Histograms of the weights of the largest layers: all before, kept ones after; None without any."""
    layers = [layer for layer in report.layers if layer.weight_histogram_before is not None]
    if not layers:
        return None
    largest = sorted(layers, key=lambda layer: -layer.n)[:MAX_PANELS]
    shown = [layer for layer in layers if layer in largest]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 4.2, 0.55 + 1.85 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number < len(shown):
            _histogram(axes, shown[number])
        else:
            axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("Weights in bin", fontsize=8)
    for number in range(len(shown)):
        if number + columns >= len(shown):
            grid.flat[number].set_xlabel("Weight", fontsize=8)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def at_largest_sparsity(reports: Sequence[PruneReport]) -> list[PruneReport]:
    """The reports at the largest requested sparsity, one a label."""
    largest = max(report.requested_sparsity for report in reports)
    chosen = {report.label: report for report in reports if report.requested_sparsity == largest}
    return list(chosen.values())


def _histogram(axes: Axes, layer: LayerSummary) -> None:
    dress(axes)
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
    name = layer.name if len(layer.name) <= LONGEST_TITLE else f"…{layer.name[1 - LONGEST_TITLE :]}"
    axes.set_title(f"{name}\n{layer.sparsity:.1%} of {layer.n} zero", fontsize=8, color=INK)
    axes.tick_params(labelsize=7)


def _accuracy(report: PruneReport) -> float | None:
    after = report.evaluations[1]
    return None if after is None else after.accuracy
