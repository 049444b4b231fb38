"""A worker without a process, for what does not depend on one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from cbs_opt.study import runner
from cbs_opt.study.expansion import Run
from cbs_opt.study.results import DATABASE, PLAN
from cbs_opt.study.single_run import RunSolver


class InProcessWorker:
    """Solves at once, where the runner is; the pipe only wakes it up."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.run: Run | None = None
        self.started: float | None = None
        self.alive = True
        self.connection, self._other = Pipe()
        self._solver = RunSolver()
        self._outcome: dict[str, Any] | None = None

    @property
    def idle(self) -> bool:
        return self.run is None

    def submit(self, run: Run, warm_up: bool) -> None:
        self.run, self.started = run, 0.0
        self._outcome = self._solver.answer(run)
        self._other.send("done")

    def step(self) -> dict[str, Any] | None:
        while self.connection.poll():
            self.connection.recv()
        self.run, outcome, self._outcome = None, self._outcome, None
        return outcome

    def stop(self) -> None:
        self.connection.close()
        self._other.close()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runner solve in this process."""
    monkeypatch.setattr(runner, "Worker", InProcessWorker)


def record_keys(folder: Path) -> list[str]:
    """Return the fingerprints of all rows that a study wrote, those that later ones replace too."""
    if not (folder / DATABASE).exists():
        return []
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        if not connection.execute("SELECT name FROM sqlite_master").fetchall():
            return []
        return [key for (key,) in connection.execute("SELECT key FROM records") if key != PLAN]
