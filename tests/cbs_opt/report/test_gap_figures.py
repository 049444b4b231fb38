"""Pictures of gaps and of predicted against measured losses: every block, every run, in order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cbs_opt.report.figures import NAMED_BLOCKS, gap_by_block, loss_against_sparsity
from cbs_opt.report.html import render_comparison
from cbs_opt.report.numbers import OPTIMAL_GAP
from cbs_opt.report.parts import CertifiedSum
from cbs_opt.report.record import PruneReport
from cbs_opt.report.tables import TOP_BLOCKS, certificates_note, certificates_table, layers_table
from tests.cbs_opt.reports import SHAPES, made_report


def certified(gaps: list[float], report: PruneReport | None = None) -> PruneReport:
    """A report whose blocks have these gaps."""
    report = report or made_report()
    names = [*SHAPES, *(f"extra[{number}]" for number in range(len(gaps)))]
    blocks = tuple(
        replace(
            report.blocks[0],
            name=name,
            objective=2.0,
            bound=2.0 * (1.0 - gap),
            gap=gap,
            certificate="perspective",
            certificate_status="feasible",
            rho=0.5,
            effective_rank=4.0,
            n_fixed=1,
        )
        for name, gap in zip(names, gaps, strict=False)
    )
    return replace(report, blocks=blocks, certified=CertifiedSum.of("joint", blocks))


def test_few_blocks_are_named_and_in_their_order() -> None:
    gaps = [1e-3, 0.0, 2e-2]
    figure = gap_by_block(certified(gaps))
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SHAPES)
    drawn = {
        (float(x), int(y)) for line in axes.get_lines()[:2] for x, y in zip(*line.get_data(), strict=True)
    }
    assert drawn == {(1e-3, 0), (OPTIMAL_GAP, 1), (2e-2, 2)}
    low, high = axes.get_xlim()
    assert low < OPTIMAL_GAP
    assert high > 2e-2


def test_many_blocks_are_sorted_and_none_is_lost() -> None:
    gaps = list(10.0 ** np.random.default_rng(0).uniform(-8, -1, size=1000))
    figure = gap_by_block(certified(gaps))
    assert figure is not None
    axes = figure.axes[0]
    share, drawn = axes.get_lines()[0].get_data()
    assert list(drawn) == sorted(max(gap, OPTIMAL_GAP) for gap in gaps)
    assert share[-1] == 1.0
    assert axes.get_yscale() == "log"
    assert len(axes.get_xticklabels()) < NAMED_BLOCKS


def test_without_certificates_or_with_one_block_there_is_no_picture() -> None:
    assert gap_by_block(made_report()) is None
    assert gap_by_block(certified([1e-3])) is None


def test_losses_are_drawn_for_every_run_of_a_method() -> None:
    reports = [
        made_report(method, sparsity=sparsity, loss=0.1 * sparsity)
        for method in ("obs", "swap_search")
        for sparsity in (0.9, 0.5)
    ]
    figure = loss_against_sparsity(reports)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["obs + update", "swap_search + update"]
    for axes, own in zip(figure.axes, (reports[:2], reports[2:]), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        ordered = sorted(own, key=lambda report: report.sparsity)
        assert list(lines["measured"].get_ydata()) == [r.actual_loss_increase for r in ordered]
        assert list(lines["predicted, as written"].get_ydata()) == [
            r.predicted_loss_increase for r in ordered
        ]
        assert list(lines["predicted, before the update"].get_xdata()) == [r.sparsity for r in ordered]
        assert len({line.get_marker() for line in lines.values()}) == 3


def test_runs_without_a_prediction_have_no_panel() -> None:
    bare = replace(made_report("magnitude"), predicted_loss_increase=None, predicted_selection_loss=None)
    assert loss_against_sparsity([bare]) is None
    figure = loss_against_sparsity([bare, made_report("obs")])
    assert figure is not None
    assert len([axes for axes in figure.axes if axes.get_title()]) == 1


def test_the_page_shows_the_loosest_blocks_and_the_sum() -> None:
    report = certified([1e-3 * (number + 1) for number in range(30)])
    table = certificates_table(report)
    assert table is not None
    assert len(table.rows) == TOP_BLOCKS
    assert table.rows[0][0] == "extra[26]"
    assert report.certified is not None
    assert report.certified.meaning in certificates_note(report)
    assert [row[-1] for row in layers_table(report).rows][:3] == ["0.11 %", "0.21 %", "0.31 %"]
    page = render_comparison([report])
    assert "Certificates" in page
    assert "Certified gap" in page
    assert certificates_table(made_report()) is None


@pytest.mark.parametrize("gap", [None, 0.02])
def test_a_block_without_a_bound_leaves_the_sum_out(gap: float | None) -> None:
    report = certified([1e-3, 1e-2, 1e-2])
    last = replace(report.blocks[-1], gap=gap, bound=None if gap is None else 1.96)
    blocks = (*report.blocks[:-1], last)
    report = replace(report, blocks=blocks, certified=CertifiedSum.of("joint", blocks))
    assert report.certified is not None
    assert (report.certified.bound is None) == (gap is None)
    assert ("2 of 3 blocks have a bound" in report.summary()) == (gap is None)
    assert gap_by_block(report) is not None
