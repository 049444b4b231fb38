"""Tables ready to print: the columns of a frame under their headings, for pages, Markdown and terminals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from cbs_opt.network.eligible import by_reason
from cbs_opt.recipe.files import request_to_plain
from cbs_opt.report.numbers import (
    MISSING,
    bound_text,
    bytes_text,
    gap_text,
    number_text,
    percent_text,
    seconds_text,
)
from cbs_opt.report.parts import BlockSummary
from cbs_opt.report.record import PruneReport

TOP_BLOCKS = 20


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table: its heading, whether it is text (set to the left), and how a value is shown."""

    name: str
    text: bool = False
    show: Callable[[Any], str] = str

    def cell(self, value: Any) -> str:
        """Return the cell of a value; None, NaN and empty text are missing."""
        absent = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
        return MISSING if absent else self.show(value)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells ready to print; the first of each row is its heading. `best` are (row, column) to stress."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    wrap: bool = False
    best: frozenset[tuple[int, int]] = frozenset()

    @classmethod
    def of(cls, frame: pd.DataFrame, columns: Iterable[str]) -> Table:
        """Return the named columns of a frame, with the headings and formats of `COLUMNS`."""
        shown = {name: COLUMNS[name] for name in columns}
        cells = [[column.cell(value) for value in frame[name]] for name, column in shown.items()]
        return cls(columns=tuple(shown.values()), rows=tuple(zip(*cells, strict=True)))

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[str, str]], headings: tuple[str, str], **more: Any) -> Table:
        """Return a table of names and values."""
        columns = (Column(name=headings[0]), Column(name=headings[1], text=bool(headings[1])))
        return cls(columns=columns, rows=tuple(pairs), **more)

    def markdown(self) -> str:
        """Return the table as Markdown, cells of `best` in bold."""
        sides = ["---" if c.text or i == 0 else "---:" for i, c in enumerate(self.columns)]
        lines = [[column.name for column in self.columns], sides]
        for number, row in enumerate(self.rows):
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
            lines.append([f"**{c}**" if (number, i) in self.best else c for i, c in enumerate(cells)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLUMNS = {
    name: Column(name=heading, text=text, show=show)
    for show, text, headings in (
        (str, False, {"label": "Method", "layer": "Layer", "block": "Block"}),
        (str, True, {"status": "Status", "certificate": "Certificate", "certificate_status": "Status"}),
        (lambda value: "yes" if value else "no", True, {"locally_optimal": "1-swap optimal"}),
        (lambda shape: shape.replace("x", " x "), False, {"shape": "Shape"}),
        ("{:,.0f}".format, False, {"n": "Weights", "n_prune": "Pruned", "n_keep": "Kept"}),
        ("{:,.0f}".format, False, {"iterations": "Steps", "n_fixed": "Fixed"}),
        (percent_text, False, {"sparsity": "Sparsity", "accuracy": "Accuracy"}),
        (number_text, False, {"loss": "Loss", "predicted_selection_loss": "Predicted before update"}),
        (number_text, False, {"predicted_loss_increase": "Predicted loss increase"}),
        (number_text, False, {"actual_loss_increase": "Measured loss increase"}),
        (number_text, False, {"initial_loss": "Loss at start", "selection_loss": "Selection loss"}),
        (number_text, False, {"updated_loss": "After update", "objective": "Objective"}),
        (number_text, False, {"rho": "rho", "n_per_rank": "n / effective rank"}),
        (partial(bound_text, digits=4), False, {"bound": "Bound"}),
        (gap_text, False, {"gap": "Gap", "certified_gap": "Certified gap"}),
        (seconds_text, False, {"seconds": "Time", "certificate_seconds": "Time"}),
        (bytes_text, False, {"peak_memory_bytes": "Peak memory"}),
    )
    for name, heading in headings.items()
}
"""Heading and format of every column, by its name in a frame."""
LAYERS = ("layer", "shape", "n", "n_prune", "n_keep", "sparsity")
LOSSES = ("predicted_loss_increase", "actual_loss_increase")
OVERVIEW = ("label", "sparsity", "accuracy", "loss", *LOSSES, "certified_gap", "seconds")
RESULTS = (
    *("label", "sparsity", "accuracy", "loss", "predicted_selection_loss", *LOSSES),
    *("certified_gap", "locally_optimal", "seconds", "peak_memory_bytes"),
)
BLOCKS = (
    *("block", "n", "n_prune", "initial_loss", "selection_loss", "updated_loss", "bound", "gap"),
    *("iterations", "locally_optimal", "seconds", "status"),
)
CERTIFICATES = (
    *("block", "n", "objective", "bound", "gap", "rho", "n_per_rank", "n_fixed"),
    *("certificate", "certificate_seconds", "certificate_status"),
)
SETTINGS = (
    *("method", "program", "update", "update_scale", "curvature", "samples", "rows", "damping"),
    *("layer_inputs", "partition", "budget", "requested_sparsity", "seed"),
)


def comparison_frame(reports: Sequence[PruneReport]) -> pd.DataFrame:
    """Return one row a report, in the given order.

    Columns are ``method``, ``update``, ``sparsity`` (achieved), ``accuracy_before``, ``accuracy``,
    ``loss_before``, ``loss`` (on the evaluation data, else on the curvature's samples),
    ``predicted_selection_loss`` (before the update), ``predicted_loss_increase``,
    ``actual_loss_increase`` (all three on the curvature's samples), ``certified_gap`` (of the model),
    ``seconds`` and ``peak_memory_bytes``. What was not measured is NaN.
    """
    rows = []
    for report in reports:
        before, after = report.evaluations
        row: dict[str, Any] = {name: getattr(report, name) for name in ("method", "update", "sparsity")}
        row |= {"accuracy_before": before and before.accuracy, "accuracy": after and after.accuracy}
        row |= {"loss_before": before and before.loss, "loss": after and after.loss}
        row |= {name: getattr(report, name) for name in ("predicted_selection_loss", *LOSSES)}
        row |= {"certified_gap": report.certified and report.certified.gap, "seconds": report.total_seconds}
        rows.append({**row, "peak_memory_bytes": report.peak_memory_bytes})
    frame = pd.DataFrame(rows)
    # Else a column that is missing throughout would hold None.
    return frame.astype({name: float for name in frame.columns[2:]})


def evaluated_on(reports: Sequence[PruneReport]) -> str:
    """Return in words which data `PruneReport.evaluations` refers to."""
    held_out = {report.after is not None for report in reports}
    if held_out == {True}:
        return "evaluation data"
    return "curvature samples" if held_out == {False} else "evaluation data where given"


def labelled_frame(reports: Sequence[PruneReport]) -> pd.DataFrame:
    """Return `comparison_frame` with what else is shown of a run."""
    frame = comparison_frame(reports)
    frame["label"] = [run.label for run in reports]
    frame["requested"] = [run.requested_sparsity for run in reports]
    frame["locally_optimal"] = [run.locally_optimal for run in reports]
    frame["loss_before_update"] = np.array([run.loss_before_update for run in reports], dtype=float)
    bounds = [None if run.certified is None else run.certified.bound for run in reports]
    frame["certified_bound"] = np.array(bounds, dtype=float)
    return frame


def accuracy_table(reports: Sequence[PruneReport]) -> Table | None:
    """Return accuracy by method and requested sparsity, the mean where runs repeat; None where unmeasured."""
    frame = labelled_frame(reports)
    means = frame.dropna(subset="accuracy").pivot_table("accuracy", "label", "requested", sort=False)
    if means.empty:
        return None
    means = means.sort_index(axis=1)
    best = np.argwhere(means.eq(means.max()).to_numpy()).tolist()
    headings = [percent_text(float(sparsity), 1) for sparsity in means.columns.to_list()]
    return Table(
        columns=(Column(name="Method"), *(Column(name=heading) for heading in headings)),
        rows=tuple((label, *map(COLUMNS["accuracy"].cell, row)) for label, *row in means.itertuples()),
        best=frozenset((row, column + 1) for row, column in best),
    )


def results_table(reports: Sequence[PruneReport], columns: Sequence[str] = RESULTS) -> Table:
    """Return one row a report."""
    return Table.of(labelled_frame(reports), columns)


def layers_table(report: PruneReport) -> Table:
    """Return one row a layer and one for all of them."""
    layers = report.to_frame()
    rows: list[dict[Any, Any]] = layers[layers["left_out"] == ""].reset_index().to_dict("records")
    total = {"layer": "all", "n": report.n, "n_prune": report.n_prune, "sparsity": report.sparsity}
    rows.append({**total, "shape": " ", "n_keep": report.n - report.n_prune})
    if report.certified is None:
        return Table.of(pd.DataFrame(rows), LAYERS)
    rows[-1]["gap"] = report.certified.gap
    frame = pd.DataFrame(rows).rename(columns={"gap": "certified_gap"})
    return Table.of(frame, (*LAYERS, "certified_gap"))


def left_out_table(report: PruneReport) -> Table | None:
    """Return one row a reason why parameters were left out; None where none was."""
    if not report.left_out:
        return None
    headings = {"Reason": False, "Parameters": False, "Weights": False, "To have them pruned": True}
    rows = (
        (reason, f"{len(entries):,}", f"{sum(entry.n for entry in entries):,}", entries[0].remedy)
        for reason, entries in by_reason(report.left_out).items()
    )
    columns = tuple(Column(name=name, text=text) for name, text in headings.items())
    return Table(columns=columns, rows=tuple(rows))


def remarks_table(report: PruneReport) -> Table | None:
    """Return what looks wrong with the network and what was changed to fit the machine; None if nothing."""
    pairs = [("warning", text) for text in report.warnings] + [("note", text) for text in report.notes]
    return Table.of_pairs(pairs, ("", "What to know"), wrap=True) if pairs else None


def blocks_table(report: PruneReport) -> Table:
    """Return the blocks of largest predicted loss."""
    frame = _blocks_frame(report)
    losses = frame["updated_loss"].fillna(frame["selection_loss"])
    return Table.of(frame.loc[_largest(losses, missing="last")], BLOCKS)


def blocks_note(report: PruneReport) -> str:
    """Return what the losses and bounds of blocks are."""
    notes = _shown(report, "predicted loss")
    bounded = any(block.bound is not None for block in report.blocks)
    if report.certified is None and len(report.blocks) > 1 and bounded:
        notes.append("Bounds hold for each block alone; their sum bounds the block-diagonal model only.")
    notes.append("Losses are increases predicted by the quadratic model.")
    return " ".join(notes)


def _shown(report: PruneReport, what: str) -> list[str]:
    """Return which blocks a table has, unless it has all."""
    n = len(report.blocks)
    return [f"The {TOP_BLOCKS} blocks of largest {what}, of {n:,}."] if n > TOP_BLOCKS else []


def certificates_table(report: PruneReport) -> Table | None:
    """Return what was proved, loosest blocks first; None of a run without certificates."""
    if report.certified is None:
        return None
    frame = _blocks_frame(report)
    return Table.of(frame.loc[_largest(frame["gap"], missing="first")], CERTIFICATES)


def certificates_note(report: PruneReport) -> str:
    """Return the sum over blocks, and what it means."""
    if report.certified is None:
        return ""
    notes = [f"{line[0].upper()}{line[1:]}." for line in report.certified.lines()]
    notes += _shown(report, "gap")
    notes.append(
        f"Objective: that of the {report.program} program. rho: damping over the mean Fisher diagonal. "
        "Gaps fall with rho and with n / effective rank."
    )
    return " ".join(notes)


def times_table(report: PruneReport) -> Table:
    """Return the time of every phase, and the peak memory."""
    phases = {**report.seconds, "all": report.total_seconds}
    pairs = [(phase, seconds_text(value)) for phase, value in phases.items()]
    if report.peak_memory_bytes is not None:
        pairs.append(("peak memory of the process", bytes_text(report.peak_memory_bytes)))
    return Table.of_pairs(pairs, ("Phase", ""))


def settings_table(report: PruneReport) -> Table:
    """Return every field of the request, and the versions of libraries."""
    settings = [(name, getattr(report, name)) for name in SETTINGS]
    settings += [] if report.request is None else _flat(request_to_plain(report.request))
    pairs = [(name, Column(name="Value").cell(value)) for name, value in settings]
    pairs += [(f"version of {name}", version) for name, version in report.versions.items()]
    return Table.of_pairs(pairs, ("Setting", "Value"), wrap=True)


def _flat(document: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Return the values of nested mappings and lists by their dotted names."""
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(document, list) and any(isinstance(entry, Mapping) for entry in document):
        for number, entry in enumerate(document):
            yield from _flat(entry, f"{name}[{number}]" if len(document) > 1 else name)
    else:
        yield name, document


def _blocks_frame(report: PruneReport) -> pd.DataFrame:
    """Return one row a block, with the fields of `BlockSummary` and ``n_per_rank``."""
    frame = pd.DataFrame(map(vars, report.blocks), columns=list(BlockSummary.__dataclass_fields__))
    numbers = ("selection_loss", "updated_loss", "gap", "effective_rank")
    frame = frame.rename(columns={"name": "block"}).astype(dict.fromkeys(numbers, float))
    return frame.assign(n_per_rank=frame["n"] / frame["effective_rank"])


def _largest(values: pd.Series[float], *, missing: Literal["first", "last"]) -> pd.Index[int]:
    return values.sort_values(ascending=False, kind="stable", na_position=missing).index[:TOP_BLOCKS]
