"""A report as text: lines for a terminal, a Markdown table, and the CSV file of its layers."""

from __future__ import annotations

import csv
import io
import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import TYPE_CHECKING

import pandas as pd

from cbs_opt.certify.certificates import CertifiedSum, relative_gap
from cbs_opt.network.evaluation import Evaluation

if TYPE_CHECKING:
    from cbs_opt.report.record import BlockSummary, PruneReport

MISSING = "–"  # noqa: RUF001 - an en dash marks an empty cell
OPTIMAL_GAP = 1e-6
"""Relative gap up to which a set counts as optimal, the default of `formulations.Limits`."""


PLAIN_DIGITS = 7
"""Digits before the decimal point up to which a number is written without an exponent."""


def layers_frame(report: PruneReport) -> pd.DataFrame:
    """One row a layer; see `PruneReport.to_frame`."""
    frame = pd.DataFrame(
        {
            "shape": ["x".join(map(str, layer.shape)) for layer in report.layers],
            "n": [layer.n for layer in report.layers],
            "n_prune": [layer.n_prune for layer in report.layers],
            "n_keep": [layer.n - layer.n_prune for layer in report.layers],
            "sparsity": [layer.sparsity for layer in report.layers],
        },
        index=pd.Index([layer.name for layer in report.layers], name="layer"),
    )
    frame.attrs.update(n=report.n, n_prune=report.n_prune, sparsity=report.sparsity)
    if report.certified is not None:
        parts = [_within(report, layer.name) for layer in report.layers]
        frame["objective"] = [_sum(part, "objective") for part in parts]
        frame["bound"] = [_sum(part, "bound") for part in parts]
        frame["gap"] = [
            math.nan if math.isnan(bound) else relative_gap(value, bound)
            for value, bound in zip(frame["objective"], frame["bound"], strict=True)
        ]
        frame.attrs["certified"] = report.certified
    return frame


def _within(report: PruneReport, layer: str) -> list[BlockSummary]:
    """The blocks that lie within a layer; none where blocks span layers."""
    return [block for block in report.blocks if block.name == layer or block.name.startswith(f"{layer}[")]


def _sum(blocks: list[BlockSummary], field: str) -> float:
    """Sum over blocks; a bound is rounded down. NaN if there is no block, or one has no value."""
    values = [getattr(block, field) for block in blocks]
    if not values or any(value is None for value in values):
        return math.nan
    total = math.fsum(values)
    return math.nextafter(total, -math.inf) if field == "bound" and len(values) > 1 else total


def layers_csv(report: PruneReport) -> str:
    """`layers_frame` as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    frame = layers_frame(report)
    writer.writerow(["layer", *frame.columns])
    writer.writerows(
        [name, *("" if value != value else value for value in row)]
        for name, row in zip(frame.index, frame.itertuples(index=False), strict=True)
    )
    return text.getvalue()


def markdown(report: PruneReport) -> str:
    """The summary and one table, a row a block, for a page or an issue."""
    certified = report.certified is not None
    headings = ["block", "weights", "pruned", "predicted before update", "predicted after update"]
    headings += ["objective", "bound", "gap", "rho", "n / effective rank"] if certified else []
    table = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    for block in report.blocks:
        cells = [f"`{block.name}`", str(block.n), str(block.n_prune)]
        cells += [_number(block.selection_loss), _number(block.updated_loss)]
        if certified:
            rank = block.effective_rank
            cells += [_number(block.objective), _bound(block.bound), _percent(block.gap)]
            cells += [_number(block.rho), _number(None if rank is None else block.n / rank)]
        table.append("| " + " | ".join(cells) + " |")
    title = f"**{report.label}**, sparsity {report.sparsity:.4f}, program {report.program}"
    return "\n\n".join([title, "\n".join(table), *loss_lines(report)]) + "\n"


def summary_lines(report: PruneReport) -> list[str]:
    """A few lines for a terminal."""
    inputs = f", layer inputs {report.layer_inputs:g}" if report.layer_inputs else ""
    lines = [
        f"{report.label}: {report.n_prune} of {report.n} weights pruned, sparsity {report.sparsity:.4f}",
        f"  {report.curvature}, {report.rows} rows of {report.samples} samples, damping {report.damping:g}"
        f"{inputs}; partition {report.partition} ({len(report.blocks)} blocks)",
    ]
    lines += [f"  {line}" for line in loss_lines(report)]
    for title, before, after in (
        ("training", report.train_before, report.train_after),
        ("evaluation", report.before, report.after),
    ):
        if before is not None and after is not None:
            lines.append(f"  {title} data: {_change(before, after)}")
    if report.seconds:
        phases = ", ".join(f"{name} {value:.2f}" for name, value in report.seconds.items())
        lines.append(f"  {report.total_seconds:.2f} s ({phases})")
    return lines


def loss_lines(report: PruneReport) -> list[str]:
    """Predicted against actual loss, and what was certified."""
    lines = []
    if report.predicted_loss_increase is not None:
        line = f"loss increase: predicted {report.predicted_loss_increase:.4g}"
        if report.update and report.predicted_selection_loss is not None:
            line += f" ({report.predicted_selection_loss:.4g} before the update)"
        if report.actual_loss_increase is not None:
            line += f", actual {report.actual_loss_increase:.4g}"
        lines.append(line)
    if report.certified is not None:
        lines += certified_lines(report.certified)
    return lines


def certified_lines(certified: CertifiedSum) -> list[str]:
    """The sum over blocks in words, or how many blocks have no bound."""
    if certified.bound is None:
        return [f"certified: {certified.bounded} of {certified.blocks} blocks have a bound; no sum"]
    blocks = "one block" if certified.blocks == 1 else f"sum over {certified.blocks} blocks"
    objective, bound = f"{certified.objective:.6g}", bound_text(certified.bound)
    values = f"objective {objective}, bound {bound}, gap {_percent(certified.gap)}"
    return [f"certified, program {certified.program}, {blocks}: {values}", f"this is a {certified.meaning}"]


def _number(value: float | None) -> str:
    return MISSING if value is None or math.isnan(value) else f"{value:.4g}"


def _bound(value: float | None) -> str:
    return MISSING if value is None else bound_text(value, 4)


def _percent(value: float | None) -> str:
    return MISSING if value is None else gap_text(value)


def bound_text(bound: float, digits: int = 6) -> str:
    """A lower bound rounded down, so that what is printed is one too."""
    return _rounded(bound, digits, ROUND_FLOOR)


def gap_text(gap: float) -> str:
    """A relative gap in per cent, rounded up to two digits; what counts as optimal as such."""
    return "< 0.0001 %" if gap <= OPTIMAL_GAP else f"{_rounded(100.0 * gap, 2, ROUND_CEILING)} %"


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return f"{value}"
    exact = Context(prec=digits, rounding=rounding).create_decimal(Decimal(value)).normalize()
    return f"{exact:f}" if -5 < exact.adjusted() < PLAIN_DIGITS else f"{exact:e}"


def _change(before: Evaluation, after: Evaluation) -> str:
    text = f"loss {before.loss:.4f} -> {after.loss:.4f}"
    if before.accuracy is not None and after.accuracy is not None:
        text += f", accuracy {before.accuracy:.2%} -> {after.accuracy:.2%}"
    return f"{text} ({after.samples} samples)"
