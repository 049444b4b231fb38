from dataclasses import replace

import numpy as np
import pytest

from experiments.benchmarks import exact_solvers, rivals
from experiments.benchmarks.digits_blocks import digits_block, synthetic_block
from experiments.benchmarks.exact_solvers import Case, formatted, run
from experiments.benchmarks.lazy_cuts import gurobi_lazy_cuts
from experiments.benchmarks.race_page import race_page
from experiments.benchmarks.rivals import CONTENDERS, OURS, Absent, Contender, race
from experiments.benchmarks.timing import Row
from formulations import Limits, Termination, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.enumeration import enumerate_optimum


def test_blocks_are_seeded_and_sized():
    first, second = synthetic_block(30, 0.1, 15), synthetic_block(30, 0.1, 15)
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != synthetic_block(30, 0.1, 15, seed=1).fingerprint()
    assert first.damping == pytest.approx(0.1 * (first.rows**2).sum(axis=0).mean())


def test_digits_rows_are_gradients_of_consecutive_neurons():
    problem = digits_block(200, 1e-5, 100, epochs=5)
    assert problem.rows.shape == (1000, 200)
    assert problem.n_prune == 100
    # Per-sample gradients of one neuron are rank one across samples: outer(delta, inputs).
    ratio = problem.rows[:, :128] * np.sqrt(1000.0)
    active = np.abs(ratio).sum(axis=1) > 0.0
    assert 0 < active.sum() < 1000
    assert digits_block(64, 1e-5, 10, epochs=5).rows == pytest.approx(problem.rows[:, :64])


def test_rows_report_what_happened():
    case = Case(program="joint", problem=synthetic_block(14, 0.1, 7), mark=60.0)
    methods = {"branch_and_bound": branch_and_bound, "enumeration": enumerate_optimum}
    rows = [exact_solvers.timed(case, name, method, Limits()) for name, method in methods.items()]
    assert all(row.verified and row.solution.proved for row in rows)
    assert rows[0].solution.objective == pytest.approx(rows[1].solution.objective, rel=1e-6)
    assert "met" in formatted(rows[0])
    stopped = exact_solvers.timed(case, "branch_and_bound", branch_and_bound, Limits(time_limit=0.0))
    assert not stopped.met
    assert "MISSED" in formatted(stopped)


def test_every_method_runs_on_every_case():
    cases = [
        Case(program=program, problem=synthetic_block(10, 0.1, 5), mark=60.0)
        for program in ("joint", "selection")
    ]
    rows = list(run(cases, {"branch_and_bound": branch_and_bound}, Limits()))
    assert [row.case.program for row in rows] == ["joint", "selection"]


