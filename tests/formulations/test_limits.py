"""A limit may come at any moment: what is returned then is honest, and the clock is looked at often."""

import dataclasses
import importlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from formulations import BlockProblem, Limit, Limits, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.dense_forms import EIGENVALUES_LARGEST, dense_form, joint_form
from formulations.enumeration import enumerate_optimum
from formulations.errors import UnsupportedProblemError
from formulations.factorisation import BLOCKED_FROM, cholesky_factor
from formulations.incumbents import greedy, greedy_keep, swap_search
from formulations.models import MODELS, scaling
from formulations.models.building import BuildingStopped, undivided
from formulations.models.translation import standard_form
from formulations.outer_approximation import outer_approximation
from formulations.problem import PROGRAMS
from formulations.relaxations import ascent, lower_bound
from formulations.relaxations.capped_simplex import relax_selection
from formulations.relaxations.capped_simplex_kernels import METRIC_FLOOR, METRIC_SHARE, solve_capped_simplex
from formulations.relaxations.perspective import relax_joint
from formulations.relaxations.perspective_kernels import solve_perspective
from formulations.relaxations.split_relaxation import joint_split, selection_shift
from formulations.solution import never
from formulations.solvers import available_solvers, solve_with
from formulations.solvers.pyomo_bridge import SOLVERS
from formulations.verification import Verdict
from formulations.watched import run_watched
from tests.formulations.blocks import KINDS, block

LARGE = 620
"""Weights of a block beyond the size up to which dense forms come first."""
METHODS = (branch_and_bound, lower_bound, greedy, swap_search, outer_approximation)


def gaussian(n, rows, seed=0, n_prune=None, damping=0.1):
    generator = np.random.default_rng(seed)
    return BlockProblem(
        weights=generator.normal(size=n),
        n_prune=n // 2 if n_prune is None else n_prune,
        rows=generator.normal(size=(rows, n)) / np.sqrt(rows),
        gradient=0.05 * generator.normal(size=n),
        damping=damping,
    )


