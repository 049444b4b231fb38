"""What the runner itself costs: measured, so only on a quiet machine (slow)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cbs_opt.study.config import parse_study
from cbs_opt.study.runner import run_study
from formulations import plugins
from tests.cbs_opt.study.foreign import installed, write_package

SLEEPS = """
import time
from formulations.incumbents import IncumbentPool

def solve(problem, program, *, limits, incumbent=None, seconds: float = 1.0):
    pool = IncumbentPool(problem, program, incumbent)
    pool.offer_magnitude_if_empty()
    time.sleep(seconds)
    return pool.solution(method="sleeps")
"""


def overhead(folder: Path, monkeypatch: pytest.MonkeyPatch, *, seconds: float, runs: int, jobs: int) -> float:
    """Seconds a run beyond the sleep, once every worker has ended one run, so beyond process start."""
    write_package(folder, "sleeps", SLEEPS, {"sleeps": "sleeps:solve"}, plugins.METHODS)
    study = parse_study(
        {
            "limits": {"warm_up": 0},
            "seeds": list(range(runs)),
            "instances": [{"library": "digits_64_s50"}],
            "methods": [{"program": "joint", "methods": "sleeps", "options": {"seconds": seconds}}],
        }
    )
    ended: list[float] = []
    with installed(folder, monkeypatch):
        run_study(study, folder / "out", jobs=jobs, on_row=lambda row, _: ended.append(time.perf_counter()))
    rounds = (runs - jobs) / jobs
    return (ended[-1] - ended[jobs - 1]) / rounds - seconds


@pytest.mark.slow
def test_a_run_costs_less_than_fifty_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert overhead(tmp_path, monkeypatch, seconds=0.0, runs=100, jobs=1) < 0.050


@pytest.mark.slow
def test_solves_of_a_second_take_two_per_cent_longer_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert overhead(tmp_path, monkeypatch, seconds=1.0, runs=40, jobs=2) < 0.020
