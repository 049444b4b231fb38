"""The folder of a study: one SQLite file with the rows and the plan, and a lock for the process that writes.

Every run that ends is one record, a JSON object with a checksum of its own, which SQLite commits and
flushes to the disk before the next run is taken from the queue: a kill at any moment loses at most
the runs under way. Records are only added; the latest one of a run counts. ``results.parquet`` is made
from them and can be made again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cbs_opt.study.errors import StudyFolderError
from cbs_opt.study.expansion import Plan
from formulations.files import read_sealed, sealed_json

DATABASE = "study.db"
LOCK = "study.lock"
VERSION = 1
PLAN = "plan"
"""Key of the record that says which runs make up the study; that of a row is its fingerprint."""
BUSY_SECONDS = 60.0
"""Seconds to wait while another process reads."""

Row = dict[str, Any]


class Journal:
    """The rows of a study, open for adding by one process; use as a context manager.

    Parameters
    ----------
    folder : path
        Made if it does not exist.

    Attributes
    ----------
    rows : dict of str to dict
        The latest row of each run, by fingerprint.

    Raises
    ------
    StudyFolderError
        If another process has the folder open, or what it holds is damaged or of another version.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            remedy = "wait for it, or choose another folder"
            raise StudyFolderError("out", f"{folder}: another study is running in it", remedy) from None
        try:
            self.rows = read_rows(folder)
        except BaseException:
            self._lock.release()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; when this returns it is on the disk.

        Raises
        ------
        StudyFolderError
            If it cannot be written, as on a full disk: nothing of it is there then.
        """
        self._add(str(row["run"]), row)
        self.rows[str(row["run"])] = dict(row)

    def write_plan(self, name: str, description: str, plan: Plan) -> None:
        """Write which runs make up the study.

        Raises
        ------
        StudyFolderError
            If the folder holds a study of another name.
        """
        earlier = dict(_records(self.folder)).get(PLAN)
        if earlier is not None and earlier["name"] != name:
            found = f"{self.folder} holds the study {earlier['name']!r}"
            raise StudyFolderError("out", found, "choose another folder")
        content = {
            "name": name,
            "description": description,
            "left_out": list(plan.left_out),
            "runs": [run.describe() for run in plan.runs],
        }
        if earlier != content:
            self._add(PLAN, content)

    def _add(self, key: str, content: Mapping[str, Any]) -> None:
        sealed = sealed_json(content).decode()
        with _opened(self.folder / DATABASE) as connection:
            connection.execute("INSERT INTO records VALUES (?, ?)", (key, sealed))

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the plan: `name`, `description`, `left_out`, and `runs` as `Run.describe` gives them.

    Raises
    ------
    StudyFolderError
        If there is none, or the folder is damaged or of another version.
    """
    plan = dict(_records(folder)).get(PLAN)
    if plan is None:
        remedy = "name the folder that `cbs-opt study` was given with --out"
        raise StudyFolderError("folder", f"{folder} holds no study", remedy)
    return plan


def read_rows(folder: Path) -> dict[str, Row]:
    """Return the latest row of each run by fingerprint; needs no lock, so a running study may be read.

    Raises
    ------
    StudyFolderError
        If the folder is damaged or of another version.
    """
    return {key: content for key, content in _records(folder) if key != PLAN}


def superseded(plan: Plan, rows: Mapping[str, Row]) -> list[str]:
    """Return what changed since the rows were made: one sentence for each run that is now another.

    Compares the block and the limits of planned runs without a row with those of rows of the same
    instance, program, method, options and seed.
    """
    by_key: dict[str, Row] = {}
    for row in rows.values():
        names = ("instance", "program", "method", "options", "seed")
        by_key[json.dumps({name: row[name] for name in names}, sort_keys=True)] = row
    sentences = []
    for run in plan.runs:
        earlier = None if run.fingerprint in rows else by_key.get(run.key)
        if earlier is not None:
            changes = ", ".join(
                "the data of the block" if name == "block" else f"{name} {earlier.get(name)} -> {value}"
                for name, value in run.inputs.items()
                if earlier.get(name) != value
            )
            sentences.append(f"{run.method} on {run.recipe.name}: {changes}")
    return sentences


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give key and content of every record, the oldest first."""
    path = folder / DATABASE
    if not path.exists():
        return
    with _opened(path) as connection:
        records = connection.execute("SELECT rowid, key, content FROM records ORDER BY rowid").fetchall()
    for number, key, sealed in records:
        try:
            content = read_sealed(sealed.encode())
            if key not in (PLAN, content.get("run")):
                raise ValueError("it is filed under another run")
        except (ValueError, AttributeError) as error:
            found = f"{path}: record {number} is damaged ({error})"
            remedy = f"delete it: sqlite3 {path} 'DELETE FROM records WHERE rowid = {number}'"
            raise StudyFolderError("folder", found, f"{remedy}; its run will be done again") from error
        yield key, content


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Give a connection that flushes each record to the disk; the table is made where it is missing."""
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = EXTRA")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                connection.execute("CREATE TABLE IF NOT EXISTS records (key TEXT, content TEXT)")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                found = f"{path} is of version {version}, this release reads {VERSION}"
                raise StudyFolderError("folder", found, "read it with the right release")
            yield connection
    except sqlite3.Error as error:
        remedy = "make room and go on, or choose another folder"
        raise StudyFolderError("folder", f"{path} cannot be used ({error})", remedy) from error
