"""What certificates say beside the bound: shape of the block, fixed weights, and how they travel."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from formulations import BlockProblem, Limits, Termination, objective, verify
from formulations import instances as inst
from formulations.branch_and_bound import branch_and_bound
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.incumbents import swap_search
from formulations.relaxations import Fixing, fisher_shape, lower_bound, reduce_block
from formulations.relaxations.reduced_block import reduced_block
from tests.formulations.blocks import KINDS, block, slack

PROGRAMS = ("selection", "joint")


@pytest.mark.parametrize("kind", KINDS)
def test_shape_of_the_fisher_matrix(kind):
    problem = block(kind, 8, 4, seed=3)
    fisher = problem.dense_hessian() - problem.damping * np.eye(8)
    shape = fisher_shape(problem)
    assert shape.rho == pytest.approx(problem.damping / np.diagonal(fisher).mean())
    assert shape.effective_rank == pytest.approx(np.trace(fisher) ** 2 / (fisher**2).sum())
    rank = np.linalg.matrix_rank(fisher)
    assert 1.0 - 1e-9 <= shape.effective_rank <= rank + 1e-9
    for program in PROGRAMS:
        certificate = lower_bound(problem, program).certificate
        assert certificate.rho == pytest.approx(shape.rho)
        assert certificate.effective_rank == pytest.approx(shape.effective_rank)
        assert certificate.n_fixed == 0


def test_shape_of_a_block_without_curvature():
    flat = BlockProblem(weights=np.ones(4), rows=np.zeros((2, 4)), damping=0.1, n_prune=2)
    certificate = lower_bound(flat, "joint").certificate
    assert certificate.rho is None
    assert certificate.effective_rank is None
    identity = BlockProblem(weights=np.ones(4), rows=np.eye(4), damping=0.5, n_prune=2)
    assert fisher_shape(identity).effective_rank == pytest.approx(4.0)
    assert fisher_shape(identity).rho == pytest.approx(0.5)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_fixing_never_weakens_the_bound_and_holds_for_the_optimum(program, kind):
    problem = block(kind, 12, 7, seed=2)
    best = enumerate_optimum(problem, program)
    plain = lower_bound(problem, program, incumbent=best)
    fixed = lower_bound(problem, program, incumbent=best, fix=True)
    assert fixed.bound >= plain.bound - slack(problem)
    fixing = fixed.certificate.fixing
    assert fixed.certificate.n_fixed == fixing.count == 12 - fixing.free.sum()
    assert best.keep[fixing.keep].all()
    assert not best.keep[fixing.prune].any()
    assert verify(problem, fixed).ok
    assert verify(problem, fixed).bound_checked


def test_fixing_closes_blocks_that_the_plain_bound_leaves_open():
    closed = 0
    for seed in range(6):
        problem = dataclasses.replace(block("random", 40, 20, seed=seed), damping=10.0)
        start = swap_search(problem, "joint")
        plain = lower_bound(problem, "joint", incumbent=start)
        fixed = lower_bound(problem, "joint", incumbent=start, fix=True)
        assert fixed.gap <= plain.gap + 1e-12
        if fixed.termination is Termination.OPTIMAL:
            exact = branch_and_bound(problem, "joint", limits=Limits(time_limit=20.0))
            assert fixed.objective == pytest.approx(exact.objective, rel=1e-6)
        closed += plain.termination is Termination.FEASIBLE and fixed.termination is Termination.OPTIMAL
    assert closed >= 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_fixings_that_are_not_proved_are_found_out(program):
    problem = block("random", 14, 7, seed=5)
    solution = lower_bound(problem, program, incumbent=enumerate_optimum(problem, program), fix=True)
    fixing = solution.certificate.fixing
    nothing = Fixing(keep=np.zeros(14, bool), prune=np.zeros(14, bool), cutoff=math.inf)
    swapped = dataclasses.replace(fixing, keep=~solution.keep, prune=solution.keep)
    for wrong in (swapped, dataclasses.replace(nothing, keep=np.ones(14, bool), cutoff=1e300)):
        forged = dataclasses.replace(solution.certificate, fixing=wrong)
        assert not forged.proves_fixing(problem)
        assert not verify(problem, dataclasses.replace(solution, certificate=forged)).ok
        resting = dataclasses.replace(solution.certificate, basis=forged)
        assert resting.lower_bound(problem) == -math.inf


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_certificate_with_its_basis_survives_the_file(program, tmp_path):
    for seed in range(20):
        problem = dataclasses.replace(block("random", 16, 8, seed=seed), damping=0.1)
        start = swap_search(problem, program)
        solution = lower_bound(problem, program, incumbent=start, fix=True, diagonal_split=False)
        if solution.certificate.basis is not None:
            break
    assert solution.certificate.basis is not None
    inst.write_solution(tmp_path / "s.npz", problem, solution)
    again = inst.read_solution(tmp_path / "s.npz", problem).certificate
    assert (again.kind, again.rho, again.effective_rank, again.n_fixed) == (
        solution.certificate.kind,
        solution.certificate.rho,
        solution.certificate.effective_rank,
        solution.certificate.n_fixed,
    )
    assert again.lower_bound(problem) == solution.certificate.lower_bound(problem)
    assert again.proves_fixing(problem)
    np.testing.assert_array_equal(again.fixing.keep, solution.certificate.fixing.keep)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_in_the_reduced_block_are_values_in_the_block(program, kind):
    problem = block(kind, 9, 5, seed=4)
    keep, prune = np.zeros(9, bool), np.zeros(9, bool)
    keep[[0, 3]], prune[[1, 8]] = True, True
    reduced = reduced_block(problem, program, Fixing(keep=keep, prune=prune, cutoff=1.0))
    assert (reduced.problem.n, reduced.problem.n_prune) == (5, 3)
    for chosen in itertools.combinations(range(5), 3):
        inside = np.ones(5, bool)
        inside[list(chosen)] = False
        value = objective(reduced.problem, inside, program) + reduced.offset
        whole = objective(problem, reduced.lifted(inside), program)
        assert value == pytest.approx(whole, rel=1e-7, abs=slack(problem))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", ["random", "wide", "hessian"])
def test_the_reduced_block_goes_to_another_method_and_back(program, kind):
    problem = dataclasses.replace(block(kind, 30, 15, seed=1), damping=0.5)
    start = swap_search(problem, program)
    solution = lower_bound(problem, program, incumbent=start, fix=True)
    reduced = reduce_block(problem, solution)
    assert reduced.problem.n == 30 - solution.certificate.n_fixed
    back = reduced.lift(branch_and_bound(reduced.problem, program))
    exact = branch_and_bound(problem, program)
    assert back.objective == pytest.approx(exact.objective, rel=1e-6)
    assert not verify(problem, back).wrong
    assert reduced.allowance >= 0.0
    if math.isfinite(reduced.allowance):
        assert reduced.allowance < 1e-6 * back.objective
        assert solution.bound - slack(problem) <= back.bound <= exact.objective
        assert back.termination is Termination.OPTIMAL


def test_reducing_needs_fixings_of_this_block():
    problem = block("random", 10, 5, seed=1)
    with pytest.raises(ArgumentError, match="fixes no weights"):
        reduce_block(problem, lower_bound(problem, "joint"))
    solution = lower_bound(problem, "joint", incumbent=enumerate_optimum(problem, "joint"), fix=True)
    reduced = reduce_block(problem, solution)
    assert reduced.certificate is solution.certificate
    assert solution.certificate.n_fixed > 0
    assert reduced.free.tolist() == np.flatnonzero(solution.certificate.fixing.free).tolist()
    with pytest.raises(ArgumentError, match="not proved"):
        reduce_block(block("random", 10, 5, seed=2), solution)


def test_linear_relaxations_are_ordered_and_travel(tmp_path):
    for seed in range(4):
        problem = block("random", 10, 6, seed=seed)
        best = enumerate_optimum(problem, "selection")
        loose = lower_bound(problem, "selection", relaxation="mccormick", incumbent=best)
        tight = lower_bound(problem, "selection", relaxation="rlt", incumbent=best)
        assert loose.bound <= tight.bound + slack(problem)
        assert tight.bound <= best.objective
        assert (loose.certificate.kind, tight.certificate.kind) == ("mccormick", "rlt")
        inst.write_solution(tmp_path / "s.npz", problem, tight)
        again = inst.read_solution(tmp_path / "s.npz", problem)
        assert verify(problem, again).bound_checked
        assert again.certificate.rho == tight.certificate.rho


def test_linear_relaxations_reach_the_solvers_own_value():
    from formulations.milp import MilpControls, run_milp
    from formulations.relaxations.linear import _LinearProgram

    problem = block("gradient", 12, 7, seed=1)
    for relaxation in ("mccormick", "rlt"):
        program = _LinearProgram.of(problem, relaxation)
        value = run_milp(program.model(), MilpControls()).bound * program.unit
        bound = lower_bound(problem, "selection", relaxation=relaxation).bound
        assert bound == pytest.approx(value, rel=1e-6, abs=slack(problem))


def test_relaxations_are_checked_before_anything_is_built():
    problem = block("random", 6, 3, seed=1)
    for program, relaxation, fix in (
        ("joint", "rlt", False),
        ("joint", "capped_simplex", False),
        ("selection", "perspective", False),
        ("selection", "mccormick", True),
    ):
        with pytest.raises(UnsupportedProblemError):
            lower_bound(problem, program, relaxation=relaxation, fix=fix)
    large = BlockProblem(weights=np.ones(200), rows=np.ones((2, 200)), damping=1.0, n_prune=100)
    with pytest.raises(UnsupportedProblemError, match="200 weights"):
        lower_bound(large, "selection", relaxation="rlt")


@pytest.mark.parametrize("program", ["joint", "selection"])
@pytest.mark.parametrize("n", [4, 120])
def test_a_hessian_that_is_definite_by_its_damping_alone_has_a_bound(program, n):
    generator = np.random.default_rng(n)
    rows = generator.normal(size=(max(1, n // 6), n))
    weights = generator.normal(size=n)
    common = {"weights": weights, "damping": 1e-4, "n_prune": n // 2}
    by_rows = BlockProblem(rows=rows, **common)
    by_hessian = BlockProblem(hessian=rows.T @ rows, **common)
    for split in (False, True):
        known, found = (lower_bound(p, program, diagonal_split=split) for p in (by_rows, by_hessian))
        assert known.bound is not None
        assert found.bound is not None
        assert found.bound <= found.objective + slack(by_hessian)
        assert found.bound == pytest.approx(known.bound, rel=1e-2, abs=1e-9)
