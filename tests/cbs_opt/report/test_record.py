"""PruneReport: totals, tables, and files that read back as they were written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt.network.eligible import LeftOut
from cbs_opt.network.evaluation import Evaluation
from cbs_opt.recipe.files import load_request
from cbs_opt.report.files import (
    LAYERS_CSV,
    MASKS_FILE,
    RECIPE_FILE,
    REPORT_HTML,
    REPORT_JSON,
    load_report,
    save_report,
)
from cbs_opt.report.parts import LayerSummary, shared_histograms
from cbs_opt.report.record import PruneReport, ReportFormatError
from cbs_opt.report.tables import comparison_frame
from cbs_opt.system.plain import plain
from formulations.errors import ArgumentError
from tests.cbs_opt.reports import made_report

pytestmark = pytest.mark.usefixtures("without_pictures")


def same(first: PruneReport, second: PruneReport) -> bool:
    """Equal in every field that JSON carries."""
    return (
        first.to_dict() == second.to_dict()
        and first.layers == second.layers
        and first.blocks == second.blocks
    )


def test_layer_summary_counts_zeros_and_kept_weights() -> None:
    before = torch.linspace(-1, 1, 40).view(5, 8)
    keep = before.abs() > 0.5
    layer = LayerSummary.from_weights("a", before, before * keep * 1.5, keep)
    assert (layer.n, layer.n_prune, layer.shape) == (40, int((~keep).sum()), (5, 8))
    assert layer.sparsity == layer.n_prune / 40
    assert layer.weight_histogram_before is not None
    assert layer.weight_histogram_after is not None
    assert sum(layer.weight_histogram_before.counts) == 40
    assert sum(layer.weight_histogram_after.counts) == 40 - layer.n_prune
    assert layer.weight_histogram_before.edges == layer.weight_histogram_after.edges


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), max_size=50),
    st.lists(st.floats(-1e6, 1e6, width=32), max_size=50),
)
def test_histograms_lose_no_value(first: list[float], second: list[float]) -> None:
    left, right = shared_histograms(torch.tensor(first), torch.tensor(second))
    assert (sum(left.counts), sum(right.counts)) == (len(first), len(second))
    assert len(left.edges) == len(left.counts) + 1
    assert list(left.edges) == sorted(left.edges)


def test_histograms_leave_out_what_is_not_finite() -> None:
    left, _ = shared_histograms(torch.tensor([1.0, math.nan, math.inf]), torch.tensor([2.0]))
    assert sum(left.counts) == 1


def test_frames_agree_with_the_totals() -> None:
    report = made_report()
    frame = report.to_frame()
    assert frame.n_prune.sum() == report.n_prune == frame.attrs["n_prune"]
    assert frame.n.sum() == report.n
    assert (frame.n_keep + frame.n_prune == frame.n).all()
    assert report.sparsity == report.n_prune / report.n
    assert list(frame.index) == [layer.name for layer in report.layers]
    assert list(frame.dtype) == ["float32"] * len(frame)
    assert set(frame.left_out) == {""}


def test_what_was_left_out_has_a_row_with_the_reason() -> None:
    entry = LeftOut(name="head.weight", shape=(3, 5), reason="frozen")
    report = replace(made_report(), left_out=(entry,))
    frame = report.to_frame()
    assert list(frame.index) == [*(layer.name for layer in report.layers), "head.weight"]
    assert frame.loc["head.weight", ["shape", "n", "n_prune", "left_out"]].tolist() == [
        "3x5",
        15,
        0,
        "frozen",
    ]
    assert frame[frame.left_out == ""].n.sum() == report.n == frame.attrs["n"]
    assert "head.weight" not in report._repr_html_()


def test_summary_tells_prediction_and_measurement_apart() -> None:
    text = made_report(loss=0.1).summary()
    for part in ("predicted 0.15", "0.3 before the update", "actual 0.2", "97.00% -> 87.00%", "swap_search"):
        assert part in text


def test_the_kind_of_the_method_decides_whether_its_program_is_named() -> None:
    joint = replace(made_report("swap_search"), program="joint")
    assert joint.label == "swap_search (joint) + update"
    assert (
        replace(made_report("obs"), program="joint", layer_inputs=1.0).label == "obs (layer inputs) + update"
    )


def test_a_report_shows_itself_in_one_line_and_in_a_notebook() -> None:
    report = made_report()
    assert repr(report).startswith("PruneReport(swap_search + update: 282 of 352")
    assert "\n" not in repr(report)
    page = replace(report, layers=(replace(report.layers[0], name="<script>"),), method="<b>")._repr_html_()
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;" in page
    assert "<script>" not in page
    assert "loss" in page
    assert "%<" in page
    assert "<b>" not in page


def test_what_was_not_measured_is_left_out() -> None:
    report = PruneReport.from_dict(made_report(evaluated=False).to_dict() | {"train_after": None})
    assert report.actual_loss_increase is None
    assert "actual" not in report.summary()
    assert math.isnan(comparison_frame([report]).actual_loss_increase[0])


def test_dict_round_trip_is_exact_through_json_text() -> None:
    report = made_report()
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert same(PruneReport.from_dict(json.loads(text)), report)


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_losses_that_are_not_finite_survive(loss: float) -> None:
    data = made_report().to_dict() | {"train_after": plain(Evaluation(loss=loss, accuracy=0.1, samples=3))}
    read = PruneReport.from_dict(json.loads(json.dumps(data, allow_nan=False)))
    assert read.train_after is not None
    assert read.train_after.loss == loss


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    report = made_report()
    folder = save_report(report, tmp_path / "deep" / "run")
    assert {path.name for path in folder.iterdir()} == {
        REPORT_JSON,
        LAYERS_CSV,
        MASKS_FILE,
        REPORT_HTML,
        RECIPE_FILE,
    }
    read = load_report(folder)
    assert same(read, report)
    assert set(read.masks) == set(report.masks)
    assert all(torch.equal(read.masks[name], keep) for name, keep in report.masks.items())
    layers = pd.read_csv(folder / LAYERS_CSV, index_col="layer")
    assert (layers.n_prune == report.to_frame().n_prune).all()


def test_the_request_is_saved_as_a_recipe_that_runs_again(tmp_path: Path) -> None:
    report = made_report()
    save_report(report, tmp_path)
    assert load_report(tmp_path).request == report.request
    assert load_request(tmp_path / RECIPE_FILE) == report.request


def test_a_request_with_rows_that_are_on_no_file_is_left_out() -> None:
    data = made_report().to_dict()
    data["request"]["recipe"][0]["curvature"] = {"kind": "given"}
    assert PruneReport.from_dict(data).request is None


def test_saving_again_replaces_and_leaves_no_masks_of_another_run(tmp_path: Path) -> None:
    save_report(made_report(), tmp_path)
    second = PruneReport.from_dict(made_report("magnitude", update=False).to_dict())
    save_report(second, tmp_path)
    read = load_report(tmp_path)
    assert read.method == "magnitude"
    assert not read.masks
    assert not (tmp_path / MASKS_FILE).exists()


def test_a_failed_save_leaves_no_report_that_looks_complete(tmp_path: Path) -> None:
    save_report(made_report(), tmp_path)
    (tmp_path / REPORT_HTML).unlink()
    (tmp_path / REPORT_HTML).mkdir()
    with pytest.raises(OSError, match="directory"):
        save_report(made_report("magnitude"), tmp_path)
    with pytest.raises(ReportFormatError, match=r"no report\.json"):
        load_report(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_save_refuses_a_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(ArgumentError, match="is a file"):
        save_report(made_report(), taken)
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"version": 99},
        {"n": "many"},
        {"n": None},
        {"layers": [{"name": "a"}]},
        {"blocks": 3},
        {"unheard_of": 1},
    ],
)
def test_damaged_reports_are_named_as_such(change: dict[str, object]) -> None:
    with pytest.raises(ReportFormatError):
        PruneReport.from_dict(made_report().to_dict() | change)


@pytest.mark.parametrize("version", [1, 99, None])
def test_a_report_of_another_version_says_what_to_do(version: int | None) -> None:
    with pytest.raises(ReportFormatError) as caught:
        PruneReport.from_dict(made_report().to_dict() | {"version": version})
    assert f"version {version}" in caught.value.found
    assert "prune again" in caught.value.remedy


def test_a_report_that_is_no_json_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / REPORT_JSON).write_text("{")
    with pytest.raises(ReportFormatError, match="damaged"):
        load_report(tmp_path)


def test_settings_become_plain_values() -> None:
    values = {
        "f": torch.nn.functional.cross_entropy,
        "t": torch.tensor(2),
        "s": {3, 1},
        "p": Path("a"),
        "x": math.nan,
    }
    assert plain(values) == {"f": "cross_entropy", "t": 2, "s": ["1", "3"], "p": "a", "x": "nan"}
