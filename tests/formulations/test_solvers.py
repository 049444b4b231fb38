"""Every bridge agrees with brute force, says honestly how it ended, and never loses the warm start."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from formulations import BlockProblem, BlockSolution, Limit, Limits, Termination, verify
from formulations.enumeration import enumerate_optimum
from formulations.errors import (
    ArgumentError,
    SolverUnavailableError,
    UnknownOptionError,
    UnsupportedProblemError,
)
from formulations.incumbents import greedy
from formulations.milp import Milp, MilpControls, run_milp
from formulations.models import MODELS, REPEATABLE, ModelSize
from formulations.outer_approximation import outer_approximation
from formulations.solvers import (
    BRIDGES,
    available_solvers,
    bridge,
    cp_sat,
    highs,
    models_for,
    scip,
    solve_with,
    solver_names,
)
from formulations.solvers.base import Probe, RawResult, Solver, SolverInfo
from tests.formulations.blocks import KINDS, block, brute_force, closed, slack


@functools.cache
def installed() -> dict[str, SolverInfo]:
    """Every solver by name, asked once and not while tests are collected: Pyomo takes a second."""
    return {info.name: info for info in available_solvers()}


PAIRS = [
    (solver, program, model)
    for solver in solver_names()
    for program in ("selection", "joint")
    for model in models_for(solver, program)
]


def require(solver: str) -> None:
    if not installed()[solver].available:
        pytest.skip(installed()[solver].reason)


def hard_block(n: int = 60) -> BlockProblem:
    """Too much for a linearisation within the test's patience."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(n, n)) / np.sqrt(n)
    return BlockProblem(weights=generator.normal(size=n), rows=rows, damping=0.1, n_prune=n // 2)


@pytest.mark.parametrize(("solver", "program", "model"), PAIRS)
def test_agrees_with_brute_force(solver, program, model):
    require(solver)
    for kind, n, n_prune in (("random", 5, 3), ("gradient", 4, 2)):
        problem = block(kind, n, n_prune, seed=3)
        optimum = brute_force(problem, program)
        solution = solve_with(
            solver, problem, program, model=model, limits=Limits(rel_gap=1e-4, time_limit=60)
        )
        # What a solver's tolerances leave of a gap is stated, and not called optimal.
        assert closed(problem, solution, tolerance=1e-3), solution.stats.message
        assert solution.objective <= optimum + 1e-4 * abs(optimum) + slack(problem)
        assert solution.bound <= optimum + slack(problem)
        assert not verify(problem, solution).wrong
        assert solution.program == program
        assert model in solution.method


@pytest.mark.parametrize("kind", ["duplicates", "zeros", "wide", "real", "hessian"])
@pytest.mark.parametrize(
    ("solver", "program"),
    [("highs", "selection"), ("cp_sat", "selection"), ("mathopt", "selection"), ("mathopt", "joint")],
)
def test_base_install_solves_degenerate_blocks(solver, program, kind):
    problem = block(kind, 7, 4, seed=5)
    optimum = brute_force(problem, program)
    solution = solve_with(solver, problem, program, limits=Limits(rel_gap=1e-3, time_limit=60))
    assert solution.bound <= optimum + slack(problem)
    assert solution.objective >= optimum - slack(problem)
    assert not verify(problem, solution).wrong
    if abs(optimum) > 1e-6 * problem.constant_term():
        assert solution.objective <= optimum + 2e-3 * abs(optimum) + slack(problem)


@pytest.mark.parametrize("solver", solver_names())
@pytest.mark.parametrize("n_prune", [0, 6])
def test_a_single_set_is_proved_at_once(solver, n_prune):
    require(solver)
    problem = block("gradient", 6, n_prune, seed=1)
    solution = solve_with(solver, problem, "selection")
    assert solution.proved
    assert solution.bound <= solution.objective
    assert solution.gap < 1e-9
    assert verify(problem, solution).ok
    assert solution.keep.sum() == 6 - n_prune


@pytest.mark.parametrize("solver", solver_names())
def test_zero_time_returns_the_warm_start(solver):
    require(solver)
    problem = hard_block()
    warm = greedy(problem, "selection")
    solution = solve_with(solver, problem, "selection", limits=Limits(time_limit=0.0), incumbent=warm)
    np.testing.assert_array_equal(solution.keep, warm.keep)
    assert solution.termination is Termination.FEASIBLE
    assert solution.limit is Limit.TIME
    cold = solve_with(solver, problem, "selection", limits=Limits(time_limit=0.0))
    assert cold.keep.sum() == problem.n_keep
    assert cold.limit is Limit.TIME


@pytest.mark.parametrize("solver", ["highs", "cp_sat", "scipy_milp", "mathopt", "scip", "pyomo:highs"])
def test_time_limit_is_kept_and_the_warm_start_too(solver):
    require(solver)
    problem = hard_block(48)
    warm = greedy(problem, "selection")
    began = time.perf_counter()
    solution = solve_with(
        solver,
        problem,
        "selection",
        model="selection_mccormick",
        limits=Limits(time_limit=0.6),
        incumbent=warm,
    )
    assert time.perf_counter() - began < 8.0
    assert solution.termination is Termination.FEASIBLE
    assert solution.limit is Limit.TIME
    assert solution.objective <= warm.objective
    assert solution.bound <= solution.objective


def test_bridges_work_side_by_side_in_threads():
    problem = block("real", 8, 4, seed=2)
    names = [
        name for name in solver_names() if installed()[name].available and not name.startswith("pyomo")
    ] * 2
    limits = Limits(rel_gap=1e-3, time_limit=60)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(solve_with, name, problem, "selection", limits=limits) for name in names]
        answers = [future.result() for future in running]
        refused = pool.submit(solve_with, "pyomo:highs", problem, "selection", limits=limits).result()
    assert all(answer.proved for answer in answers)
    assert np.ptp([answer.objective for answer in answers]) < 1e-3 * abs(answers[0].objective)
    assert refused.termination is Termination.ERROR
    assert "main thread" in refused.stats.message