def full_rank(n, seed=0):
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(3 * n, n)) @ np.diag(np.linspace(0.3, 2.0, n))
    hessian = rows.T @ rows / len(rows) + 0.3
    return BlockProblem(weights=generator.normal(size=n), n_prune=n // 2, hessian=hessian, damping=0.01)


@pytest.fixture
def looks(monkeypatch):
    """A clock that moves one second at each look, and how often it was looked at."""
    made = []

    def read():
        made.append(None)
        return float(len(made))

    monkeypatch.setattr(time, "perf_counter", read)
    return made


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seconds", [1, 2, 3, 5, 8, 13, 30])
def test_stopped_at_any_look_a_set_comes_back_and_no_bound_is_too_high(method, program, seconds, looks):
    problem = gaussian(14, 8, seed=seconds)
    optimum = enumerate_optimum(problem, program).objective
    del looks[:]
    solution = method(problem, program, limits=Limits(time_limit=float(seconds)))
    assert solution.keep.sum() == problem.n_keep
    assert solution.objective >= optimum * (1.0 - 1e-9)
    assert solution.bound is None or solution.bound <= optimum
    assert verify(problem, solution).verdict is not Verdict.WRONG
    # Some are taken for the time that a solution states.
    assert solution.limit is not Limit.TIME or len(looks) < seconds + 40


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seconds", [2, 6, 12, 20])
def test_large_blocks_have_a_bound_soon_and_keep_it(method, program, seconds, looks):
    problem = gaussian(LARGE, 20, n_prune=LARGE - 8)
    solution = method(problem, program, limits=Limits(time_limit=float(seconds)))
    assert solution.keep.sum() == 8
    if solution.certificate is not None:
        assert solution.bound <= solution.objective
        assert solution.certificate.proves_bound(problem, solution.certificate.lower_bound(problem))
    if method is branch_and_bound and seconds >= 12:
        assert solution.bound > 0.0


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_relaxation_by_rows_leads_the_dense_one_to_the_same_bound(program):
    problem = gaussian(LARGE, 20)
    found = lower_bound(problem, program)
    by_rows = lower_bound(problem, program, limits=Limits(iteration_limit=200))
    rounding = 1e-12 * abs(found.bound)
    assert by_rows.bound - rounding <= found.bound <= by_rows.bound + 1e-3 * abs(found.bound)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", [*KINDS, "full_rank"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_branch_and_bound_is_no_weaker_than_its_relaxation(seed, kind, program):
    problem = full_rank(40, seed) if kind == "full_rank" else block(kind, 40, 20, seed)
    relaxed = lower_bound(problem, program)
    for nodes, incumbent in itertools.product((0, 1, 10), (None, greedy(problem, program), relaxed)):
        limits = Limits(node_limit=nodes)
        solution = branch_and_bound(problem, program, limits=limits, incumbent=incumbent)
        assert solution.proved or solution.bound >= relaxed.bound
        assert solution.certificate.lower_bound(problem) <= solution.bound <= solution.objective


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("n_keep", [8, 310])
@pytest.mark.parametrize("method", [branch_and_bound, outer_approximation])
def test_large_blocks_end_no_lower_than_their_relaxation(method, n_keep, program):
    # A known set ends the steps on rows sooner: 795 instead of 815 on 3 000 weights of which 10 stay.
    problem = gaussian(LARGE, 200, n_prune=LARGE - n_keep)
    relaxed = lower_bound(problem, program)
    known = swap_search(problem, program, limits=Limits(iteration_limit=3))
    for incumbent in (None, known):
        limits = Limits(node_limit=0, iteration_limit=0)
        solution = method(problem, program, limits=limits, incumbent=incumbent)
        assert solution.proved or solution.bound >= relaxed.bound


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_bound_of_a_warm_start_is_not_lost(program):
    problem = block("hessian", 30, 15, 1)
    start = lower_bound(problem, program, incumbent=swap_search(problem, program), fix=True)
    solution = branch_and_bound(problem, program, limits=Limits(node_limit=0), incumbent=start)
    assert start.bound <= solution.bound <= solution.objective


@pytest.mark.parametrize("nodes", [0, 5])
def test_a_certificate_of_the_other_program_is_no_bound(nodes):
    problem = block("hessian", 30, 15, 1)
    start = lower_bound(problem, "selection")
    start = dataclasses.replace(start, program="joint")
    limits = Limits(node_limit=nodes)
    solution = branch_and_bound(problem, "joint", limits=limits, incumbent=start)
    assert solution.certificate.program == "joint"
    assert solution.bound <= branch_and_bound(problem, "joint").objective < start.bound


def relaxed(problem, program, stopped=never):
    form = dense_form(problem, program)
    if program == "joint":
        return relax_joint(form, problem.n_keep, joint_split(problem, form), stopped=stopped)
    return relax_selection(form, problem.n_prune, selection_shift(problem, form), stopped=stopped)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_relaxation_cut_into_calls_ends_in_the_same_bits(program, monkeypatch):
    steps = 0
    for seed in range(6):
        problem = gaussian(24, 10, seed, damping=0.01)
        whole = relaxed(problem, program)
        monkeypatch.setattr(ascent, "WORK_A_LOOK", 1.0)
        cut = relaxed(problem, program)
        monkeypatch.undo()
        for one, other in zip(whole, cut, strict=True):
            np.testing.assert_array_equal(one, other)
        kernel = solve_perspective if program == "joint" else solve_capped_simplex
        steps += cut_steps(problem, program, kernel)
    # Some go beyond the first climb, into ADMM.
    assert steps > 0


def cut_steps(problem, program, kernel):
    """Steps of ADMM that the kernel which is not cut takes on the same relaxation."""
    form = dense_form(problem, program)
    if program == "joint":
        root = np.sqrt(joint_split(problem, form))
        smooth = form.matrix / root[:, None] / root
        smooth[np.diag_indices(problem.n)] -= 1.0
        return kernel(smooth, form.linear / root, problem.n_keep, np.zeros(problem.n), np.inf, 300, 1e-5)[3]
    shift = selection_shift(problem, form)
    smooth = form.matrix - np.diag(shift)
    metric = METRIC_SHARE * (np.diagonal(form.matrix) + METRIC_FLOOR)
    start = np.full(problem.n, problem.n_prune / problem.n)
    return kernel(smooth, form.linear + 0.5 * shift, problem.n_prune, metric, start, np.inf, 300, 1e-5)[3]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_relaxation_is_stopped_between_its_steps_and_rises_with_them(program, monkeypatch):
    monkeypatch.setattr(ascent, "WORK_A_LOOK", 1.0)
    problem = gaussian(24, 10, damping=0.01)
    optimum = branch_and_bound(problem, program).objective / dense_form(problem, program).scale
    bounds = []
    for looks_left in (0, 1, 2, 4, 8, 1_000):
        answers = itertools.chain([False] * looks_left, itertools.repeat(True))
        bounds.append(relaxed(problem, program, lambda ahead=0.0, answers=answers: next(answers))[0])
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1] <= optimum


