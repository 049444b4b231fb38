"""Pictures of certified gaps: against damping and rank, and the cost of a step against the size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cbs_opt.report.figure_style import INK, Style, dress, legend, marker, numbered_style, single

Row = Mapping[str, Any]
FLOOR = 1e-6
"""Gaps at which a set counts as optimal; smaller ones are drawn here."""
WIDE = 8.2


def write_figures(case: str, rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draw what the case shows, as SVG; the paths written."""
    drawings = {"grid": gap_over_grid, "synthetic": cost_of_a_step}
    figure = drawings[case](rows) if case in drawings else None
    if figure is None:
        return []
    path = directory / f"certified_{case}.svg"
    figure.savefig(path, metadata={"Date": None})
    return [path]


def gap_over_grid(rows: Sequence[Row]) -> Figure | None:
    """Gap against rho, a line for each rank of synthetic blocks and for each size of digits blocks."""
    known = [row for row in rows if row["gap"] is not None and row["rho"] is not None]
    if not known:
        return None
    figure = Figure(figsize=(WIDE, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    synthetic = [row for row in known if row["block"].startswith("synthetic")]
    digits = [row for row in known if row["block"].startswith("digits")]
    for axes, own, title in (
        (left, synthetic, "Gaussian rows, n = {n}"),
        (right, digits, "a digits layer, parts of it and whole"),
    ):
        dress(axes)
        groups = _grouped(own)
        for number, (block, group) in enumerate(groups.items()):
            _line(axes, numbered_style(number), group, _label(block, group))
        axes.set_xscale("log")
        axes.set_xlabel("rho = damping / mean Fisher diagonal")
        sizes = sorted({row["n"] for row in own})
        axes.set_title(title.format(n=", ".join(map(str, sizes))), fontsize=9, color=INK)
        if groups:
            axes.legend(frameon=False, fontsize=7.5, title="n / effective rank", title_fontsize=8)
    left.set_yscale("log")
    _percent_ticks(left)
    left.set_ylabel("Certified gap (% of the objective)")
    return figure


def cost_of_a_step(rows: Sequence[Row]) -> Figure | None:
    """Seconds of one step of the relaxation against the number of weights, with a line of slope 1."""
    known = sorted((row["n"], row["seconds_per_step"]) for row in rows if row.get("seconds_per_step"))
    if len(known) < 2:
        return None
    n, seconds = (np.array(values, dtype=float) for values in zip(*known, strict=True))
    figure, axes = single(height=3.4)
    scale = float(np.exp(np.mean(np.log(seconds / n))))
    axes.plot(n, scale * n, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label="proportional to n")
    style = numbered_style(0)
    axes.plot(n, seconds, linestyle="none", label=f"measured, {rows[0]['m']} rows", **marker(style))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Weights of the block, n")
    axes.set_ylabel("Processor seconds a step")
    axes.set_xticks(n, [f"{size:,.0f}" for size in n], fontsize=8)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    legend(axes)
    return figure


def _grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["block"], []).append(row)
    return groups


def _label(block: str, group: Sequence[Row]) -> str:
    ratio = float(np.median([row["n"] / row["effective_rank"] for row in group]))
    words = f"{ratio:,.0f}" if ratio >= 10.0 else f"{ratio:.1f}"
    return words if block.startswith("synthetic") else f"{words} (n = {group[0]['n']:,})"


def _line(axes: Axes, style: Style, group: Sequence[Row], label: str) -> None:
    points = sorted((row["rho"], max(row["gap"], FLOOR)) for row in group)
    x, y = zip(*points, strict=True)
    axes.plot(x, y, linestyle=style.line, linewidth=1.3, label=label, **marker(style))


def _percent_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda gap, _: f"{100.0 * gap:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
