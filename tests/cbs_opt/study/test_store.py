"""The journal: whatever a crash leaves of its last line, no row is lost, doubled or made up."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt.study import store
from cbs_opt.study.errors import StudyFolderError
from cbs_opt.study.store import JOURNAL, PLAN, Journal, read_plan, read_rows

ROWS = [{"run": f"{i:02d}", "note": 'ä\n\t\u2028 \\ " ' * i, "objective": 1.0 / (i + 1)} for i in range(4)]


def filled(folder: Path) -> bytes:
    """The bytes of a journal with `ROWS`."""
    with Journal(folder) as journal:
        for row in ROWS:
            journal.append(row)
    return (folder / JOURNAL).read_bytes()


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    filled(tmp_path)
    assert list(read_rows(tmp_path).values()) == ROWS
    with Journal(tmp_path) as journal:
        assert list(journal.rows.values()) == ROWS


def test_a_journal_cut_anywhere_keeps_every_whole_row_and_takes_new_ones(tmp_path: Path) -> None:
    content = filled(tmp_path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        (tmp_path / JOURNAL).write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        assert list(read_rows(tmp_path).values()) == ROWS[:whole]
        with Journal(tmp_path) as journal:
            assert list(journal.rows.values()) == ROWS[:whole]
            for row in ROWS[whole:]:
                journal.append(row)
        assert (tmp_path / JOURNAL).read_bytes() == content


@settings(max_examples=60, deadline=None)
@given(tail=st.binary(max_size=40))
def test_a_tail_of_anything_is_cut_off(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    folder = tmp_path_factory.mktemp("journal")
    content = filled(folder)
    (folder / JOURNAL).write_bytes(content + tail)
    with Journal(folder) as journal:
        assert list(journal.rows.values()) == ROWS
    assert (folder / JOURNAL).read_bytes() == content


def test_damage_inside_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    content = bytearray(filled(tmp_path))
    content[30] ^= 1
    (tmp_path / JOURNAL).write_bytes(content)
    with pytest.raises(StudyFolderError, match="line 1 is damaged"):
        Journal(tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == content


def test_a_later_row_of_the_same_run_counts(tmp_path: Path) -> None:
    filled(tmp_path)
    with Journal(tmp_path) as journal:
        journal.append({"run": "01", "note": "again"})
    assert read_rows(tmp_path)["01"] == {"run": "01", "note": "again"}
    assert len(read_rows(tmp_path)) == len(ROWS)


def test_a_full_disk_loses_the_new_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = filled(tmp_path)
    write = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(handle, data[: len(data) // 2])

    with Journal(tmp_path) as journal:
        monkeypatch.setattr(store.os, "write", full)
        with pytest.raises(OSError, match="no space"):
            journal.append({"run": "new", "note": "x" * 100})
        monkeypatch.undo()
        assert (tmp_path / JOURNAL).read_bytes() == content
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
    Journal(tmp_path).close()


def test_numbers_that_json_has_not_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        with pytest.raises(ValueError, match="JSON"):
            journal.append({"run": "a", "objective": float("nan")})
        assert (tmp_path / JOURNAL).read_bytes() == b""


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"version": 99})])
def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(StudyFolderError, match="holds no study"):
        read_plan(tmp_path)
    (tmp_path / PLAN).write_text(content)
    with pytest.raises(StudyFolderError):
        read_plan(tmp_path)
