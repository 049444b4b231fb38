"""Exact against heuristic as a Markdown table and a picture: what a per cent of the objective is worth."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cbs_opt.report.figure_style import INK, dress, marker, numbered_style
from cbs_opt.study.statistics import Interval, bootstrap_mean
from formulations.files import write_atomically

EXACT = "exact"
RANDOM = "random set"
REL_GAP = 1e-4
"""Relative gap to which a choice called exact is proved."""
SMALL = 0.1
"""Random sets up to this excess count for the worth of the last per cent."""
FLOOR = 1e-3
NAME = "exact_vs_heuristic"
CAPTION = (
    "Change of test accuracy against the exact choice over the distance of the objective from the optimum: "
    "heuristics (mean and standard deviation over seeds), and random sets within a given distance."
)


def write_page(rows: pd.DataFrame, settings: Mapping[str, Any], out: Path) -> str:
    """Write page (.md), picture (.svg) and rows (.csv) to `out`; the page is returned.

    They are named `NAME`, with the network unless it is the digits one.
    """
    name = _name(settings)
    out.mkdir(parents=True, exist_ok=True)
    text = page(rows, settings)
    picture = io.BytesIO()
    worth_figure(rows).savefig(picture, format="svg", metadata={"Date": None})
    write_atomically(out / f"{name}.md", text.encode())
    write_atomically(out / f"{name}.svg", picture.getvalue())
    write_atomically(out / f"{name}.csv", rows.to_csv(index=False).encode())
    return text


def page(rows: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """Return the table, mean and standard deviation over seeds, and what the last per cent is worth."""
    parts = [
        f"# Exact against heuristic, row by row: {settings['network']}",
        f"    python -m experiments.{NAME} {_arguments(settings)}",
        "Every output neuron's incoming weights are one block. All methods prune the same number in each "
        "block and adjust the kept weights optimally, so they differ in the chosen sets alone. Objectives "
        "and bounds are sums over blocks: of the block-diagonal model, and only that. Mean ± standard "
        f"deviation over seeds. The exact method stops at a gap of {100.0 * REL_GAP:g} % in each block.",
        f"![{CAPTION}]({_name(settings)}.svg)",
    ]
    for sparsity, at in rows.groupby("sparsity"):
        dense = at.groupby("seed")["dense_accuracy"].first()
        parts += [
            f"## Sparsity {sparsity:g} (before pruning: {dense.mean():.2f} %)",
            _table(at[at["method"] != RANDOM]),
        ]
        proved = float(at.loc[at["method"] == EXACT, "proved"].mean())
        if proved < 1.0:
            parts.append(
                f"The exact method proved {proved:.1%} of the blocks in its time; elsewhere its row is the "
                "best set it found, and the gap to the bound says how much better another could be."
            )
        worth = worth_of_a_per_cent(at, "accuracy")
        loss = worth_of_a_per_cent(at, "train_loss")
        if worth is not None and loss is not None:
            parts.append(
                "One per cent of the objective, between the optimum and "
                f"{SMALL:.0%} above it, is worth {_signed(worth)} points of test accuracy and "
                f"{_signed(loss)} of training loss (slope over random sets, 95 % interval over seeds)."
            )
    return "\n\n".join(parts) + "\n"


def worth_of_a_per_cent(rows: pd.DataFrame, column: str) -> Interval | None:
    """Slope of `column` over the excess in per cent, through the exact choice of each seed.

    None if there is no random set within `SMALL` of an optimum.
    """
    origin = rows[rows["method"] == EXACT].set_index("seed")[column]
    near = rows[(rows["method"] == RANDOM) & (rows["excess"] <= SMALL) & (rows["excess"] > 0.0)]
    if near.empty:
        return None
    slopes = {}
    for seed, own in near.groupby("seed"):
        excess = 100.0 * own["excess"].to_numpy(float)
        change = own[column].to_numpy(float) - float(origin[seed])
        slopes[seed] = float(excess @ change / (excess @ excess))
    return bootstrap_mean(np.array(list(slopes.values())), list(slopes))


def worth_figure(rows: pd.DataFrame) -> Figure:
    """Change of test accuracy over excess above the optimum: random sets, and the methods on top."""
    levels = sorted(rows["sparsity"].unique())
    columns = min(2, len(levels))
    lines = -(-len(levels) // columns)
    figure = Figure(figsize=(3.6 * columns, 0.5 + 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    methods = [name for name in dict.fromkeys(rows["method"]) if name not in (EXACT, RANDOM)]
    for axes, sparsity in zip(grid.flat, levels, strict=False):
        dress(axes)
        at = rows[rows["sparsity"] == sparsity]
        origin = at[at["method"] == EXACT].set_index("seed")["accuracy"]
        change = at["accuracy"] - at["seed"].map(origin)
        excess = 100.0 * at["excess"].clip(lower=FLOOR)
        random = at["method"] == RANDOM
        if random.any():
            axes.plot(excess[random], change[random], ".", color="#999999", markersize=3, label="random sets")
        for number, name in enumerate(methods):
            own = at["method"] == name
            style = numbered_style(number)
            axes.errorbar(
                excess[own].median(),
                change[own].mean(),
                yerr=change[own].std(ddof=1) if own.sum() > 1 else None,
                linestyle="none",
                ecolor=style.color,
                label=name,
                **marker(style),
            )
        axes.axhline(0.0, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"≤ {value:g}" if value <= 100.1 * FLOOR else f"{value:g}")
        )
        axes.set_title(f"sparsity {sparsity:g}", fontsize=9, color=INK)
    for axes in list(grid.flat)[len(levels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("Objective over the optimum (%)")
    for axes in grid[:, 0]:
        axes.set_ylabel("Accuracy against exact (points)")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles=handles, labels=labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _name(settings: Mapping[str, Any]) -> str:
    return NAME if settings["network"] == "digits" else f"{NAME}_{settings['network']}"


def _arguments(settings: Mapping[str, Any]) -> str:
    words = []
    for name, value in settings.items():
        words += [
            f"--{name.replace('_', '-')} {one}" for one in (value if isinstance(value, list) else [value])
        ]
    return " ".join(words)


def _table(rows: pd.DataFrame) -> str:
    lines = [
        "| method | objective | above exact | gap to the bound | training loss | test accuracy | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, own in rows.groupby("method", sort=False):
        lines.append(
            f"| {name} | {own['objective'].mean():.4g} | {_percent(own['excess'])} | {_percent(own['gap'])} "
            f"| {_spread(own['train_loss'], 4)} | {_spread(own['accuracy'], 2)} "
            f"| {own['seconds'].mean():.2f} |"
        )
    return "\n".join(lines)


def _percent(shares: pd.Series) -> str:
    mean = 100.0 * float(shares.mean())
    return f"{mean:.2g} %" if abs(mean) < 10.0 else f"{mean:.0f} %"


def _spread(values: pd.Series, digits: int) -> str:
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.2g} ({interval.low:+.2g} to {interval.high:+.2g})"
