"""Pictures of pruning runs, fit for print: colours of Okabe and Ito, each with its own marker and line.

Every function returns a `matplotlib.figure.Figure` built without pyplot, so nothing global changes, or None
where there is nothing to draw; save one with ``figure.savefig("name.pdf")``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cbs_opt.report import figure_style as look
from cbs_opt.report.figure_style import DASHES, DOTS, GRID, INK, OKABE_ITO, Style, numbered_style
from cbs_opt.report.numbers import OPTIMAL_GAP, gap_text
from cbs_opt.report.parts import BlockSummary, LayerSummary
from cbs_opt.report.record import PruneReport
from cbs_opt.report.tables import LOSSES, evaluated_on, labelled_frame

MAX_LAYERS = 60
MAX_PANELS = 9
TITLE_CHARACTERS = 26
"""In a line of the title of a panel, of which three stand side by side."""
NAMED_BLOCKS = 40
"""Most blocks that are drawn one a line, with their names."""
LONGEST_NAME = 28

BEFORE = Style(color=OKABE_ITO[4], marker="^", line=DOTS)
PREDICTED = Style(color=OKABE_ITO[0], marker="o", line="-")
BOUND = Style(color=INK, marker="_", line="none")
LOSS_CURVES = {
    "loss_before_update": ("predicted, before the update", BEFORE),
    "predicted_loss_increase": ("predicted, as written", PREDICTED),
    "actual_loss_increase": ("measured", Style(color=OKABE_ITO[1], marker="s", line="--")),
    "certified_bound": ("certified bound of its program", BOUND),
}
"""Columns of `labelled_frame`, with their names in a legend."""


def styles(reports: Sequence[PruneReport]) -> dict[str, Style]:
    """Return a style for each label, in order of first appearance."""
    labels = dict.fromkeys(report.label for report in reports)
    return {label: numbered_style(number) for number, label in enumerate(labels)}


def accuracy_against_sparsity(reports: Sequence[PruneReport]) -> Figure | None:
    """Return accuracy of each method over achieved sparsity; None where no accuracy was measured."""
    frame = labelled_frame(reports).dropna(subset="accuracy")
    if frame.empty:
        return None
    figure, axes = look.single(height=4.0)
    percents = frame.assign(accuracy=100.0 * frame["accuracy"])
    _draw_curves(axes, percents, "sparsity", "accuracy", styles(reports), linewidth=1.6)
    for value in (100.0 * frame["accuracy_before"]).dropna().unique():
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=DOTS)
        text: dict[str, Any] = {"ha": "right", "fontsize": 8, "color": INK, "textcoords": "offset points"}
        coordinates = ("axes fraction", "data")
        axes.annotate(f"dense {value:.1f} %", (0.99, value), xycoords=coordinates, xytext=(0, 3), **text)
    axes.set_xlabel("Sparsity (share of weights that are zero, %)")
    axes.set_ylabel(f"Accuracy on {evaluated_on(reports)} (%)")
    axes.xaxis.set_major_formatter(look.percent())
    axes.margins(y=0.08)
    look.legend(axes)
    return figure


def predicted_against_actual(reports: Sequence[PruneReport]) -> Figure | None:
    """Return predicted over measured loss increase on the curvature's samples; None without measurements."""
    frame = labelled_frame(reports)
    values = frame[list(LOSSES)].to_numpy()
    measured = np.isfinite(values).all(axis=1)
    if not measured.any():
        return None
    figure, axes = look.single(height=4.6)
    low, high = _same_scales(axes, values[measured])
    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=DOTS, label="as predicted")
    _draw_curves(axes, frame[measured], *LOSSES, styles(reports), linewidth=0.8)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="Predicted loss increase", ylabel="Measured loss increase")
    axes.set_aspect("equal", adjustable="box")
    look.legend(axes, outside=True)
    return figure


def _same_scales(axes: Axes, values: np.ndarray) -> tuple[float, float]:
    """Scale both axes by logarithms, near zero linearly where values need it; return limits for both."""
    magnitudes = np.abs(values[values != 0.0]) if values.any() else np.ones(1)
    largest = float(magnitudes.max())
    threshold = max(float(magnitudes.min()), 1e-6 * largest)
    if (values > 0.0).all():
        axes.set(xscale="log", yscale="log")
        return 0.5 * threshold, 2.0 * largest
    axes.set_xscale("symlog", linthresh=threshold)
    axes.set_yscale("symlog", linthresh=threshold)
    return min(1.6 * float(values.min()), -0.3 * threshold), 2.0 * largest


def _draw_curves(
    axes: Axes, frame: pd.DataFrame, x: str, y: str, looks: Mapping[str, Style], *, linewidth: float
) -> None:
    for label, style in looks.items():
        curve = frame[frame["label"] == label].sort_values("sparsity", kind="stable")
        if len(curve):
            line = {"linestyle": style.line, "linewidth": linewidth, "label": label}
            axes.plot(curve[x].to_numpy(), curve[y].to_numpy(), **line, **look.marker(style))