def test_node_limit_is_reported():
    solution = highs.SOLVER.solve(
        hard_block(30), model="selection_glover", limits=Limits(node_limit=1, time_limit=30)
    )
    assert solution.termination is Termination.FEASIBLE
    assert solution.limit is Limit.NODE


def test_limits_without_a_switch_are_named():
    solution = solve_with(
        "scipy_milp", block("random", 5, 2, 1), "selection", limits=Limits(seed=3, threads=2)
    )
    assert solution.stats.extra["ignored_limits"] == {"threads": 2, "seed": 3}


@pytest.mark.parametrize("solver", [name for name in BRIDGES if REPEATABLE in bridge(name).capabilities])
def test_a_seed_repeats_the_run(solver):
    if not bridge(solver).info().available:
        pytest.skip(f"{solver} is not installed")
    problem = hard_block(16)
    runs = [solve_with(solver, problem, "selection", limits=Limits(seed=4, rel_gap=1e-3)) for _ in range(2)]
    assert runs[0].stats.nodes == runs[1].stats.nodes
    assert runs[0].bound == runs[1].bound
    np.testing.assert_array_equal(runs[0].keep, runs[1].keep)


def test_highs_takes_other_thread_counts_in_one_process():
    problem = block("random", 8, 4, seed=2)
    for threads in (1, 2, 1):
        assert highs.SOLVER.solve(problem, limits=Limits(threads=threads, rel_gap=1e-3)).proved


@pytest.mark.parametrize("solver", [name for name in solver_names() if name != "mathopt"])
def test_unknown_and_reserved_options_are_refused(solver):
    require(solver)
    problem = block("random", 5, 2, seed=1)
    with pytest.raises(UnknownOptionError, match=r"'no_such_option' is unknown to .*known: \w"):
        solve_with(solver, problem, "selection", no_such_option=1)
    reserved = next(iter(bridge(solver).reserved), None)
    if reserved is not None:
        with pytest.raises(UnknownOptionError, match="is not free"):
            solve_with(solver, problem, "selection", **{reserved: 1})


@pytest.mark.parametrize(
    ("solver", "option"),
    [
        ("highs", {"presolve": "off"}),
        ("scipy_milp", {"presolve": False}),
        ("cp_sat", {"cp_model_presolve": False}),
        ("mathopt", {"cuts": "off"}),
        ("scip", {"presolving/maxrounds": 0}),
        ("gurobi", {"Presolve": 0}),
        ("pyomo:highs", {"presolve": "off"}),
    ],
)
def test_native_options_pass_through(solver, option):
    require(solver)
    problem = block("random", 6, 3, seed=1)
    solution = solve_with(solver, problem, "selection", limits=Limits(rel_gap=1e-3), **option)
    assert solution.proved, solution.stats.message


def test_bad_option_value_is_an_honest_error():
    warm = greedy(block("random", 6, 3, seed=1), "selection")
    for solver, option in (("mathopt", {"cuts": "sideways"}), ("cp_sat", {"cp_model_presolve": "maybe"})):
        solution = solve_with(solver, block("random", 6, 3, seed=1), "selection", incumbent=warm, **option)
        assert solution.termination is Termination.ERROR
        assert solution.stats.message
        assert solution.objective == warm.objective
    for solver, option in (("highs", {"presolve": "sideways"}), ("scip", {"presolving/maxrounds": "many"})):
        require(solver)
        solution = solve_with(solver, block("random", 6, 3, seed=1), "selection", incumbent=warm, **option)
        assert solution.termination is Termination.ERROR


