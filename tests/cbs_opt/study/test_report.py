"""The page of a study: complete, self-contained, honest about what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from typer.testing import CliRunner

from cbs_opt.cli import app
from cbs_opt.report.tables import MISSING
from cbs_opt.study.errors import StudyFolderError
from cbs_opt.study.figures import profile_figure
from cbs_opt.study.report import Drawing, methods_table, render_html, render_markdown, sections, write_report
from tests.cbs_opt.study.made_up import heuristic, labelled, results, row

BLOCKS = (("w", 16, 1e-5), ("x", 32, 1e-5), ("y", 16, 1e-3), ("z", 32, 1e-3))


def trace(seconds: float, optimum: float) -> list[dict[str, Any]]:
    """Four points that close a gap."""
    shares = (0.1, 0.3, 0.6, 1.0)
    return [
        {"seconds": seconds * s, "nodes": i, "objective": optimum * (2.0 - s), "bound": optimum * s}
        for i, s in enumerate(shares)
    ]


def study_rows() -> list[dict[str, Any]]:
    """Two exact methods, one with an option, and two heuristics on four blocks."""
    rows = []
    for i, (block, n, damping) in enumerate(BLOCKS, start=1):
        where: dict[str, Any] = {"n": n, "n_prune": n // 2, "damping": damping}
        rows.append(row("tree", block, 0.1 * i, options={"cuts": True}, trace=trace(0.1 * i, 1.0), **where))
        rows.append(row("tree", block, 0.2 * i, options={"cuts": False}, trace=trace(0.2 * i, 1.0), **where))
        rows.append(row("solver", block, 10.0, proved=i < 3, trace=trace(10.0, 1.0), **where))
        rows.append(heuristic("greedy", block, 1.0 + 0.1 * i, **where))
        rows.append(heuristic("swaps", block, 1.0, **where))
    rows.append(row("solver", "v", 0.2, proved=False, objective=None, status="crashed", note="died <here>"))
    return rows


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    """The pictures of the only program, drawn once for the tests that look at them."""
    (section,) = sections(labelled(study_rows()))
    return section.drawings()


def test_the_page_holds_every_picture_and_fetches_nothing(drawings: list[Drawing]) -> None:
    page = render_html(results(study_rows()))
    assert page.count("<figure>") == len(drawings)
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img")
    assert not re.findall(r"<script|<link|https?://(?!www\.w3\.org)", page)
    assert "died &lt;here&gt;" in page
    assert "{{" not in page


def test_every_kind_of_picture_is_there(drawings: list[Drawing]) -> None:
    names = {drawing.name for drawing in drawings}
    assert names == {"profile", "gap", "traces", "excess", "effects", "excess_n", "excess_damping"}
    for drawing in drawings:
        drawing.figure.canvas.draw()
        axes = drawing.figure.axes[0]
        assert axes.get_xlabel() or drawing.name == "traces"
        assert drawing.caption.endswith(".")


def test_lines_of_a_profile_rise_to_the_share_proved_and_differ_without_colour() -> None:
    figure = profile_figure(labelled(study_rows()))
    assert figure is not None
    axes = figure.axes[0]
    lines = axes.get_lines()
    assert axes.get_xscale() == "log"
    ends = {str(line.get_label()): np.asarray(line.get_ydata())[-1] for line in lines}
    assert ends == {
        "tree (4/5)": pytest.approx(80.0),
        "tree cuts=off (4/5)": pytest.approx(80.0),
        "solver (2/5)": pytest.approx(40.0),
    }
    for line in lines:
        assert (np.diff(np.asarray(line.get_ydata(), dtype=float)) >= 0.0).all()
    assert len({(str(line.get_linestyle()), str(line.get_marker())) for line in lines}) == len(lines)
    assert len({matplotlib.colors.to_hex(line.get_color()) for line in lines}) == len(lines)


def test_an_unfinished_study_and_left_out_rows_are_said_to_be() -> None:
    text = render_markdown(results(study_rows(), planned=30, others=2))
    assert "21 of 30 runs" in text
    assert "9 runs are not done" in text
    assert "2 earlier rows belong to no run" in text
    assert "Left out: highs" in text


def test_a_table_counts_what_happened() -> None:
    table = methods_table(labelled(study_rows()))
    cells = {r[0]: dict(zip([c.name for c in table.columns], r, strict=True)) for r in table.rows}
    assert cells["solver"]["Proved"] == "2"
    assert cells["solver"]["Failed"] == "1"
    assert cells["greedy"]["Excess"] == "25 %"
    assert cells["swaps"]["Excess"] == "0 %"
    assert cells["greedy"]["Proved"] == MISSING
    stressed = {(table.rows[i][0], table.columns[j].name) for i, j in table.best}
    assert stressed == {("tree", "Time (s)"), ("swaps", "Excess")}


def test_nothing_done_is_an_error_and_one_row_is_a_report(tmp_path: Path) -> None:
    with pytest.raises(StudyFolderError, match="no run"):
        render_html(results([]))
    assert "1 of 1 runs" in render_html(results([heuristic("h", "x", 1.0)]))
    short = [made for made in study_rows() if made["instance"] in "wx" and made["method"] != "tree"]
    files = write_report(results(short), tmp_path, pictures="png")
    assert {file.suffix for file in files} == {".html", ".md", ".png"}
    assert all(file.stat().st_size > 0 for file in files)


@pytest.mark.usefixtures("in_process")
def test_the_two_commands_make_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbs_opt.study.report.Section.drawings", lambda section: [])
    study = tmp_path / "study.toml"
    study.write_text(
        'limits = { warm_up = 0 }\n[[instances]]\nlibrary = "digits_12_s*"\n'
        '[[methods]]\nprogram = ["joint", "selection"]\nmethods = ["enumeration", "greedy_obs"]\n'
    )
    out = str(tmp_path / "out")
    runner = CliRunner()
    planned = runner.invoke(app, ["study", str(study), "--out", out, "--dry-run"])
    assert planned.exit_code == 0
    assert "12 runs on 3 blocks, at most 14 min" in planned.output
    assert not (tmp_path / "out").exists()
    done = runner.invoke(app, ["study", str(study), "--out", out, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["statuses"] == {"optimal": 6, "feasible": 6}
    told = runner.invoke(app, ["report", out])
    assert told.exit_code == 0, told.output
    assert "greedy_obs" in told.stdout
    assert (tmp_path / "out" / "report.html").exists()
    rows = json.loads(runner.invoke(app, ["report", out, "--json"]).stdout)
    assert len(rows) == 12


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--filter", "colour=red"], 2, "NAME=GLOB"),
        (["--jobs", "0"], 2, "at least 1"),
        (["--jobs", "two"], 2, "integer"),
    ],
)
def test_wrong_usage_is_named(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        '[[instances]]\nlibrary = "digits_12_s50"\n[[methods]]\nprogram = "joint"\nmethods = "obs"\n'
    )
    result = CliRunner().invoke(app, ["study", str(study), "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == code
    assert message in result.output


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no study" in result.output
