"""Several pruning runs side by side, as one table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from cbs_opt.network.evaluation import Evaluation
from cbs_opt.report.record import PruneReport


def comparison_frame(reports: Sequence[PruneReport]) -> pd.DataFrame:
    """One row a report, in the given order.

    Columns are ``method``, ``update``, ``sparsity`` (achieved), ``accuracy_before``, ``accuracy``,
    ``loss_before``, ``loss`` (on the evaluation data, else on the curvature's samples),
    ``predicted_selection_loss`` (before the update), ``predicted_loss_increase``,
    ``actual_loss_increase`` (all three on the curvature's samples), ``certified_gap`` (of the model),
    ``seconds`` and ``peak_memory_bytes``. What was not measured is NaN.
    """
    return pd.DataFrame([_row(report) for report in reports])


def evaluations(report: PruneReport) -> tuple[Evaluation | None, Evaluation | None]:
    """Before and after: on the evaluation data where there is some, else on the curvature's samples."""
    if report.after is not None:
        return report.before, report.after
    return report.train_before, report.train_after


def evaluated_on(reports: Sequence[PruneReport]) -> str:
    """What `evaluations` refers to, in words."""
    held_out = {report.after is not None for report in reports}
    if held_out == {True}:
        return "evaluation data"
    return "curvature samples" if held_out == {False} else "evaluation data where given"


def _row(report: PruneReport) -> dict[str, object]:
    before, after = evaluations(report)
    nan = float("nan")

    def known(value: float | None) -> float:
        return nan if value is None else float(value)

    return {
        "method": report.method,
        "update": report.update,
        "sparsity": report.sparsity,
        "accuracy_before": known(before.accuracy if before else None),
        "accuracy": known(after.accuracy if after else None),
        "loss_before": known(before.loss if before else None),
        "loss": known(after.loss if after else None),
        "predicted_selection_loss": known(report.predicted_selection_loss),
        "predicted_loss_increase": known(report.predicted_loss_increase),
        "actual_loss_increase": known(report.actual_loss_increase),
        "certified_gap": known(report.certified.gap if report.certified else None),
        "seconds": report.total_seconds,
        "peak_memory_bytes": known(report.peak_memory_bytes),
    }
