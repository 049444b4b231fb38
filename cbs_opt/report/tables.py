"""The tables of the HTML page, their cells ready to print."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cbs_opt.network.evaluation import Evaluation
from cbs_opt.report.comparison import evaluations
from cbs_opt.report.record import BlockSummary, PruneReport
from cbs_opt.report.text import MISSING, bound_text, certified_lines, gap_text

TOP_BLOCKS = 20


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table; text is set to the left, numbers to the right.

    Parameters
    ----------
    name : str
        Its heading.
    text : bool, default False
    show : callable, default str
        From a value to its cell; what is missing becomes `MISSING` without it.
    """

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

    def markdown(self) -> str:
        """Return the table as Markdown, cells of `best` in bold."""
        sides = ["---" if c.text or i == 0 else "---:" for i, c in enumerate(self.columns)]
        lines = [[column.name for column in self.columns], sides]
        for number, row in enumerate(self.rows):
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
            lines.append([f"**{c}**" if (number, i) in self.best else c for i, c in enumerate(cells)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(reports: Sequence[PruneReport]) -> Table | None:
    """Accuracy by method and requested sparsity, the mean where runs repeat; None where unmeasured."""
    cells: dict[tuple[str, float], list[float]] = {}
    for report in reports:
        after = evaluations(report)[1]
        if after is not None and after.accuracy is not None:
            cells.setdefault((report.label, report.requested_sparsity), []).append(after.accuracy)
    if not cells:
        return None
    sparsities = sorted({sparsity for _, sparsity in cells})
    means = {key: sum(values) / len(values) for key, values in cells.items()}
    rows, best = [], set()
    for number, label in enumerate(dict.fromkeys(label for label, _ in cells)):
        known = [means.get((label, sparsity)) for sparsity in sparsities]
        rows.append((label, *(MISSING if mean is None else percent_text(mean, 2) for mean in known)))
        for place, (sparsity, mean) in enumerate(zip(sparsities, known, strict=True), start=1):
            if mean is not None and mean == max(v for (_, s), v in means.items() if s == sparsity):
                best.add((number, place))
    columns = (Column(name="Method"), *(Column(name=percent_text(sparsity)) for sparsity in sparsities))
    return Table(columns=columns, rows=tuple(rows), best=frozenset(best))


def results_table(reports: Sequence[PruneReport]) -> Table:
    columns = (
        Column(name="Method"),
        Column(name="Sparsity"),
        Column(name="Accuracy"),
        Column(name="Loss"),
        Column(name="Predicted before update"),
        Column(name="Predicted loss increase"),
        Column(name="Measured loss increase"),
        Column(name="Certified gap"),
        Column(name="1-swap optimal", text=True),
        Column(name="Time"),
        Column(name="Peak memory"),
    )
    rows = []
    for report in reports:
        after = evaluations(report)[1]
        rows.append(
            (
                report.label,
                percent_text(report.sparsity, 2),
                _accuracy(after),
                MISSING if after is None else number_text(after.loss),
                number_text(report.predicted_selection_loss),
                number_text(report.predicted_loss_increase),
                number_text(report.actual_loss_increase),
                _gap(None if report.certified is None else report.certified.gap),
                _yes_no(report.locally_optimal),
                seconds_text(report.total_seconds),
                MISSING if report.peak_memory_bytes is None else bytes_text(report.peak_memory_bytes),
            )
        )
    return Table(columns=columns, rows=tuple(rows))


def layers_table(report: PruneReport) -> Table:
    names = ["Layer", "Shape", "Weights", "Pruned", "Kept", "Sparsity"]
    rows = [
        [
            layer.name,
            " x ".join(map(str, layer.shape)),
            f"{layer.n:,}",
            f"{layer.n_prune:,}",
            f"{layer.n - layer.n_prune:,}",
            percent_text(layer.sparsity, 2),
        ]
        for layer in report.layers
    ]
    kept = report.n - report.n_prune
    rows.append(
        ["all", "", f"{report.n:,}", f"{report.n_prune:,}", f"{kept:,}", percent_text(report.sparsity, 2)]
    )
    if report.certified is not None:
        names.append("Certified gap")
        gaps = [*report.to_frame()["gap"], report.certified.gap]
        for row, gap in zip(rows, gaps, strict=True):
            row.append(_gap(gap))
    return Table(columns=tuple(Column(name=name) for name in names), rows=tuple(map(tuple, rows)))


def blocks_table(report: PruneReport) -> Table:
    cells: list[tuple[Column, Callable[[BlockSummary], str]]] = [
        (Column(name="Block"), lambda b: b.name),
        (Column(name="Weights"), lambda b: f"{b.n:,}"),
        (Column(name="Pruned"), lambda b: f"{b.n_prune:,}"),
        (Column(name="Loss at start"), lambda b: number_text(b.initial_loss)),
        (Column(name="Selection loss"), lambda b: number_text(b.selection_loss)),
        (Column(name="After update"), lambda b: number_text(b.updated_loss)),
        (Column(name="Bound"), lambda b: _bound(b.bound)),
        (Column(name="Gap"), lambda b: _gap(b.gap)),
        (Column(name="Steps"), lambda b: f"{b.iterations:,}"),
        (Column(name="1-swap optimal", text=True), lambda b: _yes_no(b.locally_optimal)),
        (Column(name="Time"), lambda b: seconds_text(b.seconds)),
        (Column(name="Status", text=True), lambda b: b.status or MISSING),
    ]
    return _of_blocks(_heaviest(report), cells)


def certificates_table(report: PruneReport) -> Table | None:
    """What was proved, loosest blocks first; None of a run without certificates."""
    if report.certified is None:
        return None
    cells: list[tuple[Column, Callable[[BlockSummary], str]]] = [
        (Column(name="Block"), lambda b: b.name),
        (Column(name="Weights"), lambda b: f"{b.n:,}"),
        (Column(name=f"Objective, {report.program}"), lambda b: number_text(b.objective)),
        (Column(name="Bound"), lambda b: _bound(b.bound)),
        (Column(name="Gap"), lambda b: _gap(b.gap)),
        (Column(name="rho"), lambda b: number_text(b.rho)),
        (Column(name="n / effective rank"), lambda b: number_text(_per_rank(b))),
        (Column(name="Fixed"), lambda b: MISSING if b.n_fixed is None else f"{b.n_fixed:,}"),
        (Column(name="Certificate", text=True), lambda b: b.certificate or MISSING),
        (
            Column(name="Time"),
            lambda b: MISSING if b.certificate_seconds is None else seconds_text(b.certificate_seconds),
        ),
        (Column(name="Status", text=True), lambda b: b.certificate_status or MISSING),
    ]
    loosest = sorted(report.blocks, key=lambda b: math.inf if b.gap is None else b.gap, reverse=True)
    return _of_blocks(loosest[:TOP_BLOCKS], cells)


def certificates_note(report: PruneReport) -> str:
    """The sum over blocks, and what it means."""
    if report.certified is None:
        return ""
    lines = certified_lines(report.certified)
    notes = [f"{line[0].upper()}{line[1:]}." for line in lines]
    if len(report.blocks) > TOP_BLOCKS:
        notes.append(f"The {TOP_BLOCKS} blocks of largest gap, of {len(report.blocks):,}.")
    notes.append(
        "rho: damping over the mean Fisher diagonal. Gaps fall with rho and with n / effective rank."
    )
    return " ".join(notes)


def _of_blocks(
    blocks: Sequence[BlockSummary], cells: Sequence[tuple[Column, Callable[[BlockSummary], str]]]
) -> Table:
    return Table(
        columns=tuple(column for column, _ in cells),
        rows=tuple(tuple(cell(block) for _, cell in cells) for block in blocks),
    )


def _per_rank(block: BlockSummary) -> float | None:
    return None if block.effective_rank is None else block.n / block.effective_rank


def blocks_note(report: PruneReport) -> str:
    notes = []
    if len(report.blocks) > TOP_BLOCKS:
        notes.append(f"The {TOP_BLOCKS} blocks of largest predicted loss, of {len(report.blocks):,}.")
    if (
        report.certified is None
        and len(report.blocks) > 1
        and any(block.bound is not None for block in report.blocks)
    ):
        notes.append("Bounds hold for each block alone; their sum bounds the block-diagonal model only.")
    notes.append("Losses are increases predicted by the quadratic model.")
    return " ".join(notes)


def _heaviest(report: PruneReport) -> list[BlockSummary]:
    def loss(block: BlockSummary) -> float:
        value = block.updated_loss if block.updated_loss is not None else block.selection_loss
        return -math.inf if value is None or math.isnan(value) else value

    return sorted(report.blocks, key=loss, reverse=True)[:TOP_BLOCKS]


def times_table(report: PruneReport) -> Table:
    rows = [(phase, seconds_text(value)) for phase, value in report.seconds.items()]
    rows.append(("all", seconds_text(report.total_seconds)))
    if report.peak_memory_bytes is not None:
        rows.append(("peak memory of the process", bytes_text(report.peak_memory_bytes)))
    return Table(columns=(Column(name="Phase"), Column(name="")), rows=tuple(rows))


def settings_table(report: PruneReport) -> Table:
    own: dict[str, Any] = {
        "method": report.method,
        "program": report.program,
        "update": report.update,
        "update_scale": report.update_scale,
        "curvature": report.curvature,
        "samples": report.samples,
        "rows": report.rows,
        "damping": report.damping,
        "layer_inputs": report.layer_inputs,
        "partition": report.partition,
        "budget": report.budget,
        "requested_sparsity": report.requested_sparsity,
        "seed": report.seed,
    }
    listed = {**own, **{name: value for name, value in report.settings.items() if name not in own}}
    rows = [(name, MISSING if value is None else str(value)) for name, value in listed.items()]
    rows += [(f"version of {name}", version) for name, version in report.versions.items()]
    columns = (Column(name="Setting"), Column(name="Value", text=True))
    return Table(columns=columns, rows=tuple(rows), wrap=True)


def _accuracy(evaluation: Evaluation | None) -> str:
    accuracy = None if evaluation is None else evaluation.accuracy
    return MISSING if accuracy is None else percent_text(accuracy, 2)


def percent_text(share: float, decimals: int = 1) -> str:
    return f"{100.0 * share:.{decimals}f} %"


def _bound(bound: float | None) -> str:
    return MISSING if bound is None else bound_text(bound, 4)


def _gap(gap: float | None) -> str:
    return MISSING if gap is None or math.isnan(gap) else gap_text(gap)


def number_text(value: float | None) -> str:
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:.4g}"


def _yes_no(value: bool | None) -> str:
    return MISSING if value is None else ("yes" if value else "no")


def seconds_text(value: float) -> str:
    return f"{value:.2f} s" if value < 100.0 else f"{value:.0f} s"


def bytes_text(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"