def cases_of(*sizes):
    return [
        Case(program=program, problem=synthetic_block(n, 0.1, n // 2), mark=60.0)
        for program in ("selection", "joint")
        for n in sizes
    ]


def never_proves(problem, program, *, limits):
    solution = enumerate_optimum(problem, program, limits=limits)
    return replace(solution, termination=Termination.FEASIBLE, bound=None)


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Warm up on a synthetic block: training the digits network takes seconds."""
    monkeypatch.setattr(rivals, "digits_block", lambda n, damping, k: synthetic_block(n, damping, k))


@pytest.mark.parametrize("program", ["selection", "joint"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_lazy_cuts_prove_what_enumeration_proves(program, share):
    pytest.importorskip("gurobipy")
    for rho in (0.1, 1e-4):
        problem = synthetic_block(14, rho, round(14 * share))
        found = gurobi_lazy_cuts(problem, program, limits=Limits(rel_gap=1e-6))
        oracle = enumerate_optimum(problem, program)
        assert found.proved
        assert found.objective == pytest.approx(oracle.objective, rel=2e-6)
        assert found.bound <= oracle.objective * (1.0 + 1e-12)
        assert not verify(problem, found).wrong
    stopped = gurobi_lazy_cuts(synthetic_block(60, 0.1, 30), program, limits=Limits(time_limit=0.05))
    assert stopped.bound < stopped.objective


def test_a_race_runs_every_contender_that_can_and_drops_those_that_fail():
    failing = Contender(name="failing", summary="fails", method=never_proves)
    small = Contender(name="small", summary="small", method=enumerate_optimum, largest={"joint": 8})
    outcomes = list(race(cases_of(8, 10, 12), [CONTENDERS[0], failing, small], Limits(rel_gap=1e-4)))
    assert len(outcomes) == 18
    absent = [(o.case.program, o.case.problem.n, o.method) for o in outcomes if isinstance(o, Absent)]
    expected = [(program, n, "failing") for program in ("selection", "joint") for n in (10, 12)]
    assert sorted(absent) == sorted([*expected, ("joint", 10, "small"), ("joint", 12, "small")])
    dropped = [o.reason for o in outcomes if isinstance(o, Absent) and o.method == "failing"]
    assert set(dropped) == {"unproved at n = 8"}
    rows = [o for o in outcomes if isinstance(o, Row)]
    assert all(row.verified for row in rows)
    assert all(row.solution.proved for row in rows if row.method != "failing")


def test_a_solver_that_is_missing_or_too_small_is_listed_with_the_reason(monkeypatch):
    pytest.importorskip("gurobipy")
    gurobi = next(contender for contender in CONTENDERS if contender.name == "gurobi")
    licence = rivals.bridge("gurobi").info()
    monkeypatch.setattr(
        rivals,
        "bridge",
        lambda name: type(
            "Bridge", (), {"info": lambda self: replace(licence, available=False, reason="gone")}
        )(),
    )
    missing = list(race(cases_of(8), [gurobi], Limits()))
    assert [outcome.reason for outcome in missing] == ["gone", "gone"]
    monkeypatch.undo()
    if licence.limits is not None:
        large = [Case(program="joint", problem=synthetic_block(67, 0.1, 33), mark=1.0)]
        monkeypatch.setattr(rivals, "_warm_up", lambda contender: None)
        assert "licence allows" in next(iter(race(large, [gurobi], Limits(time_limit=1.0)))).reason


def test_the_page_says_where_a_rival_is_ahead_and_where_proofs_disagree():
    case = cases_of(10)[0]
    solution = enumerate_optimum(case.problem, case.program)
    ours = Row(case=case, method=OURS, solution=solution, wall=2.0, cpu=2.0, verified=True)
    ahead = replace(ours, method="quick", cpu=1.0, wall=1.5)
    behind = replace(ours, method="slow", cpu=7.0, wall=7.5)
    gone = Absent(case=case, method="gone", reason="no licence")
    page = race_page([ours, ahead, behind, gone], Limits(rel_gap=1e-4, time_limit=5.0), ["--rivals"])
    assert "1.000 s, 0.5x" in page
    assert "7.000 s, 3.5x" in page
    assert "no licence" in page
    section = page.split("## Where a rival is ahead")[1].split("##")[0]
    assert "`quick`" in section
    assert "`slow`" not in section
    assert "with the same optimum" in page
    alone = race_page([ours, behind], Limits(rel_gap=1e-4, time_limit=5.0), [])
    assert "Nowhere in this run." in alone
    wrong = replace(behind, solution=replace(solution, objective=1.1 * solution.objective), verified=False)
    page = race_page([ours, wrong], Limits(rel_gap=1e-4, time_limit=5.0), [])
    assert "proved values from" in page
    assert "slow on" in page


def test_the_command_races_and_writes_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exact_solvers, "CONTENDERS", CONTENDERS[:1])
    monkeypatch.setattr(exact_solvers, "digits_block", lambda n, damping, k: synthetic_block(n, 0.1, k))
    page = tmp_path / "docs" / "race.md"
    arguments = ["--rivals", "--sizes", "12", "8", "--shares", "0.5", "--markdown", str(page)]
    assert exact_solvers.main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    text = page.read_text()
    assert "--sizes 12 8" in text
    assert "| 8 | 4 |" in text
