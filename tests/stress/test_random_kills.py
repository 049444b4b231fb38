"""Runs that are killed at random moments end like the others, and a run that does not is found out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stress.random_kills import Case, kill_often, main, summary

CASES = ("selection, swap search", "stages")


def test_a_few_kills(tmp_path: Path) -> None:
    """In a process of its own: one whose libraries have started threads cannot be forked."""
    out = tmp_path / "kills.json"
    options = ("--kills", "6", "--seed", "1", "--cases", *CASES, "--out", str(out))
    program = [sys.executable, "-m", "tests.stress.random_kills", *options]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(out.read_text())
    assert all(trial["same"] for trial in trials)
    assert sum(len(trial["moments"]) for trial in trials) >= 6
    assert {trial["case"] for trial in trials} == set(CASES)


@pytest.mark.slow
def test_two_hundred_kills() -> None:
    trials = kill_often(200, seed=0)
    assert all(trial.same for trial in trials), summary(trials)
    assert len({phase for trial in trials for phase in trial.phases}) >= 6


def forgetful(folder: Path, run_dir: Path | None) -> dict[str, str]:
    """A run whose result depends on whether it was killed."""
    if run_dir is None:
        return {"network": "whole"}
    again = run_dir.exists()
    run_dir.mkdir(exist_ok=True)
    time.sleep(0.3)
    return {"network": "torn" if again else "whole"}


def failing(folder: Path, run_dir: Path | None) -> dict[str, str]:
    """A run that cannot go on."""
    if run_dir is not None and run_dir.exists():
        raise ValueError("half a file")
    return forgetful(folder, run_dir)


def test_a_run_that_does_not_resume_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [Case(name="forgetful", run=forgetful), Case(name="failing", run=failing)]
    monkeypatch.setattr("tests.stress.random_kills.cases", lambda: chosen)
    trials = kill_often(8, seed=3)
    killed = [trial for trial in trials if trial.phases and set(trial.phases) != {"nothing"}]
    wrong = {trial.case: trial.note for trial in killed if not trial.same}
    assert wrong.keys() == {"forgetful", "failing"}
    assert wrong["forgetful"] == "network"
    assert "half a file" in wrong["failing"]
    assert "half a file" in summary(trials)
    assert main(["--kills", "8", "--seed", "3"]) == 1
