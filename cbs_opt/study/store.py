"""The folder of a study: a journal that survives any crash, the plan, and a lock.

Every finished run is one line of ``runs.jsonl``: a CRC-32 in hex, a space, a JSON object. A line is
appended by one write and flushed to the disk before the next run is taken from the queue. After a
crash the file is therefore whole, or its end is a torn line, which opening cuts off: that run is done
again. A line that a later run of the same fingerprint follows is superseded by it. Nothing else is
ever rewritten. ``results.parquet`` is made from the journal and can be made again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from cbs_opt.study.errors import StudyFolderError
from cbs_opt.study.expansion import Plan
from formulations.checked_lines import checked_body, checked_line
from formulations.files import json_object, read_sealed, sealed_json, write_atomically

logger = logging.getLogger(__name__)

JOURNAL = "runs.jsonl"
PLAN = "plan.json"
LOCK = "study.lock"
PLAN_VERSION = 1

Row = dict[str, Any]


class Journal:
    """The rows of a study, open for appending by one process; use as a context manager.

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
        If another process has the folder open, or a line before the last is damaged.
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
            rows, good = _read_lines(folder / JOURNAL)
            self._handle = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
            if os.fstat(self._handle).st_size > good:
                logger.warning("the last line of %s is torn; its run will be done again", folder / JOURNAL)
                os.ftruncate(self._handle, good)
            os.lseek(self._handle, 0, os.SEEK_END)
            _flush_folder(folder)
        except BaseException:
            self._lock.release()
            raise
        self.rows = {row["run"]: row for row in rows}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; when this returns it is on the disk.

        Raises
        ------
        OSError
            If the disk is full: what was written of the line is taken back.
        """
        line = _line(row)
        start = os.lseek(self._handle, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
            self.rows[str(row["run"])] = dict(row)
        except BaseException:
            # Ctrl-C too: what is in the file and what is in memory stay the same.
            os.ftruncate(self._handle, start)
            raise

    def close(self) -> None:
        """Close the file and let others have the folder."""
        os.close(self._handle)
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def write_plan(folder: Path, name: str, description: str, plan: Plan) -> None:
    """Say in the folder which runs make up the study, atomically.

    Raises
    ------
    StudyFolderError
        If the folder holds a study of another name.
    """
    earlier = read_plan(folder) if (folder / PLAN).exists() else None
    if earlier is not None and earlier["name"] != name:
        found = f"{folder} holds the study {earlier['name']!r}"
        raise StudyFolderError("out", found, "choose another folder")
    content = {
        "format": "cbs-opt study plan",
        "version": PLAN_VERSION,
        "name": name,
        "description": description,
        "left_out": list(plan.left_out),
        "runs": [run.describe() for run in plan.runs],
    }
    if earlier != content:
        write_atomically(folder / PLAN, sealed_json(content))


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan as `write_plan` wrote it.

    Raises
    ------
    StudyFolderError
        If there is none, or it is damaged or newer than this release.
    """
    path = folder / PLAN
    try:
        plan = read_sealed(path.read_bytes())
    except FileNotFoundError:
        remedy = "name the folder that `cbs-opt study` was given with --out"
        raise StudyFolderError("folder", f"{folder} holds no study", remedy) from None
    except (OSError, ValueError) as error:
        remedy = "delete it and start the study again: the rows are kept"
        raise StudyFolderError("folder", f"{path} is damaged ({error})", remedy) from error
    if plan.get("version") != PLAN_VERSION:
        raise StudyFolderError("folder", f"{path} is of another version", "read it with the right release")
    return plan


def read_rows(folder: Path) -> dict[str, Row]:
    """The latest row of each run by fingerprint, without the lock: a running study may be read.

    Raises
    ------
    StudyFolderError
        If a line before the last is damaged.
    """
    return {row["run"]: row for row in _read_lines(folder / JOURNAL)[0]}


def superseded(plan: Plan, rows: Mapping[str, Row]) -> list[str]:
    """What changed since the rows were made: one sentence for each run that is now another.

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
            sentences.append(f"{run.method} on {run.recipe.name}: {_differences(earlier, run.inputs)}")
    return sentences


def _differences(row: Row, inputs: Mapping[str, Any]) -> str:
    words = []
    for name, value in inputs.items():
        if row.get(name) != value:
            same = "the data of the block" if name == "block" else f"{name} {row.get(name)} -> {value}"
            words.append(same)
    return ", ".join(words)


def _line(row: Mapping[str, Any]) -> bytes:
    # No newline can occur inside: JSON escapes it.
    return checked_line(json.dumps(row, allow_nan=False).encode())


def _read_lines(path: Path) -> tuple[list[Row], int]:
    """Rows in file order, and the length of the undamaged start of the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    rows: list[Row] = []
    good = 0
    while good < len(content):
        end = content.find(b"\n", good)
        row = None if end < 0 else _parsed(content[good:end])
        if row is None:
            _refuse_damage_inside(path, content[good:], len(rows) + 1)
            break
        rows.append(row)
        good = end + 1
    return rows, good


def _refuse_damage_inside(path: Path, rest: bytes, number: int) -> None:
    """A crash tears the last line alone: a good line after a bad one is damage of another kind."""
    if any(_parsed(line) is not None for line in rest.split(b"\n")[1:]):
        remedy = "delete that line: its run will be done again"
        raise StudyFolderError("folder", f"{path}: line {number} is damaged", remedy)


def _parsed(line: bytes) -> Row | None:
    """The row of a line, None if the line is not as it was written."""
    body = checked_body(line)
    try:
        row = None if body is None else json_object(body)
    except ValueError:
        return None
    return row if row is not None and "run" in row else None


def _flush_folder(folder: Path) -> None:
    """Make the names of new files in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
