"""A worker without a process, for what does not depend on one."""

from __future__ import annotations

from multiprocessing import Pipe
from typing import Any

import pytest

from cbs_opt.study import runner
from cbs_opt.study.expansion import Run
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