def sparsity_by_layer(reports: Sequence[PruneReport]) -> Figure:
    """Return the sparsity of each layer: bars for one report, a dot a method for several.

    Of reports at several sparsities those at the largest requested one are drawn.
    """
    chosen = at_largest_sparsity(reports)
    names = [layer.name for layer in chosen[0].layers][:MAX_LAYERS]
    rows = np.arange(len(names))
    row_height = min(0.45, max(0.28, 0.14 * len(chosen) + 0.1))
    figure, axes = look.single(height=max(1.8, 1.0 + row_height * len(names)) + 0.12 * len(chosen))
    palette = styles(reports)
    if len(chosen) == 1:
        for row, layer in enumerate(chosen[0].layers[:MAX_LAYERS]):
            axes.barh(row, layer.sparsity, height=0.62, color=OKABE_ITO[0])
            shift, side, color = (-4, "right", "white") if layer.sparsity > 0.3 else (4, "left", INK)
            text: dict[str, Any] = {"ha": side, "va": "center", "fontsize": 8, "color": color}
            label, place = f"{layer.sparsity:.1%} of {layer.n}", (layer.sparsity, row)
            axes.annotate(label, place, xytext=(shift, 0), textcoords="offset points", **text)
    else:
        spread = np.linspace(-0.3, 0.3, len(chosen))
        for shift, report in zip(spread, chosen, strict=True):
            by_name = {layer.name: layer.sparsity for layer in report.layers}
            x = [by_name.get(name, math.nan) for name in names]
            style = look.marker(palette[report.label])
            axes.plot(x, rows + shift, linestyle="none", label=report.label, **style)
        for row in rows[:-1]:
            axes.axhline(row + 0.5, color=GRID, linewidth=0.8)
    total = chosen[0].sparsity
    axes.axvline(total, color=INK, linewidth=0.9, linestyle=DOTS, label=f"whole network {total:.1%}")
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(look.percent())
    hidden = len(chosen[0].layers) - len(names)
    axes.set_xlabel("Sparsity (%)" + (f"; {hidden} further layers not shown" if hidden else ""))
    axes.yaxis.grid(visible=False)
    low = min(layer.sparsity for report in chosen for layer in report.layers)
    axes.set_xlim(0.0 if len(chosen) == 1 else max(0.0, min(low, total - 0.1) - 0.02), 1.01)
    look.legend(axes, outside=True)
    return figure


def weights_before_and_after(report: PruneReport) -> Figure | None:
    """Return histograms of the largest layers: all weights before, kept ones after; None without any."""
    layers = [layer for layer in report.layers if layer.weight_histogram_before is not None]
    if not layers:
        return None
    largest = sorted(layers, key=lambda layer: -layer.n)[:MAX_PANELS]
    shown = [layer for layer in layers if layer in largest]
    figure, every = look.panels(len(shown), "Weight", "Weights in bin")
    for axes, layer in zip(every, shown, strict=True):
        _histogram(axes, layer)
    look.panels_legend(figure, every[:1])
    return figure


def at_largest_sparsity(reports: Sequence[PruneReport]) -> list[PruneReport]:
    """Return the reports at the largest requested sparsity, one a label."""
    largest = max(report.requested_sparsity for report in reports)
    chosen = {report.label: report for report in reports if report.requested_sparsity == largest}
    return list(chosen.values())


def _histogram(axes: Axes, layer: LayerSummary) -> None:
    highest = 10
    filled: dict[str, Any] = {"label": "kept, after", "fill": True, "color": OKABE_ITO[4]}
    outlined: dict[str, Any] = {"label": "all, before", "fill": False, "edgecolor": INK, "linewidth": 1.0}
    drawings = (layer.weight_histogram_after, filled), (layer.weight_histogram_before, outlined)
    for histogram, drawing in drawings:
        if histogram is not None:
            axes.stairs(histogram.counts, histogram.edges, baseline=0.5, **drawing)
            highest = max(highest, *histogram.counts)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 1.5 * highest)
    name = look.shortened(layer.name, TITLE_CHARACTERS)
    axes.set_title(f"{name}\n{layer.sparsity:.1%} of {layer.n} zero", fontsize=8, color=INK)


def gap_by_block(report: PruneReport) -> Figure | None:
    """Return the certified gap of every block, logarithmic: one a line, or, of many, in order of size.

    None for one block, which needs no picture.
    """
    bounded = [block for block in report.blocks if block.gap is not None]
    if report.certified is None or len(bounded) < 2:
        return None
    named = len(bounded) <= NAMED_BLOCKS
    figure, axes = (_gaps_by_name if named else _gaps_in_order)(bounded)
    total = report.certified.gap
    if total is not None and total > OPTIMAL_GAP:
        line = axes.axvline if named else axes.axhline
        line(total, color=INK, linewidth=0.9, linestyle=DASHES, label=f"of the sum: {gap_text(total)}")
    if axes.get_legend_handles_labels()[0]:
        look.legend(axes, outside=True)
    return figure


