"""The folder of a study: one SQLite file with the rows and the plan, and a lock for the process that writes.

Every run that ends is one record, a JSON object with a checksum of its own, which SQLite commits and
flushes to the disk before the next run is taken from the queue: a kill at any moment loses at most
the runs under way. Records are only added; the latest one of a run counts. ``results.parquet`` is made
from them and can be made again, as is the table that reports are drawn from.
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from cbs_opt.study.errors import StudyFolderError
from cbs_opt.study.expansion import Plan
from formulations.files import read_sealed, sealed_json, write_atomically

DATABASE = "study.db"
LOCK = "study.lock"
VERSION = 1
PLAN = "plan"
"""Key of the record that says which runs make up the study; that of a row is its fingerprint."""
BUSY_SECONDS = 60.0
"""Seconds to wait while another process reads."""

PARQUET = "results.parquet"
Row = dict[str, Any]

FIRST = (
    *("run", "instance", "block", "n", "n_prune", "damping", "program", "method", "kind", "options", "seed"),
    *("status", "limit", "note", "objective", "bound", "certified_bound", "gap", "proved"),
    *("seconds", "cpu_seconds", "nodes", "iterations", "peak_memory"),
    *("time_limit", "rel_gap", "node_limit", "iteration_limit", "threads", "grace", "memory_gib", "started"),
)
"""Columns that every table has, in this order; an option, a version and the machine follow."""
NUMBERS = (
    *("damping", "objective", "bound", "certified_bound", "gap", "seconds", "cpu_seconds"),
    *("nodes", "iterations", "peak_memory", "node_limit", "iteration_limit"),
)
GROUPS = {"options": "option", "versions": "version", "machine": "machine"}
"""Mappings in a row, and what their entries are called as columns: ``option.search``."""


class Journal:
    """The rows of a study, open for adding by one process; use as a context manager.

    `rows` has the latest row of each run by fingerprint. The folder is made if it does not exist. One that
    another process has open, or that is damaged or of another version, is a `StudyFolderError`.
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
        """Add a row; when this returns it is on the disk, when it raises nothing of it is there."""
        self._add(str(row["run"]), row)
        self.rows[str(row["run"])] = dict(row)

    def write_plan(self, name: str, description: str, plan: Plan) -> None:
        """Write which runs make up the study; refuse a folder that holds a study of another name."""
        earlier = dict(_records(self.folder)).get(PLAN)
        if earlier is not None and earlier["name"] != name:
            found = f"{self.folder} holds the study {earlier['name']!r}"
            raise StudyFolderError("out", found, "choose another folder")
        runs = [run.describe() for run in plan.runs]
        content = {"name": name, "description": description, "left_out": list(plan.left_out), "runs": runs}
        if earlier != content:
            self._add(PLAN, content)

    def _add(self, key: str, content: Mapping[str, Any]) -> None:
        sealed = sealed_json(content).decode()
        with _opened(self.folder / DATABASE) as connection:
            connection.execute("INSERT INTO records VALUES (?, ?)", (key, sealed))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the plan: `name`, `description`, `left_out`, and `runs` as `Run.describe` gives them."""
    plan = dict(_records(folder)).get(PLAN)
    if plan is None:
        remedy = "name the folder that `cbs-opt study` was given with --out"
        raise StudyFolderError("folder", f"{folder} holds no study", remedy)
    return plan


def read_rows(folder: Path) -> dict[str, Row]:
    """Return the latest row of each run by fingerprint; needs no lock, so a running study may be read."""
    return {key: content for key, content in _records(folder) if key != PLAN}


def superseded(plan: Plan, rows: Mapping[str, Row]) -> list[str]:
    """Return what changed since the rows were made: one sentence for each run that is now another.

    Compares the block and the limits of planned runs without a row with those of rows of the same
    instance, program, method, options and seed.
    """
    names = ("instance", "program", "method", "options", "seed")
    keys = (json.dumps({name: row[name] for name in names}, sort_keys=True) for row in rows.values())
    by_key = dict(zip(keys, rows.values(), strict=True))
    sentences = []
    for run in (run for run in plan.runs if run.fingerprint not in rows and run.key in by_key):
        earlier = by_key[run.key]
        changes = {name: value for name, value in run.inputs.items() if earlier.get(name) != value}
        words = [
            f"{name} {earlier.get(name)} -> {value}" for name, value in changes.items() if name != "block"
        ]
        words = ["the data of the block", *words] if "block" in changes else words
        sentences.append(f"{run.method} on {run.recipe.name}: {', '.join(words)}")
    return sentences


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a folder holds of a study.

    `table` has a row for each run of the plan that is done, in its order (see `results_table`), of `planned`
    ones; `others` rows belong to no run of the plan; combinations in `left_out` do not exist.
    """

    name: str
    description: str
    table: pd.DataFrame
    planned: int
    others: int
    left_out: tuple[str, ...]


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Read the folder of a study, finished or not.

    Raises `StudyFolderError` if it holds none, or is damaged.
    """
    plan, rows = read_plan(Path(folder)), read_rows(Path(folder))
    done = [rows[run["run"]] for run in plan["runs"] if run["run"] in rows]
    return Results(
        **{name: plan[name] for name in ("name", "description")},
        table=results_table(done),
        planned=len(plan["runs"]),
        others=len(rows) - len(done),
        left_out=tuple(plan["left_out"]),
    )


def results_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return rows as a data frame.

    It has the columns of `FIRST`; ``option.<name>``, ``version.<name>`` and ``machine.<name>``; `trace`, a
    list of points with seconds, nodes, objective and bound; `extra`, JSON text. `options` is JSON
    text too, so that it can be grouped by.
    """
    table = pd.DataFrame([_flat(row) for row in rows])
    named = [name for name in table.columns if name not in FIRST and name not in ("trace", "extra")]
    table = table.reindex(columns=[*FIRST, *named, "trace", "extra"]).astype(dict.fromkeys(NUMBERS, float))
    return table.assign(proved=table["proved"].eq(True))


def write_parquet(folder: Path, rows: Iterable[Row]) -> Path:
    """Write the rows as ``results.parquet``, atomically; the path of the file."""
    table = results_table(rows)
    for name in table.columns[table.columns.str.startswith("option.")]:
        # One option may be a number for one solver and a word for another.
        table[name] = table[name].map(lambda value: value if pd.isna(value) else json.dumps(value))
    buffer = io.BytesIO()
    table.to_parquet(buffer, engine="pyarrow", index=False)
    write_atomically(folder / PARQUET, buffer.getvalue())
    return folder / PARQUET


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name not in GROUPS}
    for name, prefix in GROUPS.items():
        flat |= {f"{prefix}.{key}": value for key, value in row.get(name, {}).items()}
    flat["options"] = json.dumps(row["options"], sort_keys=True)
    flat["trace"] = row.get("trace") or []
    flat["extra"] = json.dumps(row.get("extra") or {}, sort_keys=True)
    return flat
