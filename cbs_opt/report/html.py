"""One self-contained HTML page for one pruning run or several: no network, no scripts, pictures inline."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from cbs_opt.report import figures, tables
from cbs_opt.report.numbers import bytes_text, gap_text, number_text, percent_text, seconds_text
from cbs_opt.report.record import PruneReport
from cbs_opt.report.tables import Table, evaluated_on
from formulations.errors import ArgumentError
from formulations.files import write_atomically

LOSS_CAPTION = (
    "Increase of the mean loss on the curvature's samples against sparsity. Where measured and predicted "
    "part, the quadratic model fails, however small the gap of its optimum."
)
GAP_CAPTION = (
    "How far above the optimum of its program the chosen set of each block can be at most, as a share of its "
    "value. This is about the quadratic model of the loss, not about accuracy."
)
PREDICTION_CAPTION = (
    "Increase of the mean loss on the curvature's samples: as the quadratic model predicts it, "
    "and as measured. Points above the dotted line lost more than predicted."
)
HISTOGRAM_CAPTION = "Weights of the largest layers: all of them before, the kept ones after (zeros left out)."
Part = tuple[str, Table | None, str]
"""Heading, table and note; left out where there is no table."""


def write_comparison(
    reports: Sequence[PruneReport], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Write one HTML page about one report, or comparing several in the order in which they are listed.

    The file at `path` is replaced in one step; `title` is the heading of the page. Raises `ArgumentError`
    if there is no report; `OSError` if the file cannot be written.
    """
    write_atomically(Path(path), render_comparison(reports, title=title).encode())


def render_comparison(reports: Sequence[PruneReport], *, title: str | None = None) -> str:
    """Return the page of `write_comparison` as a string."""
    if not reports:
        raise ArgumentError("reports", "none given", "pass at least one PruneReport")
    several = len(reports) > 1
    accuracies = tables.accuracy_table(reports)
    where = evaluated_on(reports)
    first = f"Requested sparsity of all prunable weights; accuracy on the {where}. Bold: best of a column."
    results = (
        f"Accuracy and loss on the {where}. Predicted and measured increase of the mean loss "
        "on the samples that the curvature was taken from. Peak memory is that of the whole process so far."
    )
    return render(
        "report.html.j2",
        title=title or ("Pruning runs compared" if several else f"Pruned by {reports[0].label}"),
        lead=_lead(reports),
        tiles=() if several else _tiles(reports[0]),
        above=[("Accuracy by sparsity", accuracies, first)] if several and accuracies else (),
        pictures=_pictures(reports),
        below=[("All runs", tables.results_table(reports), results)] if several else (),
        sections=[_section(report, with_pictures=several) for report in reports],
    )


def _lead(reports: Sequence[PruneReport]) -> str:
    first = reports[0]
    if len(reports) == 1:
        return (
            f"{first.n_prune:,} of {first.n:,} weights set to zero. Program: {first.program}. Curvature: "
            f"{first.curvature.replace('_', ' ')}, {first.rows:,} rows of {first.samples:,} samples."
        )
    methods = len({report.label for report in reports})
    weights = " or ".join(f"{n:,}" for n in sorted({report.n for report in reports}))
    return f"{len(reports)} runs of {methods} methods on networks of {weights} prunable weights."


def _tiles(report: PruneReport) -> list[tuple[str, str]]:
    before, after = report.evaluations
    where = evaluated_on([report])
    values = [("Sparsity", percent_text(report.sparsity))]
    if before is not None and after is not None:
        if before.accuracy is not None and after.accuracy is not None:
            change = f"{percent_text(before.accuracy, 1)} → {percent_text(after.accuracy, 1)}"
            values.append((f"Accuracy, {where}", change))
        values.append((f"Loss, {where}", f"{number_text(before.loss)} → {number_text(after.loss)}"))
    rest: list[tuple[str, Callable[[float], str], float | None]] = [
        ("Predicted before the update", number_text, report.loss_before_update),
        ("Predicted loss increase", number_text, report.predicted_loss_increase),
        ("Measured loss increase", number_text, report.actual_loss_increase),
        ("Certified gap, model", gap_text, None if report.certified is None else report.certified.gap),
        ("Time", seconds_text, report.total_seconds),
        ("Peak memory", bytes_text, report.peak_memory_bytes),
    ]
    shown = [(name, show(value)) for name, show, value in rest if not (value is None or math.isnan(value))]
    return values + shown


def _pictures(reports: Sequence[PruneReport]) -> list[Picture]:
    largest = figures.at_largest_sparsity(reports)[-1]
    layers = "Sparsity of each layer{}. Dotted: the whole network."
    if len(reports) == 1:
        return _embedded(
            (figures.sparsity_by_layer(reports), layers.format("")),
            (figures.gap_by_block(largest), GAP_CAPTION),
            (figures.weights_before_and_after(largest), HISTOGRAM_CAPTION),
        )
    which = f" at {percent_text(largest.requested_sparsity, 1)} requested sparsity"
    accuracy = f"Accuracy on the {evaluated_on(reports)} against sparsity. Dotted: the dense network."
    weights = f"{HISTOGRAM_CAPTION} Run: {largest.label}{which}."
    return _embedded(
        (figures.accuracy_against_sparsity(reports), accuracy),
        (figures.predicted_against_actual(reports), PREDICTION_CAPTION),
        (figures.loss_against_sparsity(reports), LOSS_CAPTION),
        (figures.sparsity_by_layer(reports), layers.format(which)),
        (figures.weights_before_and_after(largest), weights),
    )


def _embedded(*drawings: tuple[Figure | None, str]) -> list[Picture]:
    return [embedded(figure, caption) for figure, caption in drawings if figure is not None]


def _section(report: PruneReport, *, with_pictures: bool) -> dict[str, object]:
    whole = f"{percent_text(report.network_sparsity)} of the whole network are zero."
    parts: list[Part] = [
        ("Remarks", tables.remarks_table(report), ""),
        ("Layers", tables.layers_table(report), ""),
        ("Left out", tables.left_out_table(report), whole),
        ("Blocks", tables.blocks_table(report), tables.blocks_note(report)),
        ("Certificates", tables.certificates_table(report), tables.certificates_note(report)),
    ]
    weights = figures.weights_before_and_after(report), HISTOGRAM_CAPTION
    gaps = figures.gap_by_block(report), GAP_CAPTION
    return {
        "title": f"{report.label}, sparsity {percent_text(report.sparsity)}",
        "pictures": _embedded(weights, gaps) if with_pictures else [],
        "parts": [part for part in parts if part[1] is not None],
        "times": tables.times_table(report),
        "settings": tables.settings_table(report),
    }


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as a data address, with what it shows in words."""

    source: str
    caption: str


def embedded(figure: Figure, caption: str) -> Picture:
    """Return a figure as SVG within the page."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return Picture(source=f"data:image/svg+xml;base64,{encoded}", caption=caption)


def render(template: str, *, package: str = "cbs_opt.report", **values: object) -> str:
    """Return a page from a template of `package` or of the report; a value that it misses is an error."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("cbs_opt.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