def test_capability_message_names_alternatives():
    problem = block("random", 6, 3, seed=1)
    with pytest.raises(UnsupportedProblemError, match=r"highs can take no model.*outer_approximation"):
        highs.SOLVER.solve(problem, "joint", model="joint_big_m")
    with pytest.raises(UnsupportedProblemError, match=r"lacks quadratic objective.*selection_glover"):
        highs.SOLVER.solve(problem, model="selection_qp")
    with pytest.raises(UnsupportedProblemError, match="selection_mccormick, selection_rlt"):
        cp_sat.SOLVER.solve(problem, model="selection_glover")
    with pytest.raises(UnsupportedProblemError, match="mathopt"):
        solve_with("cplex", problem, "joint")
    with pytest.raises(ArgumentError, match="bits"):
        cp_sat.SOLVER.solve(problem, bits=3)


def test_incumbent_that_does_not_fit_is_refused():
    problem = block("random", 6, 3, seed=1)
    wrong = greedy(dataclasses.replace(problem, n_prune=2), "selection")
    with pytest.raises(ArgumentError, match="incumbent"):
        highs.SOLVER.solve(problem, incumbent=wrong)


@pytest.mark.parametrize("bits", [8, 12, 20])
@pytest.mark.parametrize("seed", range(4))
def test_coarse_scaling_never_lifts_the_bound(bits, seed):
    problem = block("gradient", 8, 4, seed)
    solution = cp_sat.SOLVER.solve(problem, bits=bits, limits=Limits(rel_gap=1e-6))
    optimum = brute_force(problem, "selection")
    assert solution.bound <= optimum + slack(problem)
    assert solution.objective - solution.bound <= 40 * solution.stats.extra["scaling_error"] + 2e-6 * abs(
        solution.objective
    )
    if solution.proved:
        assert solution.gap <= solution.rel_gap


def fake(run: object, **fields: object) -> Solver:
    settings = {
        "name": "fake",
        "capabilities": frozenset({"integer"}),
        "probe": Probe,
        "option_names": tuple,
        "reserved": {},
    }
    return Solver(run=run, **{**settings, **fields})


def solve_fake(run: object, problem: BlockProblem, **fields: object) -> BlockSolution:
    return fake(run, **fields).solve(
        problem, "selection", model="selection_mccormick", incumbent=greedy(problem, "selection")
    )


def test_failed_backend_keeps_the_warm_start_and_no_bound():
    problem = block("gradient", 6, 3, seed=1)
    solution = solve_fake(lambda task: RawResult(failure="it broke", bound=-1e-9), problem)
    assert solution.termination is Termination.ERROR
    assert solution.bound is None
    assert solution.stats.message == "it broke"
    assert solution.objective == greedy(problem, "selection").objective


def test_bound_above_a_known_set_is_numerical_trouble():
    problem = block("gradient", 6, 3, seed=1)
    solution = solve_fake(lambda task: RawResult(finished=True, bound=1e9), problem)
    assert solution.termination is Termination.ERROR
    assert solution.bound is None
    assert "numerical trouble" in solution.stats.message


def test_claimed_optimality_without_a_matching_bound_is_not_believed():
    problem = block("gradient", 6, 3, seed=1)
    solution = solve_fake(lambda task: RawResult(finished=True, bound=-1e9), problem)
    assert solution.termination is Termination.FEASIBLE
    assert solution.limit is Limit.GAP
    unbounded = solve_fake(lambda task: RawResult(finished=True, bound=float("-inf")), problem)
    assert unbounded.bound is None
    assert unbounded.termination is Termination.FEASIBLE


def test_worse_point_of_a_solver_is_dropped():
    problem = block("random", 6, 3, seed=1)

    def worst(task):
        point = np.zeros(task.form.n_columns)
        point[task.form.decision] = task.form.linear[task.form.decision]
        return RawResult(point=point, limit=Limit.TIME)

    assert solve_fake(worst, problem).objective == greedy(problem, "selection").objective


def test_licence_limit_is_checked_before_building():
    problem = block("random", 30, 15, seed=1)
    limits = ModelSize(variables=100, linear_rows=2000, quadratic_rows=0, quadratic_variables=0)

    def never(task):
        raise AssertionError("must not run")

    with pytest.raises(SolverUnavailableError, match=r"465 variables, the licence allows 100"):
        solve_fake(never, problem, probe=lambda: Probe(limits=limits))