@pytest.mark.parametrize(("seconds", "steps"), [(10.0, 2), (10.5, 3), (0.0, 0)])
def test_no_step_is_begun_of_which_less_than_half_fits(seconds, steps, monkeypatch):
    now, taken = [0.0], []

    def advance(state, inverse, work):
        taken.append(work)
        now[0] += 4.0

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    state = SimpleNamespace(linear=np.zeros(2_000), counts=np.full(4, ascent.CLIMBING))
    stopped = partial(Limits(time_limit=seconds).out_of_time, 0.0)
    ascent.ascend(state, advance, lambda _: pytest.fail("no inverse is needed while it climbs"), stopped)
    # Of a state as large as this one step is taken between two looks at the clock.
    assert taken == [1] * steps


@pytest.mark.parametrize("rows", [20, 700])
def test_rounding_of_a_large_form_rests_on_a_proved_eigenvalue(rows):
    form = joint_form(gaussian(EIGENVALUES_LARGEST + 20, rows, damping=0.01))
    n, rounding = form.linear.size, form.rounding
    lowest = n / rounding.growth**2
    eigenvalues = np.linalg.eigvalsh(form.matrix)
    assert 0.002 * eigenvalues[0] <= lowest <= eigenvalues[0]
    assert rounding.minimum <= form.constant


def test_a_large_form_that_is_singular_to_rounding_has_no_allowance():
    problem = gaussian(EIGENVALUES_LARGEST + 20, 700, damping=0.0)
    hessian = problem.dense_hessian()
    hessian[:, -1] = hessian[:, 0]
    hessian[-1] = hessian[0]
    hessian[-1, -1] = hessian[0, 0]
    # Selection takes singular blocks; the joint form of one is built by hand here.
    singular = BlockProblem(weights=problem.weights, n_prune=310, hessian=hessian, damping=1e-15)
    from formulations.dense_forms import _lowest_and_minimiser

    root = np.sqrt(np.diagonal(hessian))
    matrix = singular.dense_hessian() / root[:, None] / root
    lowest, _ = _lowest_and_minimiser(matrix, np.ones(singular.n), 0.0)
    assert lowest <= 0.0


