"""Pictures and the page: what they show, that they need nothing from outside, that they escape names."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from cbs_opt.network.eligible import LeftOut
from cbs_opt.report import figures
from cbs_opt.report.html import render_comparison, write_comparison
from cbs_opt.report.record import PruneReport
from cbs_opt.report.tables import TOP_BLOCKS, accuracy_table, blocks_table
from formulations.errors import ArgumentError
from tests.cbs_opt.reports import made_report

METHODS = (("magnitude", False, 0.9), ("obs", True, 0.5), ("swap_search", True, 0.2))


@pytest.fixture(scope="module")
def reports() -> list[PruneReport]:
    return [
        made_report(method, sparsity=sparsity, update=update, loss=loss * sparsity)
        for method, update, loss in METHODS
        for sparsity in (0.5, 0.9)
    ]


class Outline(HTMLParser):
    """Elements that are open, those that were not closed, and every address used."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_accuracy_lines_hold_each_methods_runs_in_order(reports: list[PruneReport]) -> None:
    figure = figures.accuracy_against_sparsity(reports[::-1])
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    for method, update, _ in METHODS:
        label = f"{method} + update" if update else method
        own = [r for r in reports if r.label == label]
        assert list(lines[label].get_xdata()) == [r.sparsity for r in own]
        assert lines[label].get_ydata() == pytest.approx([100 * r.after.accuracy for r in own if r.after])


def test_every_method_has_its_own_marker_and_line(reports: list[PruneReport]) -> None:
    styles = figures.styles(reports).values()
    assert len({style.marker for style in styles}) == len({style.color for style in styles}) == len(METHODS)


def test_predicted_against_measured_shows_each_run_on_equal_axes(reports: list[PruneReport]) -> None:
    figure = figures.predicted_against_actual(reports)
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_xlim() == axes.get_ylim()
    points = np.concatenate([np.c_[line.get_data()] for line in axes.get_lines()[1:]])
    wanted = [(r.predicted_loss_increase, r.actual_loss_increase) for r in reports]
    assert {tuple(point) for point in points} == set(wanted)
    low, high = axes.get_xlim()
    assert ((points > low) & (points < high)).all()


@pytest.mark.parametrize("loss", [0.0, -0.01])
def test_predictions_that_fit_no_logarithm_are_drawn_too(loss: float) -> None:
    figure = figures.predicted_against_actual([made_report(loss=0.1), made_report("obd", loss=loss)])
    assert figure is not None
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    assert low < min(2 * loss, 0.0) + 1e-12
    assert high > 0.2


def test_layer_picture_shows_the_largest_sparsity(reports: list[PruneReport]) -> None:
    assert {r.requested_sparsity for r in figures.at_largest_sparsity(reports)} == {0.9}
    axes = figures.sparsity_by_layer(reports).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [layer.name for layer in reports[0].layers]
    single = figures.sparsity_by_layer(reports[:1]).axes[0]
    widths = [patch.get_width() for patch in single.patches]
    assert widths == [layer.sparsity for layer in reports[0].layers]


def test_unmeasured_pictures_are_left_out() -> None:
    bare = dataclasses.replace(made_report(evaluated=False), train_before=None, train_after=None)
    assert figures.accuracy_against_sparsity([bare]) is None
    assert figures.predicted_against_actual([bare]) is None
    layers = tuple(
        dataclasses.replace(layer, weight_histogram_before=None, weight_histogram_after=None)
        for layer in bare.layers
    )
    bare = dataclasses.replace(bare, layers=layers)
    assert figures.weights_before_and_after(bare) is None
    assert Outline(render_comparison([bare, bare])).counts["img"] == 1


def test_the_page_is_well_formed_and_self_contained_and_leaves_matplotlibs_state_alone(
    reports: list[PruneReport], tmp_path: Path
) -> None:
    path, before = tmp_path / "page.html", dict(mpl.rcParams)
    reports = reports[1::2]
    write_comparison(reports, path, title="Compared")
    assert dict(mpl.rcParams) == before
    page = path.read_text()
    outline = Outline(page)
    assert outline.open == []
    assert outline.counts["img"] == 5 + len(reports)
    assert outline.counts["details"] == len(reports)
    assert "script" not in outline.counts
    assert all(address.startswith("data:image/svg+xml;base64,") for address in outline.addresses)
    assert not re.search(r"https?://", page)
    for report in reports:
        assert report.label in page


def test_a_single_report_shows_pictures_settings_and_blocks() -> None:
    page = render_comparison([made_report()])
    outline = Outline(page)
    assert outline.counts["img"] == 2
    for words in (
        "Peak memory",
        "300 MiB",
        "empirical_fisher",
        "damping",
        "block-diagonal model only",
        "local optimum",
    ):
        assert words in page


@pytest.mark.usefixtures("without_pictures")
def test_a_page_says_what_looks_wrong_what_was_changed_and_what_was_left_out() -> None:
    left_out = (LeftOut(name="head.bias", shape=(3,), reason="bias"),)
    remarks = {"warnings": ("no better than a guess",), "notes": ("blocks are cut by layer",)}
    page = render_comparison([dataclasses.replace(made_report(), left_out=left_out, **remarks)])
    for words in ("no better than a guess", "blocks are cut by layer", "Left out", left_out[0].remedy):
        assert words in page
    assert "Remarks" not in render_comparison([made_report()])


@pytest.mark.usefixtures("without_pictures")
def test_names_are_escaped() -> None:
    report = made_report()
    wicked = dataclasses.replace(
        report, layers=(dataclasses.replace(report.layers[0], name="<script>x</script>"),)
    )
    page = render_comparison([wicked])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_only_the_blocks_of_largest_loss_are_listed() -> None:
    report = made_report()
    block = report.blocks[0]
    many = tuple(
        dataclasses.replace(block, name=f"b{i}", updated_loss=float(i)) for i in range(3 * TOP_BLOCKS)
    )
    table = blocks_table(dataclasses.replace(report, blocks=many))
    assert [row[0] for row in table.rows] == [
        f"b{i}" for i in reversed(range(2 * TOP_BLOCKS, 3 * TOP_BLOCKS))
    ]


def test_the_best_of_each_column_is_stressed(reports: list[PruneReport]) -> None:
    table = accuracy_table(reports)
    assert table is not None
    assert [row[0] for row in table.rows] == ["magnitude", "obs + update", "swap_search + update"]
    assert table.best == {(2, 1), (2, 2)}


def test_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="none given"):
        write_comparison([], tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
