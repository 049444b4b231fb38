"""Kill -9 at any moment, start again: the same rows as without, none lost, none twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from cbs_opt.study.config import read_study
from cbs_opt.study.results import read_results
from cbs_opt.study.runner import run_study
from tests.cbs_opt.study.conftest import record_keys

STUDY = """
name = "killed"
limits = {{ time_limit = 20, warm_up = 0 }}
seeds = {seeds}
[[instances]]
library = ["digits_12_s*", "digits_16_s*", "digits_24_s*"]
[[methods]]
program = "joint"
methods = ["magnitude", "greedy_obs", "randomized_magnitude", "obs"]
"""
RUNS_A_SEED = 9 * 4
SAME = ["run", "instance", "program", "method", "seed", "status", "objective", "nodes", "note"]


def command(study: Path, out: Path, jobs: int) -> Sequence[str]:
    """The study as a command."""
    return [sys.executable, "-m", "cbs_opt", "study", str(study), "--out", str(out), "--jobs", str(jobs)]


def kill_after_rows(study: Path, out: Path, rows: int, pause: float, jobs: int) -> int:
    """Kill the study `pause` seconds after its journal has `rows` rows; how many it has then."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command(study, out, jobs), stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        deadline = time.monotonic() + 120.0
        while time.monotonic() < deadline and process.poll() is None:
            if len(record_keys(out)) >= rows:
                break
            time.sleep(0.005)
        time.sleep(pause)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlive their parent"
    return len(record_keys(out))


def finish_and_compare(study: Path, out: Path, whole: Path, runs: int) -> None:
    """Go on to the end; the result must be that of an uninterrupted study."""
    described = read_study(study)
    run_study(described, out)
    assert len(record_keys(out)) == runs, "a run was lost or done twice"
    run_study(described, whole)
    found, expected = read_results(out).table[SAME], read_results(whole).table[SAME]
    assert len(found) == runs
    assert found.equals(expected)


def written(folder: Path, seeds: int) -> tuple[Path, int]:
    """Write the study with so many seeds; its file, and how many runs it has."""
    study = folder / "killed.toml"
    study.write_text(STUDY.format(seeds=list(range(seeds))))
    return study, RUNS_A_SEED * seeds


def kill_often(folder: Path, times: int, seed: int, jobs: int, *, seeds: int) -> None:
    """Kill one study at random moments, before its first row too, and compare it with another."""
    study, runs = written(folder, seeds)
    generator = random.Random(seed)
    rows = 0
    for number in range(times):
        more = 0 if number % 5 == 4 else generator.randint(1, 8)
        rows = kill_after_rows(study, folder / "out", rows + more, generator.random() / 50, jobs)
    assert 0 < rows < runs
    finish_and_compare(study, folder / "out", folder / "whole", runs)


@pytest.mark.usefixtures("in_process")
def test_a_study_killed_twice_is_the_study(tmp_path: Path) -> None:
    kill_often(tmp_path, times=2, seed=3, jobs=1, seeds=2)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_study_killed_twenty_times_is_the_study(tmp_path: Path) -> None:
    kill_often(tmp_path, times=20, seed=0, jobs=2, seeds=5)


def test_ctrl_c_ends_it_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    study, runs = written(tmp_path, seeds=5)
    process = subprocess.Popen(
        command(study, tmp_path / "out", 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline and process.poll() is None:
        if record_keys(tmp_path / "out"):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"goes on" in errors
    assert b"Traceback" not in errors
    rows = len(record_keys(tmp_path / "out"))
    assert f"{rows} of {runs} runs done".encode() in said
    assert rows < runs
