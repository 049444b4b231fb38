"""A solver in its own process may die, hang or raise; the parent says so and keeps the warm start."""

from __future__ import annotations

import multiprocessing
import threading
import time

import numpy as np
import pytest

from formulations import Limit, Limits, Termination
from formulations.errors import UnknownOptionError
from formulations.incumbents import greedy
from formulations.solvers import isolation
from formulations.solvers.isolation import solve_isolated
from tests.formulations.blocks import block, brute_force, slack
from tests.formulations.test_solvers import hard_block


def own_children() -> list[multiprocessing.Process]:
    """Return the processes started here, but for a pool of workers that other tests keep."""
    return [child for child in multiprocessing.active_children() if "Loky" not in child.name]


def test_answer_comes_back_whole():
    problem = block("gradient", 7, 3, seed=1)
    solution = solve_isolated("highs", problem, "selection", limits=Limits(rel_gap=1e-4))
    assert solution.proved
    assert solution.objective <= brute_force(problem, "selection") + slack(problem) + 1e-4 * abs(
        solution.objective
    )


def test_exceptions_cross_the_border():
    with pytest.raises(UnknownOptionError, match="no_such_option"):
        solve_isolated("highs", block("random", 6, 3, seed=1), "selection", no_such_option=1)


def test_killed_half_way_is_an_honest_error():
    problem = hard_block()
    warm = greedy(problem, "selection")

    def kill_when_started():
        while not (children := own_children()):
            time.sleep(0.02)
        time.sleep(0.5)
        children[0].kill()

    killer = threading.Thread(target=kill_when_started)
    killer.start()
    solution = solve_isolated("highs", problem, "selection", limits=Limits(time_limit=120.0), incumbent=warm)
    killer.join()
    assert solution.termination is Termination.ERROR
    assert "exit code -9" in solution.stats.message
    np.testing.assert_array_equal(solution.keep, warm.keep)


def test_a_solver_that_ignores_its_limit_is_stopped(monkeypatch):
    monkeypatch.setattr(isolation, "GRACE", -0.9)
    problem = hard_block()
    solution = solve_isolated("highs", problem, "selection", limits=Limits(time_limit=1.0))
    assert solution.termination is Termination.FEASIBLE
    assert solution.limit is Limit.TIME
    assert not own_children()