def test_restricted_gurobi_licence_is_reported_as_such():
    require("gurobi")
    info = installed()["gurobi"]
    if info.limits is None:
        pytest.skip("full licence")
    assert "licence" in info.reason
    with pytest.raises(SolverUnavailableError, match="licence allows 2000"):
        solve_with("gurobi", block("random", 80, 40, seed=1), "selection", model="selection_rlt")
    # The figures in the code are those of the licence: just inside runs, just outside is refused.
    for n, model in ((200, "selection_shifted_qp"), (66, "joint_perspective")):
        program = MODELS[model].program
        inside = solve_with(
            "gurobi", block("random", n, n // 2, 1), program, model=model, limits=Limits(time_limit=1)
        )
        assert inside.termination is not Termination.ERROR, inside.stats.message
        with pytest.raises(SolverUnavailableError, match="licence allows 200"):
            solve_with("gurobi", block("random", n + 1, n // 2, seed=1), program, model=model)


def test_absent_package_is_a_reason_not_a_crash(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    infos = {info.name: info for info in available_solvers()}
    assert not any(info.available for info in infos.values())
    assert "cbs-opt[scip]" in infos["scip"].reason
    with pytest.raises(SolverUnavailableError, match="PySCIPOpt is not installed"):
        scip.SOLVER.solve(block("random", 6, 3, seed=1), "joint")


def milp(**changes: object) -> Milp:
    data = {
        "cost": np.array([1.0, 1.0]),
        "lower": np.zeros(2),
        "upper": np.ones(2),
        "integer": np.array([True, True]),
        "matrix": csr_matrix(np.ones((1, 2))),
        "row_lower": np.array([1.0]),
        "row_upper": np.array([1.0]),
    }
    return Milp(**{**data, **changes})


def test_highs_reads_nothing_from_a_failed_solve():
    infeasible = run_milp(milp(row_lower=np.array([3.0]), row_upper=np.array([3.0])), MilpControls())
    assert infeasible.status == "Infeasible"
    assert infeasible.point is None
    assert infeasible.bound is None
    # HiGHS calls a cost that is not a number optimal; its bound is not one.
    assert run_milp(milp(cost=np.array([np.nan, 1.0])), MilpControls()).bound is None
    refused = run_milp(milp(), MilpControls(options={"presolve": "sideways"}))
    assert "refused" in refused.status
    assert refused.bound is None


def test_highs_solves_the_relaxation_when_nothing_is_integer():
    result = run_milp(milp(integer=np.zeros(2, dtype=bool)), MilpControls())
    assert result.status == "Optimal"
    assert result.bound == pytest.approx(1.0)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_returns_incumbent_and_bound():
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        solution = highs.SOLVER.solve(hard_block(), limits=Limits(time_limit=60.0))
    finally:
        timer.cancel()
    assert solution.limit is Limit.INTERRUPTED
    assert solution.stats.seconds < 30.0
    assert solution.bound <= solution.objective


@pytest.mark.parametrize(
    "first",
    [
        "ortools.math_opt.python.mathopt",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("highspy", "scipy.optimize")),
    ],
)
def test_import_orders_live_together(first):
    code = f"""
import {first}
from formulations import Limits
from formulations.solvers import solve_with
from tests.formulations.blocks import block
problem = block("random", 6, 3, 1)
values = [solve_with(name, problem, "selection", limits=Limits(rel_gap=1e-3)).objective
          for name in ("highs", "mathopt", "cp_sat", "scipy_milp", "pyomo:highs")]
assert max(values) - min(values) < 1e-9, values
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_solver_is_imported_before_it_is_used():
    code = """
import sys
import formulations, formulations.solvers
heavy = {"highspy", "ortools", "pyscipopt", "gurobipy", "pyomo"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_program_has_independent_routes_in_the_base_install():
    base = ("highs", "mathopt", "cp_sat", "scipy_milp", "pyomo:highs")
    assert sum(bool(models_for(name, "selection")) for name in base) >= 3
    assert models_for("mathopt", "joint")
    assert {spec.program for spec in MODELS.values()} == {"selection", "joint"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_base_routes_agree_with_enumeration_on_many_blocks(kind):
    routes = {
        "selection": (
            ("highs", "selection_rlt"),
            ("cp_sat", None),
            ("mathopt", None),
            ("highs", "selection_glover"),
        ),
        "joint": (("mathopt", None),),
    }
    limits = Limits(rel_gap=1e-3, time_limit=60)
    for seed in range(30):
        n = 4 + seed % 7
        problem = block(kind, n, seed % (n + 1), seed)
        for program, bridges in routes.items():
            oracle = enumerate_optimum(problem, program)
            answers = [solve_with(name, problem, program, model=m, limits=limits) for name, m in bridges]
            answers.append(outer_approximation(problem, program, limits=limits))
            for answer in answers:
                room = slack(problem)
                assert answer.termination is not Termination.ERROR, (
                    seed,
                    answer.method,
                    answer.stats.message,
                )
                assert answer.bound <= oracle.objective + room, (seed, answer.method)
                assert answer.objective >= oracle.objective - room
                if answer.proved:
                    allowed = answer.rel_gap * abs(answer.objective) + room
                    assert answer.objective <= oracle.objective + allowed, (seed, answer.method)
