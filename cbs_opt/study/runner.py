"""Work through a study: queue, workers, journal; stopped at any moment, it goes on where it was."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean
from typing import Any

from cbs_opt.select.preparation import prepare
from cbs_opt.study.config import Study
from cbs_opt.study.errors import FAILURES, ChangedInputsError
from cbs_opt.study.expansion import Plan, Run, expand, select
from cbs_opt.study.pool import Worker
from cbs_opt.study.results import Journal, Row, read_rows, superseded, write_parquet
from cbs_opt.system.versions import versions
from formulations.errors import ArgumentError

logger = logging.getLogger(__name__)

TICK = 0.1
"""Seconds between two looks at clocks and memory."""
MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Progress:
    """After a row: how many runs are done and to do, and seconds that the rest is expected to take."""

    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How `run_study` ended.

    Of the `planned` runs of the study the filters let `selected` ones through, `done` of which have a
    row, counted by their `statuses`; this call added `new` rows, and Ctrl-C may have `interrupted` it.
    """

    planned: int
    selected: int
    done: int
    new: int
    interrupted: bool
    statuses: dict[str, int] = field(default_factory=dict)


class TimeLeft:
    """Running estimate: the mean time of a method where known, else of all, else the longest allowed."""

    def __init__(self, runs: Iterable[Run], jobs: int) -> None:
        self._jobs = jobs
        self._waiting = {run.fingerprint: run for run in runs}
        self._times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)

    def finished(self, run: Run, seconds: float) -> None:
        """Take note that a run occupied a worker for `seconds`."""
        del self._waiting[run.fingerprint]
        self._times[run.what].append(seconds)

    @property
    def seconds(self) -> float:
        """Expected wall-clock seconds until all runs are done."""
        means = {what: fmean(times) for what, times in self._times.items()}
        usual = fmean(chain.from_iterable(self._times.values())) if means else math.inf
        expected = (means.get(run.what, min(run.limits.longest, usual)) for run in self._waiting.values())
        return sum(expected) / self._jobs


def longest(runs: Iterable[Run], jobs: int) -> float:
    """Return upper bound on the wall-clock seconds of `runs`: every one at its limit and its grace.

    Starting processes and the untimed warm-up of each method come on top.
    """
    times = [run.limits.longest for run in runs]
    # No worker is idle while a run waits, so the last one starts before the others' mean is over.
    return sum(times) / jobs + (1.0 - 1.0 / jobs) * max(times, default=0.0)


def run_study(
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    filters: Sequence[str] = (),
    force: bool = False,
    retry: bool = False,
    on_row: Callable[[Row, Progress], object] | None = None,
) -> Outcome:
    """Do the runs of a study that have no row in `folder` yet, and add their rows.

    `folder`: made if needed; what it holds of the same study is kept. `jobs`: worker processes. `filters`:
    see `cbs_opt.study.expansion.select`. `force`: run again what has a row made from other data or limits,
    instead of refusing. `retry`: run again what failed: crashed, was killed, was not available. `on_row`:
    called with each new row and the progress. Ctrl-C ends the study with what is done; the runs under way are
    dropped. Raises `ArgumentError` if the study or a filter makes no sense; nothing is run then;
    `ChangedInputsError` if rows were made from other data or limits and `force` is not given;
    `StudyFolderError` if the folder is in use, is damaged, or holds another study; `WorkerStartError` if no
    worker process can be started.
    """
    if jobs < 1:
        raise ArgumentError("jobs", f"{jobs}", "use at least 1")
    plan = expand(study)
    selected = select(plan.runs, filters)
    with Journal(Path(folder)) as journal:
        if not force:
            _check_unchanged(plan, journal)
        journal.write_plan(study.name, study.description, plan)
        todo = [run for run in selected if is_to_do(run, journal.rows, retry)]
        _warn_of_other_versions(row for run in selected if (row := journal.rows.get(run.fingerprint)))
        for method, program in sorted({run.what for run in todo}):
            prepare(method, program)
        new, interrupted, left = 0, False, TimeLeft(todo, jobs)
        with closing(_Queue(todo, jobs).outcomes()) as outcomes:
            try:
                for run, outcome, occupied in outcomes:
                    row = {**run.describe(), "versions": versions(), **outcome}
                    journal.append(row)
                    new += 1
                    left.finished(run, occupied)
                    if on_row is not None:
                        done = len(selected) - len(todo) + new
                        on_row(row, Progress(done=done, total=len(selected), seconds_left=left.seconds))
            except KeyboardInterrupt:
                interrupted = True
        # Ctrl-C may come between the disk and the memory: the disk counts.
        rows = read_rows(journal.folder)
        write_parquet(journal.folder, (rows[run.fingerprint] for run in plan.runs if run.fingerprint in rows))
    statuses = [rows[run.fingerprint]["status"] for run in selected if run.fingerprint in rows]
    return Outcome(
        planned=len(plan.runs),
        selected=len(selected),
        done=len(statuses),
        new=new,
        interrupted=interrupted,
        statuses=dict(Counter(statuses)),
    )


