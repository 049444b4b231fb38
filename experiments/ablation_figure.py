"""The picture of an ablation: a line for every variant, a marker for every sparsity."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbs_opt.report.figure_style import INK, dress, numbered_style
from cbs_opt.report.figure_style import marker as marker_style

TITLES = {
    "built": "Built up from magnitude pruning",
    "changed": "The whole recipe with one change",
    "defaults": "A call with these defaults",
}
WIDTH = 6.4
LINE_HEIGHT = 0.21


def draw(frame: pd.DataFrame) -> Figure:
    """Test accuracy of every row of `experiments.ablation.ablation_frame`.

    Parameters
    ----------
    frame : pandas.DataFrame
        Not empty.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a group on a common axis, rows from top to bottom in the order of the frame; bars are
        standard deviations over seeds.
    """
    groups = list(frame["group"].unique())
    labels = [list(frame.loc[frame["group"] == group, "label"].unique()) for group in groups]
    counts = [len(names) for names in labels]
    figure = Figure(
        figsize=(WIDTH, LINE_HEIGHT * sum(counts) + 0.5 * len(groups) + 0.8), layout="constrained"
    )
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for axes, group, names in zip(panels, groups, labels, strict=True):
        _panel(axes, frame[frame["group"] == group], names, sorted(frame["sparsity"].unique()))
        axes.set_title(TITLES[group], fontsize=9, color=INK, loc="left")
    panels[-1].set_xlabel("test accuracy, %")
    handles, names = panels[0].get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=8)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, names: list[str], levels: list[float]) -> None:
    """Draw the rows of one group, the first on top."""
    dress(axes)
    for number, level in enumerate(levels):
        own = rows[rows["sparsity"] == level].set_index("label")
        heights = [names.index(name) for name in own.index]
        axes.errorbar(
            own["accuracy"],
            heights,
            xerr=own["accuracy_std"].fillna(0.0),
            linestyle="none",
            elinewidth=1.0,
            ecolor=numbered_style(number).color,
            label=f"sparsity {level:g}",
            **marker_style(numbered_style(number)),
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
