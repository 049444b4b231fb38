"""Forged solutions and run folders: none passes as proved, and the judge would see one that did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cbs_opt import load_report
from cbs_opt.cli import app
from cbs_opt.report.files import MASKS_FILE, REPORT_JSON
from cbs_opt.report.record import ReportFormatError
from cbs_opt.report.verification import check_certificates
from formulations import Verdict, Verification
from formulations.files import CHECKSUM
from tests.stress import tamper
from tests.stress.tamper import FOLDERS, SOLUTIONS, Subjects, judged_folder, subjects


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """Blocks, solutions and a certified run."""
    return subjects(tmp_path_factory.mktemp("subjects"))


def test_no_forgery_passes_as_proved(made: Subjects, tmp_path: Path) -> None:
    outcomes = list(tamper.judged(made, tmp_path, range(65)))
    assert not [outcome for outcome in outcomes if outcome.result == "passed"]
    kinds = {outcome.forgery for outcome in outcomes}
    assert len(kinds) > 0.6 * len({*SOLUTIONS, *FOLDERS})
    assert len([outcome for outcome in outcomes if outcome.result in ("refused", "wrong")]) > 35


def test_a_check_that_believes_everything_is_seen(
    made: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def believed(problem: object, solution: object) -> Verification:
        return Verification(
            verdict=Verdict.OK, feasible=True, objective=0.0, bound=0.0, bound_checked=True, notes=()
        )

    monkeypatch.setattr(tamper, "verify", believed)
    monkeypatch.setattr("cbs_opt.report.verification.verify", believed)
    outcomes = list(tamper.judged(made, tmp_path, range(30)))
    assert len([outcome for outcome in outcomes if outcome.result == "passed"]) >= 8


def test_the_run_as_it_was_written_is_proved(made: Subjects) -> None:
    assert judged_folder(made, made.folder) == ("true", "")
    assert all(block.ok for block in check_certificates(made.folder))


def test_a_report_whose_checksum_is_deleted_is_refused(made: Subjects, tmp_path: Path) -> None:
    document = json.loads((made.folder / REPORT_JSON).read_text())
    del document[CHECKSUM]
    document["damping"] *= 2.0
    (tmp_path / REPORT_JSON).write_text(json.dumps(document))
    with pytest.raises(ReportFormatError, match="no checksum"):
        load_report(tmp_path)


def test_a_run_without_masks_is_unchecked_and_its_exit_code_says_so(made: Subjects, tmp_path: Path) -> None:
    copy = tamper.copied(made.folder, tmp_path / "copy")
    (copy / MASKS_FILE).unlink()
    assert {block.verdict for block in check_certificates(copy)} == {Verdict.UNCHECKED}
    assert CliRunner().invoke(app, ["verify", str(copy)]).exit_code == 3
    assert CliRunner().invoke(app, ["verify", str(made.folder)]).exit_code == 0


@pytest.mark.parametrize("claim", ["program", "damping", "n", "n_prune", "certified", "gap", "name", "layer"])
def test_what_a_report_says_of_its_run_is_compared(made: Subjects, tmp_path: Path, claim: str) -> None:
    copy = tamper.copied(made.folder, tmp_path / "copy")
    document = tamper.report_of(copy)
    block, layer = document["blocks"][0], document["layers"][0]
    if claim == "program":
        document["program"] = document["certified"]["program"] = "selection"
    elif claim == "damping":
        document["damping"] *= 2.0
    elif claim == "certified":
        document["certified"]["bound"] += 1e-6
    elif claim == "gap":
        block["gap"] *= 0.5
    elif claim == "name":
        block["name"] = "other"
    elif claim == "layer":
        layer["n_prune"] += 1
    else:
        document[claim] += 1
    tamper.write_report(copy, document)
    found = list(check_certificates(copy))
    assert found[0].verdict is Verdict.WRONG
    assert not found[0].proved
    assert np.all([block.verdict is Verdict.WRONG for block in found]) or claim in ("gap", "name")
