"""Several pruning runs side by side, as one table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from cbs_opt.report.record import PruneReport


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
        row = {
            "method": report.method,
            "update": report.update,
            "sparsity": report.sparsity,
            "accuracy_before": None if before is None else before.accuracy,
            "accuracy": None if after is None else after.accuracy,
            "loss_before": None if before is None else before.loss,
            "loss": None if after is None else after.loss,
            "predicted_selection_loss": report.predicted_selection_loss,
            "predicted_loss_increase": report.predicted_loss_increase,
            "actual_loss_increase": report.actual_loss_increase,
            "certified_gap": None if report.certified is None else report.certified.gap,
            "seconds": report.total_seconds,
            "peak_memory_bytes": report.peak_memory_bytes,
        }
        rows.append(row)
    frame = pd.DataFrame(rows)
    # Else a column that is missing throughout would hold None.
    return frame.astype({name: float for name in frame.columns[2:]})


def evaluated_on(reports: Sequence[PruneReport]) -> str:
    """Return in words which data `PruneReport.evaluations` refers to."""
    held_out = {report.after is not None for report in reports}
    if held_out == {True}:
        return "evaluation data"
    return "curvature samples" if held_out == {False} else "evaluation data where given"
