"""The runner: what a bad method costs, what a second call does, and who may use a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from cbs_opt.study.config import Study, parse_study
from cbs_opt.study.errors import ChangedInputsError, StudyFolderError
from cbs_opt.study.results import PARQUET, Journal, read_results
from cbs_opt.study.runner import Progress, run_study
from tests.cbs_opt.study.foreign import installed, write_misbehaved

SMALL = {"library": ["digits_12_s50", "digits_12_s80"]}
QUICK = {"time_limit": 20, "warm_up": 0}


def small_study(**changes: Any) -> Study:
    """Two heuristics on two blocks of twelve weights."""
    document = {
        "name": "small",
        "limits": QUICK,
        "instances": [SMALL],
        "methods": [{"program": "joint", "methods": ["magnitude", "greedy_obs"]}],
    }
    return parse_study({**document, **changes})


def test_bad_methods_cost_their_rows_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {
        "segfault": "crashed",
        "leaves": "crashed",
        "severs": "crashed",
        "deaf": "timed_out",
        "hungry": "out_of_memory",
        "greedy_allocation": "out_of_memory",
        "raises": "error",
        "liar": "error",
        "mute": "error",
    }
    notes = {
        "segfault": "SIGSEGV",
        "leaves": "exit code 3",
        "severs": "closed its connection",
        "deaf": "0.5 s past its limit of 0.5 s",
        "hungry": "GiB",
        "raises": "LookupError: nothing here",
        "liar": "recomputed",
        "mute": "NoneType",
    }
    write_misbehaved(tmp_path)
    limits = {"time_limit": 0.5, "grace": 0.5, "memory_gib": 1.5, "warm_up": 0}
    # The hog needs time to grow past the limit.
    longer = {"program": "joint", "methods": ["hungry"], "limits": {**limits, "time_limit": 60}}
    others = [name for name in bad if name != "hungry"]
    study = small_study(
        instances=[{"library": "digits_12_s50"}],
        methods=[
            {"program": "joint", "methods": ["consecutive", *others], "limits": limits},
            longer,
            {"program": "selection", "methods": ["consecutive"], "options": {"shift": [0, 3]}},
        ],
    )
    with installed(tmp_path, monkeypatch):
        outcome = run_study(study, tmp_path / "out", jobs=2)
        table = read_results(tmp_path / "out").table.set_index("method")
    assert outcome.done == outcome.planned == len(bad) + 3
    assert set(table.loc["consecutive", "status"]) == {"feasible"}
    for name, status in bad.items():
        assert table.loc[name, "status"] == status, table.loc[name, "note"]
        assert notes.get(name, "") in table.loc[name, "note"]
        assert not table.loc[name, "proved"]
    assert "in segfault" in table.loc["segfault", "note"]
    assert "Extension modules" not in table.loc["segfault", "note"]
    assert table.loc["deaf", "seconds"] < 20.0
    assert set(table["version.misbehaved"]) == {"1.0"}
    assert table.loc["hungry", "peak_memory"] < 2.5 * 2**30


def test_a_study_is_done_once_and_its_table_says_everything(tmp_path: Path) -> None:
    seen: list[Progress] = []
    study = small_study()
    first = run_study(study, tmp_path, on_row=lambda row, progress: seen.append(progress))
    assert (first.planned, first.selected, first.done, first.new) == (4, 4, 4, 4)
    assert [progress.done for progress in seen] == [1, 2, 3, 4]
    assert seen[-1].seconds_left == 0.0
    assert all(progress.seconds_left > 0.0 for progress in seen[:-1])
    again = run_study(study, tmp_path)
    assert (again.done, again.new) == (4, 0)
    results = read_results(tmp_path)
    assert results.planned == len(results.table) == 4
    assert (tmp_path / PARQUET).stat().st_size > 0
    assert (results.table["seconds"] > 0.0).all()
    for column in ("version.numpy", "version.cbs-opt", "machine.cores", "block", "run"):
        assert results.table[column].notna().all()


@pytest.mark.usefixtures("in_process")
def test_filters_do_a_part_and_the_rest_comes_later(tmp_path: Path) -> None:
    study = small_study()
    part = run_study(study, tmp_path, filters=["method=greedy*", "instance=*_s80"])
    assert (part.planned, part.selected, part.new) == (4, 1, 1)
    assert read_results(tmp_path).planned == 4
    assert run_study(study, tmp_path).new == 3


@pytest.mark.usefixtures("in_process")
def test_changed_limits_are_named_and_only_forced_runs_are_redone(tmp_path: Path) -> None:
    run_study(small_study(), tmp_path, filters=["method=magnitude"])
    changed = small_study(limits={**QUICK, "rel_gap": 0.01})
    with pytest.raises(ChangedInputsError, match=r"rel_gap 0.0001 -> 0.01") as caught:
        run_study(changed, tmp_path)
    assert "magnitude on digits_12_s50" in str(caught.value)
    outcome = run_study(changed, tmp_path, force=True)
    assert (outcome.new, outcome.done) == (4, 4)
    results = read_results(tmp_path)
    assert set(results.table["rel_gap"]) == {0.01}
    assert results.others == 2


@pytest.mark.usefixtures("in_process")
def test_a_folder_is_for_one_study_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(StudyFolderError, match="another study is running"):
        run_study(small_study(), tmp_path)
    assert run_study(small_study(), tmp_path, filters=["n=0"]).new == 0
    with pytest.raises(StudyFolderError, match="'small'"):
        run_study(small_study(name="another"), tmp_path)


@pytest.mark.usefixtures("in_process")
def test_other_versions_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = small_study(instances=[{"library": "digits_12_s50"}])
    run_study(study, tmp_path)
    with Journal(tmp_path) as journal:
        row = next(iter(journal.rows.values()))
        journal.append({**row, "versions": {**row["versions"], "numpy": "0.1"}})
    with caplog.at_level(logging.WARNING):
        run_study(study, tmp_path)
    assert "made with numpy 0.1" in caplog.text


@pytest.mark.usefixtures("in_process")
def test_failed_runs_are_tried_again_on_request(tmp_path: Path) -> None:
    study = small_study(
        instances=[{"library": "digits_12_s50"}],
        methods=[{"program": "joint", "methods": ["greedy_obs", "enumeration"]}],
    )
    run_study(study, tmp_path)
    with Journal(tmp_path) as journal:
        row = next(row for row in journal.rows.values() if row["method"] == "enumeration")
        journal.append({**row, "status": "crashed"})
    assert run_study(study, tmp_path).new == 0
    assert run_study(study, tmp_path, retry=True).new == 1
    assert set(read_results(tmp_path).table["status"]) == {"feasible", "optimal"}
