"""One run inside a worker: answers are checked, traces thinned, failures told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

import cbs_opt as cbs
from cbs_opt.study import single_run
from cbs_opt.study.config import parse_study
from cbs_opt.study.expansion import Run, expand
from cbs_opt.study.single_run import LONGEST_TRACE, RunSolver
from formulations.solution import TracePoint


def one_run(**method: Any) -> Run:
    """The only run of a study on a block of twelve weights."""
    group = {"program": "joint", "methods": ["greedy_obs"], **method}
    study = parse_study({"instances": [{"library": "digits_12_s50"}], "methods": [group]})
    return expand(study).runs[0]


def answer(run: Run, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """What a worker would say if the method's solution were changed like that."""
    honest = cbs.solve(run.recipe.load(), "greedy_obs", program="joint")
    monkeypatch.setattr(single_run.solving, "solve", lambda *_, **__: replace(honest, **changes))
    return RunSolver().answer(run)


def test_an_honest_answer_has_every_column_and_is_json() -> None:
    outcome = RunSolver().answer(one_run())
    assert outcome["status"] == "feasible"
    assert outcome["objective"] > 0.0
    assert outcome["bound"] is None
    assert outcome["gap"] is None
    assert not outcome["proved"]
    assert outcome["seconds"] >= 0.0
    assert outcome["versions"]["numpy"]
    assert json.loads(json.dumps(outcome, allow_nan=False)) == outcome


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"objective": 0.0}, "recomputed"),
        ({"bound": 1e9}, "exceeds the objective"),
        ({"program": "selection"}, "selection"),
        ({"keep": None, "weights": None}, "no set"),
    ],
)
def test_an_answer_that_contradicts_itself_is_invalid_and_gives_no_numbers(
    changes: dict[str, Any], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = answer(one_run(), monkeypatch, **changes)
    assert outcome["status"] == "invalid"
    assert note in outcome["note"]
    assert "objective" not in outcome
    assert "proved" not in outcome


def test_a_long_trace_is_thinned_and_keeps_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    points = tuple(TracePoint(seconds=i / 10, nodes=i, objective=1.0, bound=None) for i in range(1234))
    trace = answer(one_run(), monkeypatch, trace=points)["trace"]
    assert len(trace) == LONGEST_TRACE
    assert trace[-1]["nodes"] == 1233
    assert [point["nodes"] for point in trace] == sorted({point["nodes"] for point in trace})
    short = answer(one_run(), monkeypatch, trace=points[:3])["trace"]
    assert [point["nodes"] for point in short] == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out_of_memory"),
        (cbs.CbsError("not this block"), "refused"),
        (ZeroDivisionError("x"), "error"),
    ],
)
def test_failures_are_told_apart(error: Exception, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(single_run.solving, "solve", fails)
    outcome = RunSolver().answer(one_run())
    assert outcome["status"] == status
    assert outcome["seconds"] >= 0.0
    assert json.dumps(outcome, allow_nan=False)


def test_a_solver_that_cannot_be_had_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    from formulations.solvers import scip
    from formulations.solvers.base import Probe

    absent = replace(scip.SOLVER, probe=lambda: Probe(available=False, reason="it is not installed"))
    monkeypatch.setattr(scip, "SOLVER", absent)
    outcome = RunSolver().answer(one_run(methods=["scip"]))
    assert outcome["status"] == "unavailable"
    assert "not installed" in outcome["note"]


def test_a_block_that_changed_after_the_plan_is_not_solved() -> None:
    outcome = RunSolver().answer(replace(one_run(), block="0" * 64))
    assert outcome["status"] == "refused"
    assert "changed after the study began" in outcome["note"]


def test_the_options_and_limits_of_the_run_reach_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(problem: cbs.BlockProblem, method: str, **arguments: Any) -> None:
        seen.update(arguments, method=method, n=problem.n)
        raise cbs.CbsError("enough")

    monkeypatch.setattr(single_run.solving, "solve", record)
    limits = {"time_limit": 3.5, "rel_gap": 0.25, "node_limit": 7, "iteration_limit": 8, "threads": 2}
    options = {"search": "depth"}
    run = one_run(methods=["branch_and_bound"], options=options, limits=limits, seeds=[11])
    RunSolver().answer(run)
    assert seen == {
        "method": "branch_and_bound",
        "n": 12,
        "program": "joint",
        "seed": 11,
        **limits,
        **options,
    }


def test_a_warm_up_comes_once_a_setting_on_another_block(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[str] = []
    real = single_run.solving.solve

    def record(problem: cbs.BlockProblem, method: str, **arguments: Any) -> object:
        solved.append(problem.name)
        return real(problem, method, **arguments)

    monkeypatch.setattr(single_run.solving, "solve", record)
    solver, run = RunSolver(), one_run()
    solver.warm_up(run)
    solver.warm_up(run)
    solver.warm_up(replace(run, method="magnitude"))
    assert solved == [single_run.WARM_UP_BLOCK] * 2


def test_a_solver_is_warmed_up_once_for_all_options_and_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(single_run, "_solve", lambda problem, run, seconds: limits.append(seconds))
    solver, run = RunSolver(), one_run()
    foreign = replace(run, method="highs:selection_glover", kind="solver")
    solver.warm_up(foreign)
    solver.warm_up(replace(foreign, options={"presolve": "off"}))
    solver.warm_up(run)
    assert limits == [single_run.SOLVER_WARM_UP, run.limits.warm_up]


def test_processor_time_counts_processes_that_a_method_waited_for() -> None:
    before = single_run._processor_seconds()
    busy = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-S", "-c", busy], check=True)
    assert single_run._processor_seconds() - before >= 0.2