def is_to_do(run: Run, rows: dict[str, Row], retry: bool) -> bool:
    """Return whether a run has no row, or with `retry` one that says it failed."""
    row = rows.get(run.fingerprint)
    return row is None or (retry and row["status"] in FAILURES)


def _check_unchanged(plan: Plan, journal: Journal) -> None:
    if changes := superseded(plan, journal.rows):
        shown = "; ".join(changes[:MOST_NAMED])
        more = f"; and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
        found = f"{len(changes)} runs have rows made from other inputs: {shown}{more}"
        raise ChangedInputsError("study", found, "use --force to run them again, or another folder")


def _warn_of_other_versions(rows: Iterable[Row]) -> None:
    """Warn of rows made with other software: they stay, but nobody should find out later."""
    now = versions()
    differing: defaultdict[str, set[str]] = defaultdict(set)
    for name, version in (pair for row in rows for pair in row.get("versions", {}).items()):
        if now.get(name) != version:
            differing[name].add(version)
    for name, earlier in differing.items():
        found = ", ".join(sorted(earlier))
        logger.warning("earlier rows were made with %s %s, now %s", name, found, now.get(name, "absent"))


class _Queue:
    """The runs that wait, and the workers that take them."""

    def __init__(self, todo: Sequence[Run], jobs: int) -> None:
        self._waiting = list(todo)
        self._jobs = jobs
        self._workers: list[Worker] = []
        self._submitted: dict[Worker, float] = {}
        self._warm: set[tuple[str, str]] = set()
        """What has been compiled and imported by some worker, or cannot be warmed up."""
        self._cold: set[tuple[str, str]] = set()
        """What is run without a warm-up, because its own took the process with it."""

    def outcomes(self) -> Generator[tuple[Run, dict[str, Any], float], None, None]:
        """Give each run as it ends, with its outcome and the seconds that it occupied a worker."""
        try:
            while self._waiting or any(worker.run for worker in self._workers):
                self._assign()
                wait([worker.connection for worker in self._workers], timeout=TICK)
                for worker in list(self._workers):
                    run = worker.run
                    outcome = self._outcome(worker)
                    if run is not None and outcome is not None:
                        yield run, outcome, time.perf_counter() - self._submitted[worker]
        finally:
            for worker in self._workers:
                worker.stop()

    def _assign(self) -> None:
        """Give idle workers runs; start a worker where there are too few for what waits."""
        for worker in list(self._workers):
            run = self._next() if worker.idle else None
            if run is None:
                continue
            if run.limits.threads != worker.threads:
                self._replace(worker)
                self._workers.append(Worker(run.limits.threads))
            else:
                self._waiting.remove(run)
                self._submitted[worker] = time.perf_counter()
                worker.submit(run, warm_up=run.what not in self._cold)
        starting = sum(worker.run is None for worker in self._workers)
        if len(self._workers) < self._jobs and starting < len(self._waiting):
            self._workers.append(Worker(self._waiting[0].limits.threads))

    def _next(self) -> Run | None:
        """Return the first run whose method no other worker is compiling for the first time."""
        begun = {worker.run.what for worker in self._workers if worker.run and worker.started is None}
        return next((run for run in self._waiting if run.what not in begun - self._warm), None)

    def _outcome(self, worker: Worker) -> dict[str, Any] | None:
        """Return the outcome of a run that ended, if one did and it says something about the run."""
        run = worker.run
        outcome = worker.step()
        if worker.started is not None and run is not None:
            self._warm.add(run.what)
        if not worker.alive:
            self._replace(worker)
        if run is None or outcome is None or worker.started is not None or run.what in self._cold:
            return outcome
        # The small block of the warm-up took the process with it: once more without.
        logger.info("the warm-up of %s failed: %s", run.method, outcome["note"])
        self._cold.add(run.what)
        self._warm.add(run.what)
        self._waiting.insert(0, run)
        return None

    def _replace(self, worker: Worker) -> None:
        worker.stop()
        self._workers.remove(worker)
