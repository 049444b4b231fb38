import numpy as np
import pytest

from experiments.benchmarks import exact_solvers
from experiments.benchmarks.digits_blocks import digits_block, synthetic_block
from experiments.benchmarks.exact_solvers import Case, formatted, run
from formulations import Limits
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
