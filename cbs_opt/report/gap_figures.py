"""Pictures of what was certified, and of where the quadratic model itself fails.

As in `cbs_opt.report.figures`, every function returns a `matplotlib.figure.Figure` built without pyplot,
or None where there is nothing to draw.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cbs_opt.report.figure_style import (
    DASHES,
    DOTS,
    INK,
    OKABE_ITO,
    Style,
    legend,
    marker,
    panels,
    panels_legend,
    percent,
    shortened,
    single,
)
from cbs_opt.report.numbers import OPTIMAL_GAP, gap_text
from cbs_opt.report.parts import BlockSummary
from cbs_opt.report.record import PruneReport

NAMED_BLOCKS = 40
"""Most blocks that are drawn one a line, with their names."""
LONGEST_NAME = 28
TITLE_CHARACTERS = 26
"""In a line of the title of a panel, of which three stand side by side."""
MAX_PANELS = 9

PREDICTED_SELECTION = Style(color=OKABE_ITO[4], marker="^", line=DOTS)
PREDICTED_UPDATE = Style(color=OKABE_ITO[0], marker="o", line="-")
MEASURED = Style(color=OKABE_ITO[1], marker="s", line="--")
BOUND = Style(color=INK, marker="_", line="none")


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
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        legend(axes, outside=True)
    return figure


def _gaps_by_name(blocks: Sequence[BlockSummary]) -> tuple[Figure, Axes]:
    figure, axes = single(height=max(1.6, 0.9 + 0.24 * len(blocks)))
    rows = np.arange(len(blocks))
    gaps = np.array([block.gap for block in blocks], dtype=float)
    optimal = gaps <= OPTIMAL_GAP
    style = marker(PREDICTED_UPDATE)
    axes.plot(gaps[~optimal], rows[~optimal], linestyle="none", **style)
    if optimal.any():
        hollow = style | {"markerfacecolor": "white", "markeredgecolor": OKABE_ITO[0], "markeredgewidth": 1.2}
        floor = np.full(int(optimal.sum()), OPTIMAL_GAP)
        axes.plot(floor, rows[optimal], linestyle="none", label="proved optimal", **hollow)
    axes.set_yticks(rows, [shortened(block.name, LONGEST_NAME) for block in blocks])
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    _log_percent(axes, gaps, axis="x")
    axes.set_xlabel("Certified gap (% of the objective of the block)")
    return figure, axes


def _gaps_in_order(blocks: Sequence[BlockSummary]) -> tuple[Figure, Axes]:
    """Draw gaps from smallest to largest, so that any share of the blocks can be read off."""
    figure, axes = single(height=3.2)
    gaps = np.sort(np.array([block.gap for block in blocks], dtype=float))
    share = (np.arange(gaps.size) + 1.0) / gaps.size
    optimal = float((gaps <= OPTIMAL_GAP).mean())
    axes.step(share, np.maximum(gaps, OPTIMAL_GAP), where="pre", color=OKABE_ITO[0], linewidth=1.8)
    if optimal > 0.0:
        label = f"proved optimal: {optimal:.1%} of {gaps.size:,} blocks"
        axes.plot([0.0, optimal], [OPTIMAL_GAP] * 2, color=OKABE_ITO[4], linewidth=4.0, label=label)
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(percent())
    _log_percent(axes, gaps, axis="y")
    axes.set_xlabel(f"Share of {gaps.size:,} blocks with at most this gap (%)")
    axes.set_ylabel("Certified gap (%)")
    return figure, axes


def _log_percent(axes: Axes, gaps: np.ndarray, *, axis: str) -> None:
    """Scale an axis by logarithms in per cent so that it holds `gaps`, with room for at least one decade."""
    shown = np.maximum(gaps, OPTIMAL_GAP)
    low, high = 0.6 * float(shown.min()), 1.7 * float(shown.max())
    if high < 12.0 * low:
        low, high = low / 3.0, high * 3.0
    chosen = axes.xaxis if axis == "x" else axes.yaxis
    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    (axes.set_xlim if axis == "x" else axes.set_ylim)(low, high)
    if high < 300.0 * low:
        chosen.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    chosen.set_major_formatter(FuncFormatter(lambda gap, _: f"{100.0 * gap:.3g}"))
    chosen.set_minor_formatter(NullFormatter())


def loss_against_sparsity(reports: Sequence[PruneReport]) -> Figure | None:
    """Return the loss increase predicted before and after the update, and measured: one panel a method.

    Where the curves part, the quadratic model fails; a certified bound below them is about the model
    alone. Increases that are not positive cannot be drawn on the logarithmic axis and are left out.
    """
    labels = list(dict.fromkeys(report.label for report in reports))
    drawn = []
    for label in labels[:MAX_PANELS]:
        runs = sorted((r for r in reports if r.label == label), key=lambda report: report.sparsity)
        compared = [r for r in runs if r.actual_loss_increase is not None]
        if any(r.predicted_loss_increase is not None for r in compared):
            drawn.append((label, runs))
    if not drawn:
        return None
    figure, every = panels(len(drawn), "Sparsity (%)", "Loss increase", shared=True)
    for axes, (label, runs) in zip(every, drawn, strict=True):
        _loss_panel(axes, label, runs)
    panels_legend(figure, every)
    return figure


Value = Callable[[PruneReport], float | None]

SERIES: tuple[tuple[str, Style, Value], ...] = (
    (
        "predicted, before the update",
        PREDICTED_SELECTION,
        lambda report: report.predicted_selection_loss if report.update else None,
    ),
    ("predicted, as written", PREDICTED_UPDATE, lambda report: report.predicted_loss_increase),
    ("measured", MEASURED, lambda report: report.actual_loss_increase),
    (
        "certified bound of its program",
        BOUND,
        lambda report: None if report.certified is None else report.certified.bound,
    ),
)


def _loss_panel(axes: Axes, label: str, reports: Sequence[PruneReport]) -> None:
    axes.set_yscale("log")
    for name, style, value in SERIES:
        values = [(report.sparsity, value(report)) for report in reports]
        points = [(x, y) for x, y in values if y is not None and math.isfinite(y) and y > 0.0]
        if points:
            x, y = zip(*points, strict=True)
            looks = marker(style) | {"markersize": 12.0 if style is BOUND else 5.0}
            if style is BOUND:
                looks |= {"markeredgecolor": INK, "markeredgewidth": 1.4}
            axes.plot(x, y, linestyle=style.line, linewidth=1.2, label=name, **looks)
    axes.set_title(textwrap.fill(label, TITLE_CHARACTERS), fontsize=8, color=INK)
    axes.xaxis.set_major_formatter(percent())
    axes.margins(x=0.1)
