"""How long the rest of a study will take, from what its runs took so far."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import fmean

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
        self._seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for run in runs:
            what = (run.method, run.program)
            self._waiting[what] += 1
            self._longest[what] = max(self._longest.get(what, 0.0), run.limits.longest)

    def finished(self, run: Run, seconds: float) -> None:
        """Take note that a run occupied a worker for `seconds`."""
        self._waiting[run.method, run.program] -= 1
        self._seconds[run.method, run.program].append(seconds)

    @property
    def seconds(self) -> float:
        """Expected wall-clock seconds until all runs are done."""
        every = [seconds for times in self._seconds.values() for seconds in times]
        total = 0.0
        for what, count in self._waiting.items():
            if times := self._seconds.get(what):
                total += count * fmean(times)
            else:
                total += count * min(self._longest[what], fmean(every) if every else math.inf)
        return total / self._jobs


def longest(runs: Iterable[Run], jobs: int) -> float:
    """Return upper bound on the wall-clock seconds of `runs`: every one at its limit and its grace.

    Starting processes and the untimed warm-up of each method come on top.
    """
    times = [run.limits.longest for run in runs]
    # No worker is idle while a run waits, so the last one starts before the others' mean is over.
    return sum(times) / jobs + (1.0 - 1.0 / jobs) * max(times, default=0.0)