def _gaps_by_name(blocks: Sequence[BlockSummary]) -> tuple[Figure, Axes]:
    figure, axes = look.single(height=max(1.6, 0.9 + 0.24 * len(blocks)))
    rows = np.arange(len(blocks))
    gaps = np.array([block.gap for block in blocks], dtype=float)
    optimal = gaps <= OPTIMAL_GAP
    style = look.marker(PREDICTED)
    axes.plot(gaps[~optimal], rows[~optimal], linestyle="none", **style)
    if optimal.any():
        hollow = style | {"markerfacecolor": "white", "markeredgecolor": OKABE_ITO[0], "markeredgewidth": 1.2}
        floor = np.full(int(optimal.sum()), OPTIMAL_GAP)
        axes.plot(floor, rows[optimal], linestyle="none", label="proved optimal", **hollow)
    axes.set_yticks(rows, [look.shortened(block.name, LONGEST_NAME) for block in blocks])
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    _log_percent(axes, gaps, axis="x")
    axes.set_xlabel("Certified gap (% of the objective of the block)")
    return figure, axes


def _gaps_in_order(blocks: Sequence[BlockSummary]) -> tuple[Figure, Axes]:
    """Draw gaps from smallest to largest, so that any share of the blocks can be read off."""
    figure, axes = look.single(height=3.2)
    gaps = np.sort(np.array([block.gap for block in blocks], dtype=float))
    share = (np.arange(gaps.size) + 1.0) / gaps.size
    optimal = float((gaps <= OPTIMAL_GAP).mean())
    axes.step(share, np.maximum(gaps, OPTIMAL_GAP), where="pre", color=OKABE_ITO[0], linewidth=1.8)
    if optimal > 0.0:
        label = f"proved optimal: {optimal:.1%} of {gaps.size:,} blocks"
        axes.plot([0.0, optimal], [OPTIMAL_GAP] * 2, color=OKABE_ITO[4], linewidth=4.0, label=label)
    axes.xaxis.set_major_formatter(look.percent())
    _log_percent(axes, gaps, axis="y")
    label = f"Share of {gaps.size:,} blocks with at most this gap (%)"
    axes.set(xlim=(0.0, 1.0), xlabel=label, ylabel="Certified gap (%)")
    return figure, axes


def _log_percent(axes: Axes, gaps: np.ndarray, *, axis: str) -> None:
    """Scale an axis by logarithms in per cent so that it holds `gaps`, with room for at least one decade."""
    shown = np.maximum(gaps, OPTIMAL_GAP)
    low, high = 0.6 * float(shown.min()), 1.7 * float(shown.max())
    if high < 12.0 * low:
        low, high = low / 3.0, high * 3.0
    chosen = axes.xaxis if axis == "x" else axes.yaxis
    axes.set(**{f"{axis}scale": "log", f"{axis}lim": (low, high)})
    if high < 300.0 * low:
        chosen.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    chosen.set_major_formatter(FuncFormatter(lambda gap, _: f"{100.0 * gap:.3g}"))
    chosen.set_minor_formatter(NullFormatter())


def loss_against_sparsity(reports: Sequence[PruneReport]) -> Figure | None:
    """Return the loss increase predicted before and after the update, and measured: one panel a method.

    Where the curves part, the quadratic model fails; a certified bound below them is about the model
    alone. Increases that are not positive cannot be drawn on the logarithmic axis and are left out.
    """
    frame = labelled_frame(reports)
    compared = set(frame.dropna(subset=list(LOSSES))["label"])
    labels = [label for label in list(styles(reports))[:MAX_PANELS] if label in compared]
    if not labels:
        return None
    figure, every = look.panels(len(labels), "Sparsity (%)", "Loss increase", shared=True)
    for axes, label in zip(every, labels, strict=True):
        _loss_panel(axes, frame[frame["label"] == label].sort_values("sparsity", kind="stable"))
        axes.set_title(textwrap.fill(label, TITLE_CHARACTERS), fontsize=8, color=INK)
    look.panels_legend(figure, every)
    return figure


def _loss_panel(axes: Axes, runs: pd.DataFrame) -> None:
    axes.set_yscale("log")
    for column, (name, style) in LOSS_CURVES.items():
        points = runs[np.isfinite(runs[column]) & (runs[column] > 0.0)]
        if len(points):
            looks = look.marker(style) | {"markersize": 5.0}
            if style is BOUND:
                looks |= {"markersize": 12.0, "markeredgecolor": INK, "markeredgewidth": 1.4}
            looks |= {"linestyle": style.line, "linewidth": 1.2, "label": name}
            axes.plot(points["sparsity"].to_numpy(), points[column].to_numpy(), **looks)
    axes.xaxis.set_major_formatter(look.percent())
    axes.margins(x=0.1)
