"""How long the rest of a study will take, from what its runs took so far."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from cbs_opt.study.expansion import Run


class TimeLeft:
    """Running estimate: the mean time of a method where known, else of all, else the longest allowed.

    Parameters
    ----------
    runs : iterable of Run
        What is to be done.
    jobs : int
    """

    def __init__(self, runs: Iterable[Run], jobs: int) -> None:
        self._jobs = jobs
        self._waiting: Counter[tuple[str, str]] = Counter()
        self._longest: dict[tuple[str, str], float] = {}
        self._spent: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._done: Counter[tuple[str, str]] = Counter()
        for run in runs:
            what = (run.method, run.program)
            self._waiting[what] += 1
            self._longest[what] = max(self._longest.get(what, 0.0), run.limits.longest)

    def finished(self, run: Run, seconds: float) -> None:
        """Take note that a run occupied a worker for `seconds`."""
        what = (run.method, run.program)
        self._waiting[what] -= 1
        self._spent[what] += seconds
        self._done[what] += 1

    @property
    def seconds(self) -> float:
        """Expected wall-clock seconds until all runs are done."""
        done = self._done.total()
        overall = sum(self._spent.values()) / done if done else None
        total = 0.0
        for what, count in self._waiting.items():
            if self._done[what]:
                each = self._spent[what] / self._done[what]
            else:
                each = self._longest[what] if overall is None else min(overall, self._longest[what])
            total += count * each
        return total / self._jobs


def longest(runs: Iterable[Run], jobs: int) -> float:
    """Return upper bound on the wall-clock seconds of `runs`: every one at its limit and its grace.

    Starting processes and the untimed warm-up of each method come on top.
    """
    times = [run.limits.longest for run in runs]
    # No worker is idle while a run waits, so the last one starts before the others' mean is over.
    return sum(times) / jobs + (1.0 - 1.0 / jobs) * max(times, default=0.0)
