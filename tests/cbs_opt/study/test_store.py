"""The folder of a study: whatever happens to the file, no row is lost, doubled or made up."""

from __future__ import annotations

import os
import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt.study.errors import StudyFolderError
from cbs_opt.study.expansion import Plan
from cbs_opt.study.results import DATABASE, Journal, read_plan, read_rows

ROWS = [{"run": f"{i:02d}", "note": 'ä\n\t\u2028 \\ " ' * i, "objective": 1.0 / (i + 1)} for i in range(4)]
NO_RUNS = Plan(runs=(), left_out=("highs: no",))


def filled(folder: Path) -> bytes:
    """Write `ROWS` and a plan; return the bytes of the file."""
    with Journal(folder) as journal:
        journal.write_plan("a", "about", NO_RUNS)
        for row in ROWS:
            journal.append(row)
    return (folder / DATABASE).read_bytes()


def change(folder: Path, statement: str) -> None:
    """Change the file behind the back of the study."""
    with closing(sqlite3.connect(folder / DATABASE)) as connection, connection:
        connection.execute(statement)


def test_rows_and_plan_come_back_as_they_were(tmp_path: Path) -> None:
    filled(tmp_path)
    assert list(read_rows(tmp_path).values()) == ROWS
    assert read_plan(tmp_path) == {"name": "a", "description": "about", "left_out": ["highs: no"], "runs": []}
    with Journal(tmp_path) as journal:
        assert list(journal.rows.values()) == ROWS
        assert list(read_rows(tmp_path).values()) == ROWS, "a running study may be read"


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0.0, 1.0), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_or_tells_nothing_untrue(
    tmp_path_factory: pytest.TempPathFactory, place: float, flip: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    content = bytearray(filled(folder))
    index = min(int(place * len(content)), len(content) - 1)
    content[index] ^= flip
    (folder / DATABASE).write_bytes(content[:index] if cut else content)
    try:
        rows = read_rows(folder)
    except StudyFolderError:
        return
    assert all(row in ROWS for row in rows.values())


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE records SET content = replace(content, '0.5', '0.4')",
        "UPDATE records SET key = '01' WHERE key = '00'",
        "UPDATE records SET content = NULL WHERE key = '02'",
    ],
)
def test_a_damaged_row_is_named_and_the_remedy_mends_it(tmp_path: Path, damage: str) -> None:
    filled(tmp_path)
    change(tmp_path, damage)
    with pytest.raises(StudyFolderError, match=r"record \d is damaged") as caught:
        Journal(tmp_path)
    change(tmp_path, caught.value.remedy.split("'")[1])
    with Journal(tmp_path) as journal:
        assert list(journal.rows.values()) == [row for row in ROWS if row["run"] in journal.rows]
        assert len(journal.rows) == len(ROWS) - 1


def test_a_later_row_of_the_same_run_counts(tmp_path: Path) -> None:
    filled(tmp_path)
    with Journal(tmp_path) as journal:
        journal.append({"run": "01", "note": "again"})
    assert read_rows(tmp_path)["01"] == {"run": "01", "note": "again"}
    assert len(read_rows(tmp_path)) == len(ROWS)


@pytest.mark.parametrize("room", [0, 40, 600, 4096])
def test_a_full_disk_loses_the_new_row_only(tmp_path: Path, room: int) -> None:
    size = len(filled(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
        try:
            with pytest.raises(StudyFolderError, match=DATABASE):
                journal.append({"run": "new", "note": "x" * 10_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "new" not in journal.rows
        assert list(read_rows(tmp_path).values()) == ROWS
        journal.append({"run": "new"})
    assert len(read_rows(tmp_path)) == len(ROWS) + 1


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(StudyFolderError, match="running in it"):
        Journal(tmp_path)
    child = os.fork()
    if child == 0:
        Journal(tmp_path)
        os._exit(0)
    os.waitpid(child, 0)
    with Journal(tmp_path):
        pass


def test_numbers_that_json_has_not_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal, pytest.raises(ValueError, match="JSON"):
        journal.append({"run": "a", "objective": float("nan")})
    assert read_rows(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "{", "SQLite format 3", "x" * 5000])
def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(StudyFolderError, match="holds no study"):
        read_plan(tmp_path)
    (tmp_path / DATABASE).write_text(content)
    with pytest.raises(StudyFolderError):
        read_plan(tmp_path)


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    change(tmp_path, "PRAGMA user_version = 99")
    for use in (Journal, read_plan, read_rows):
        with pytest.raises(StudyFolderError, match="version 99"):
            use(tmp_path)
