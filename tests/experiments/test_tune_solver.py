"""The optuna example: it starts at the default, keeps what it ran, and judges on other blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cbs_opt.study.results import read_results, read_rows
from experiments import tune_solver
from formulations.errors import ArgumentError
from tests.cbs_opt.study.conftest import in_process as in_process
from tests.cbs_opt.study.conftest import record_keys

pytest.importorskip("optuna", reason='optuna is not installed (pip install "cbs-opt[tune]")')

SMALL: dict[str, Any] = {"tuned_on": ["digits_12_s80"], "held_out": ["digits_12_s50"], "time_limit": 20.0}


@pytest.mark.usefixtures("in_process")
def test_it_finds_what_is_no_worse_than_the_default_and_runs_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"presolve": ("choose", "off"), "mip_detect_symmetry": (True, False)}
    method = "highs:selection_mccormick"
    monkeypatch.setattr(tune_solver, "SPACES", {method: space})
    found = tune_solver.tune(method, "selection", tmp_path, trials=4, **SMALL)
    assert set(found.options) == set(space)
    assert found.tuned_seconds <= found.default_seconds
    rows = read_rows(tmp_path)
    tried = {(row["options"]["presolve"], row["options"]["mip_detect_symmetry"]) for row in rows.values()}
    assert ("choose", True) in tried
    assert len(rows) <= len(tried) + 2
    table = read_results(tmp_path).table
    assert set(table["instance"]) == {"digits_12_s80", "digits_12_s50"}
    assert len(record_keys(tmp_path)) == len(rows)


def test_a_method_without_a_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="branch_and_bound"):
        tune_solver.tune("magnitude", "joint", tmp_path)


def test_the_blocks_to_judge_on_are_not_those_to_tune_on() -> None:
    assert not set(tune_solver.TUNED_ON) & set(tune_solver.HELD_OUT)
