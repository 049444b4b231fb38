"""No bound is above the optimum, not by one ulp: against enumeration in exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from formulations import BlockProblem, BlockSolution, Limits, verify
from formulations.enumeration import enumerate_optimum
from formulations.errors import NotPositiveDefiniteError
from formulations.relaxations import LinearCertificate, lower_bound, reduce_block
from formulations.relaxations.certified import value_ceiling
from tests.formulations.exact_oracle import any_block, exact_model, exact_optimum

PROGRAMS = ("selection", "joint")
FAST = 80
MANY = 5000


def check(problem: BlockProblem, program: str, **options: object) -> None:
    """Compare a bound with the exact optimum, and every fixed weight with the best set."""
    try:
        solution = lower_bound(problem, program, **options)
    except NotPositiveDefiniteError:
        return
    if solution.bound is None:
        return
    optimum = exact_optimum(problem, program)
    certified = solution.certificate.lower_bound(problem)
    assert Fraction(certified) <= optimum
    assert solution.bound <= certified
    assert verify(problem, solution).ok
    if solution.certificate.fixing is not None:
        check_fixing(problem, program, solution.certificate.fixing, optimum)
        check_reduced(problem, solution, optimum)


def check_fixing(problem: BlockProblem, program: str, fixing, optimum: Fraction) -> None:
    """The best set has every fixed weight as it is fixed, whenever its value is within the cutoff."""
    best = enumerate_optimum(problem, program)
    if exact_model(problem).value(tuple(best.pruned.tolist()), program) <= Fraction(fixing.cutoff):
        assert best.keep[fixing.keep].all()
        assert not best.keep[fixing.prune].any()
    assert optimum <= Fraction(fixing.cutoff)


def check_reduced(problem: BlockProblem, solution: BlockSolution, optimum: Fraction) -> None:
    """The bound of the reduced block's own optimum, brought back, is no higher than the optimum."""
    try:
        reduced = reduce_block(problem, solution)
        best = enumerate_optimum(reduced.problem, solution.program)
    except NotPositiveDefiniteError:
        return
    back = reduced.lift(best)
    assert Fraction(back.bound) <= optimum
    assert not verify(problem, back).wrong


def check_seed(seed: int, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to a bound on one random block."""
    problem = any_block(seed)
    check(problem, program)
    check(problem, program, diagonal_split=False)
    try:
        best = enumerate_optimum(problem, program)
    except NotPositiveDefiniteError:
        return
    assert Fraction(value_ceiling(problem, best.weights)) >= exact_model(problem).value(
        tuple(best.pruned.tolist()), program
    )
    check(problem, program, incumbent=best, fix=True)
    check(problem, program, fix=True)
    if program == "selection" and seed % 4 == 0:
        for relaxation in ("mccormick", "rlt"):
            check(problem, program, relaxation=relaxation)
    damped = any_block(seed, damped=True)
    with monkeypatch.context() as patch:
        patch.setattr("formulations.relaxations.bounds.DENSE_LARGEST", 0)
        patch.setattr("formulations.relaxations.matrix_free.GRAM_LARGEST", 8192 if seed % 2 else 0)
        limits = Limits(iteration_limit=int(seed % 5) * 10)
        for fix in (False, True):
            check(damped, program, diagonal_split=False, limits=limits, fix=fix)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("start", range(0, FAST, 20))
def test_no_bound_exceeds_the_optimum(program, start, monkeypatch):
    for seed in range(start, start + 20):
        check_seed(seed, program, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("start", range(FAST, MANY, 61))
def test_no_bound_exceeds_the_optimum_on_thousands_of_blocks(program, start, monkeypatch):
    for seed in range(start, start + 61):
        check_seed(seed, program, monkeypatch)


def test_the_exact_oracle_agrees_with_the_enumeration():
    for seed in range(30):
        problem = any_block(seed, damped=True)
        for program in PROGRAMS:
            exact = float(exact_optimum(problem, program))
            best = enumerate_optimum(problem, program)
            scale = abs(problem.constant_term()) + float(
                np.abs(problem.gradient_or_zero) @ np.abs(problem.weights)
            )
            assert exact == pytest.approx(best.objective, rel=1e-6, abs=1e-8 * scale)


def test_a_bound_that_is_wrong_would_be_noticed(monkeypatch):
    problem = any_block(7, damped=True)
    monkeypatch.setattr(
        LinearCertificate, "lower_bound", lambda self, _: float(exact_optimum(problem, "selection")) + 1.0
    )
    with pytest.raises(AssertionError):
        check(problem, "selection", relaxation="rlt")