@pytest.mark.parametrize("n", [BLOCKED_FROM, BLOCKED_FROM + 1, 777])
def test_factors_by_blocks_are_factors(n):
    rows = np.random.default_rng(n).normal(size=(n // 2, n))
    matrix = rows.T @ rows / n + 0.1 * np.eye(n)
    factor = np.zeros((n, n))
    assert cholesky_factor(matrix, factor)
    np.testing.assert_allclose(np.tril(factor), np.linalg.cholesky(matrix), atol=1e-12)
    for bad in (0, n // 2, n - 1):
        broken = matrix.copy()
        broken[bad, bad] = -1.0
        assert not cholesky_factor(broken, factor)


@pytest.mark.parametrize("looks_left", [0, 1, 2])
def test_greedy_elimination_that_is_stopped_drops_the_rest_at_once(looks_left):
    problem = gaussian(40, 10)
    form = dense_form(problem, "joint")
    answers = itertools.chain([False] * looks_left, itertools.repeat(True))
    keep = greedy_keep(form, problem.n_prune, "joint", lambda: next(answers))
    assert keep.sum() == problem.n_keep


@pytest.mark.parametrize("name", MODELS)
def test_models_are_given_up_while_they_are_built(name, caplog):
    problem = gaussian(6, 4)
    with pytest.raises(BuildingStopped):
        MODELS[name].build(problem, stopped=lambda: True)
    built = MODELS[name].build(problem)
    with pytest.raises(BuildingStopped):
        standard_form(built, lambda: True)
    assert not caplog.records


def test_a_step_of_building_that_ends_too_late_is_named():
    answers = iter([False, True])
    with pytest.raises(BuildingStopped, match=r"^a factor of H took \d+[.]\d\d s, within"):
        undivided("a factor of H", lambda: 3, lambda: next(answers))
    with pytest.raises(BuildingStopped, match=r"^$"):
        undivided("a factor of H", pytest.fail, lambda: True)
    assert undivided("a factor of H", lambda: 3, lambda: False) == 3


@pytest.mark.parametrize("largest", [5, 600])
def test_the_rows_of_a_large_block_are_a_factor_of_what_its_split_leaves(largest, monkeypatch):
    monkeypatch.setattr(scaling, "EIGENVALUES_LARGEST", largest)
    problem = gaussian(12, 7)
    block = scaling.scale_block(problem)
    split = scaling.diagonal_split(block)
    factor = scaling.low_rank_factor(problem, block, split)
    assert factor.shape[0] == 7
    np.testing.assert_allclose(factor.T @ factor, block.hessian - np.diag(split), atol=1e-10)
    # More rows than weights are longer than the eigenvectors.
    tall = gaussian(7, 12)
    block = scaling.scale_block(tall)
    assert scaling.low_rank_factor(tall, block, scaling.diagonal_split(block)).shape[0] <= 7


def test_the_interfaces_of_pyomo_are_found_before_it_is_used(monkeypatch):
    factory = importlib.import_module("pyomo.contrib.solver.common.factory").SolverFactory
    monkeypatch.setattr(factory, "_cls", {})
    assert factory("highs") is None
    assert SOLVERS["highs"].info().available


@pytest.mark.parametrize(("solver", "program"), [("highs", "selection"), ("mathopt", "joint")])
def test_a_solver_whose_model_comes_too_late_is_not_started(solver, program, looks):
    problem = gaussian(10, 8)
    solution = solve_with(solver, problem, program, limits=Limits(time_limit=6.0))
    assert solution.limit is Limit.TIME
    assert "was not started" in solution.stats.message
    assert solution.keep.sum() == problem.n_keep


def test_enumeration_refuses_numbers_of_sets_that_are_no_floats():
    problem = BlockProblem(weights=np.ones(2_000), n_prune=1_000, rows=np.ones((1, 2_000)), damping=1.0)
    with pytest.raises(UnsupportedProblemError, match="about 1e600 sets"):
        enumerate_optimum(problem, "selection")


def test_watched_work_returns_its_value_and_raises_its_error():
    assert run_watched(lambda: 3, lambda: None).value == 3
    with pytest.raises(ZeroDivisionError):
        run_watched(lambda: 1 / 0, lambda: None)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("obeys", [True, False])
def test_watched_work_is_asked_to_stop_and_then_left_to_itself(obeys):
    asked, released = threading.Event(), threading.Event()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        work = (asked if obeys else released).wait
        ended = run_watched(work, asked.set, grace=0.3 if not obeys else 30.0)
    finally:
        released.set()
        timer.cancel()
    assert ended.interrupted
    assert asked.is_set()
    assert ended.value is (True if obeys else None)


CALL = """
import os, signal, sys, threading, time
from formulations import Limits
from formulations.solvers import available_solvers, solve_with
from formulations.solvers.pyomo_bridge import SOLVERS
from tests.formulations.test_limits import gaussian
solver, program = sys.argv[1:]
solve_with(solver, gaussian(6, 4), program, limits=Limits(time_limit=20.0))
threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGINT)).start()
began = time.perf_counter()
solution = solve_with(solver, gaussian(60, 60), program, limits=Limits(time_limit=120.0))
print(solution.limit.value, time.perf_counter() - began)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "solver",
    [
        *("highs", "cp_sat", "scipy_milp", "mathopt", "scip", "gurobi"),
        *("pyomo:highs", "pyomo:scip", "pyomo:gurobi"),
    ],
)
def test_ctrl_c_reaches_every_solver(solver):
    if not next(info.available for info in available_solvers() if info.name == solver):
        pytest.skip(f"{solver} is not installed")
    selection = ("highs", "cp_sat", "scipy_milp", "pyomo:highs")
    program = "selection" if solver in selection else "joint"
    done = subprocess.run(
        [sys.executable, "-c", CALL, solver, program], capture_output=True, text=True, timeout=300, check=True
    )
    limit, seconds = done.stdout.splitlines()[-1].split()
    assert limit == "interrupted"
    assert float(seconds) < 30.0
