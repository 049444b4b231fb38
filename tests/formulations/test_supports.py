"""Supports: counts, n of every m, groups. Every claim of theirs against all subsets of a small block."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from formulations import BlockProblem, objective, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, ShapeError, UnsupportedProblemError
from formulations.incumbents import greedy, kicked, magnitude_keep, swap_search
from formulations.instances import export_model, read_instance, read_solution, write_instance, write_solution
from formulations.models import MODELS
from formulations.models.translation import standard_form
from formulations.outer_approximation import outer_approximation
from formulations.problem import PROGRAMS
from formulations.relaxations import lower_bound
from formulations.relaxations.block_split import relax_in_blocks
from formulations.solution import Limits, never
from formulations.solvers import available_solvers, models_for, solve_with
from formulations.support import KINDS, TAKEN, Count, Groups, NofM, require_support, support_from_json

N = 8
SUPPORTS = (
    Count(3),
    NofM(1, 4),
    NofM(2, 4),
    NofM(1, 2),
    NofM(3, 8),
    NofM(0, 4),
    NofM(4, 4),
    Groups([0, 0, 1, 2, 2, 2, 3, 3], 2),
    Groups([7, 3, 7, 3, 2, 2, 2, 9], 3),
    Groups([0, 1] * 4, 0),
    Groups([0, 1] * 4, 2),
)
SUBSETS = [np.array(bits) for bits in itertools.product([False, True], repeat=N)]


def supported(support, seed=0, *, damping=0.1, hessian=False, gradient=True) -> BlockProblem:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2 * N if hessian else 5, N))
    data = {"hessian": rows.T @ rows / N} if hessian else {"rows": rows}
    slope = 0.1 * rng.normal(size=N) if gradient else None
    return BlockProblem(weights=rng.normal(size=N), support=support, damping=damping, gradient=slope, **data)


def inside(problem) -> list[np.ndarray]:
    return [keep for keep in SUBSETS if problem.sets.contains(keep)]


def optimum(problem, program) -> float:
    return min(objective(problem, keep, program) for keep in inside(problem))


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_membership_number_rounding_and_bound_agree_with_all_subsets(support):
    sets = [keep for keep in SUBSETS if support.contains(keep)]
    assert len(sets) == support.n_sets(N) >= 1
    assert max(int(keep.sum()) for keep in sets) == support.n_keep_of(N)
    rng = np.random.default_rng(1)
    for scores in (rng.normal(size=N), rng.integers(0, 3, N).astype(float), -np.ones(N)):
        most = max(scores[keep].sum() for keep in sets)
        best = support.best(scores)
        assert support.contains(best)
        assert scores[best].sum() == pytest.approx(most, abs=1e-12)
        assert support.largest_sum(scores) == pytest.approx(most, abs=1e-12)


def test_membership_by_definition():
    for keep in SUBSETS:
        assert Count(3).contains(keep) == (keep.sum() == 3)
        assert NofM(2, 4).contains(keep) == (keep[:4].sum() == keep[4:].sum() == 2)
        whole = all(len(set(keep[i : i + 2])) == 1 for i in range(0, N, 2))
        assert Groups(np.arange(N) // 2, 3).contains(keep) == (whole and keep.sum() == 6)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_swaps_lead_to_every_set_that_differs_by_one_exchange(support):
    units = support.unit if support.unit is not None else np.arange(N)

    def distance(a, b):
        return len(set(units[a & ~b])) + len(set(units[b & ~a]))

    sets = [keep for keep in SUBSETS if support.contains(keep)]
    for keep in sets[:20]:
        reached = set()
        for out, into in support.swaps(keep):
            moved = keep.copy()
            moved[out], moved[into] = False, True
            assert support.contains(moved)
            reached.add(moved.tobytes())
        assert reached == {other.tobytes() for other in sets if distance(keep, other) == 2}


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_json_and_files_give_the_support_back(support, tmp_path):
    again = support_from_json(json.loads(json.dumps(support.as_json())))
    assert again == support
    assert hash(again) == hash(support)
    problem = supported(support)
    write_instance(tmp_path / "block.npz", problem)
    read, _ = read_instance(tmp_path / "block.npz")
    assert read.sets == support
    assert read.fingerprint() == problem.fingerprint()
    solution = greedy(problem, "joint")
    write_solution(tmp_path / "solution.npz", problem, solution)
    back = read_solution(tmp_path / "solution.npz", read)
    assert back.support == solution.support
    np.testing.assert_array_equal(back.keep, solution.keep)
    assert not verify(read, back).wrong


def test_a_count_is_n_prune_and_another_support_another_fingerprint():
    by_count, plain = supported(Count(4)), dataclasses.replace(supported(Count(4)), n_prune=4)
    assert by_count.support is None
    assert by_count.n_prune == 4
    assert by_count.sets == Count(4)
    assert by_count.fingerprint() == plain.fingerprint()
    posed = (Count(4), NofM(2, 4), NofM(1, 2), Groups(np.arange(N) // 2, 2), Groups(np.arange(N) % 4, 2))
    assert len({supported(support).fingerprint() for support in posed}) == len(posed)
    assert {supported(support).n_prune for support in posed} == {4}


def test_groups_are_equal_whatever_their_names():
    assert Groups([5, 5, -1, 9], 2) == Groups([1, 1, 0, 2], 2)
    assert Groups([0, 0, 1], 1) != Groups([0, 1, 1], 1)


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda: NofM(5, 4), ArgumentError, "from 0 to 4"),
        (lambda: NofM(1, 0), ArgumentError, "m: 0"),
        (lambda: NofM(1.5, 4), ArgumentError, "n: 1.5"),
        (lambda: Count(-1), ArgumentError, "n_keep: -1"),
        (lambda: Groups([0, 1], 3), ArgumentError, "3 of 2 groups"),
        (lambda: Groups([0.5, 1.0], 1), ArgumentError, "whole numbers"),
        (lambda: Groups([[0], [1]], 1), ShapeError, "one label"),
        (lambda: supported(NofM(2, 3)), ArgumentError, "remainder of 2"),
        (lambda: supported(Groups([0, 1], 1)), ShapeError, "2 weights for 8"),
        (lambda: supported(Count(9)), ArgumentError, "from 0 to 8"),
        (lambda: supported("2:4"), ArgumentError, "a str"),
        (lambda: supported(None), ArgumentError, "neither given"),
        (lambda: dataclasses.replace(supported(NofM(2, 4)), n_prune=3), ArgumentError, "prunes 4 of 8"),
        (lambda: support_from_json({"kind": "stripes"}), ArgumentError, "count, n_of_m, groups"),
        (lambda: support_from_json({"kind": "n_of_m", "n": 2}), ArgumentError, "without 'm'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, kind, said):
    with pytest.raises(kind, match=said):
        make()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_enumeration_finds_the_optimum_of_the_support(support, program):
    for seed in range(4):
        problem = supported(support, seed, hessian=seed % 2 == 1, gradient=seed < 2)
        least = optimum(problem, program)
        found = enumerate_optimum(problem, program)
        assert found.objective == pytest.approx(least, rel=1e-9, abs=1e-12)
        assert found.proved
        assert found.bound <= least + 1e-12
        assert found.support == (None if isinstance(support, Count) else str(support))
        assert not verify(problem, found).wrong


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_searches_end_inside_where_no_exchange_gains(support, program):
    for seed in range(3):
        problem = supported(support, seed, hessian=seed == 1)
        least = optimum(problem, program)
        first = greedy(problem, program)
        local = swap_search(problem, program, restarts=2)
        for found in (first, local):
            assert problem.allows(found.keep)
            assert found.objective >= least - 1e-10
            assert not verify(problem, found).wrong
        assert local.objective <= first.objective + 1e-12
        for out, into in problem.sets.swaps(local.keep):
            moved = local.keep.copy()
            moved[out], moved[into] = False, True
            assert objective(problem, moved, program) >= local.objective * (1.0 - 1e-8) - 1e-10


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_a_search_without_time_still_gives_a_set_of_the_support(support, program):
    problem = supported(support)
    for search in (greedy, swap_search):
        found = search(problem, program, limits=Limits(time_limit=0.0))
        assert problem.allows(found.keep)
    assert problem.allows(magnitude_keep(problem))


def test_greedy_takes_the_unit_that_costs_least_of_those_with_room():
    """Without couplings the cheapest of each cell go, and the cheapest groups."""
    weights = np.array([1.0, 2.0, 3.0, 4.0, 10.0, 30.0, 20.0, 40.0])
    for support, kept in ((NofM(2, 4), [2, 3, 5, 7]), (Groups([0, 1, 1, 2, 0, 1, 2, 2], 1), [3, 6, 7])):
        problem = BlockProblem(weights=weights, hessian=np.eye(N), support=support)
        for program in PROGRAMS:
            assert np.flatnonzero(greedy(problem, program).keep).tolist() == kept


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_kicked_sets_stay_inside_and_leave_the_start_alone(support):
    generator = np.random.default_rng(0)
    start = support.best(generator.normal(size=N))
    before = start.copy()
    seen = {kicked(start, generator, support=support).tobytes() for _ in range(30)}
    np.testing.assert_array_equal(start, before)
    assert all(support.contains(np.frombuffer(each, dtype=bool)) for each in seen)
    assert len(seen) > 1 or support.n_sets(N) == 1


def test_a_solution_of_another_support_is_wrong():
    """A set of 2:4 is one of a count too: what was claimed is compared."""
    pattern, count = supported(NofM(2, 4)), supported(Count(4))
    found = greedy(pattern, "joint")
    assert not verify(pattern, found).wrong
    assert verify(count, found).wrong
    assert any("2:4" in note for note in verify(count, found).notes)
    relabelled = dataclasses.replace(found, support=None)
    assert verify(pattern, relabelled).wrong
    outside = dataclasses.replace(greedy(count, "joint"), support="2:4")
    keep = np.arange(N) < 4
    outside = dataclasses.replace(outside, keep=keep)
    assert not verify(pattern, outside).feasible


def test_a_warm_start_outside_the_support_is_refused():
    pattern = supported(NofM(2, 4))
    start = dataclasses.replace(greedy(supported(Count(4)), "joint"), keep=np.arange(N) < 4)
    with pytest.raises(ArgumentError, match="keep 2:4"):
        swap_search(pattern, "joint", incumbent=start)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_bounds_lie_below_the_optimum_and_prove_what_they_say(support, program):
    for seed in range(3):
        problem = supported(support, seed, hessian=seed == 1, damping=0.3)
        least = optimum(problem, program)
        best = [keep for keep in inside(problem) if objective(problem, keep, program) <= least * (1.0 + 1e-9)]
        for options in ({}, {"diagonal_split": False}, {"fix": True}):
            found = lower_bound(problem, program, **options)
            assert found.bound <= least + 1e-12
            assert found.objective >= least - 1e-12
            assert problem.allows(found.keep)
            assert verify(problem, found).ok
            fixing = found.certificate.fixing
            for keep in best if fixing is not None else []:
                assert (keep >= fixing.keep).all()
                assert not (keep & fixing.prune).any()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", [support for support in SUPPORTS if support.n_sets(N) > 1], ids=str)
def test_relaxations_are_solved_to_a_small_gap(support, program):
    """With the damping as the split: what their certificate proves is the least value that they have."""
    problem = supported(support, 5, hessian=True, damping=0.5)
    found = lower_bound(problem, program, diagonal_split=False)
    value = relaxed_value(problem, program, found.certificate)
    assert found.bound <= value + 1e-9 * abs(value)
    assert found.bound == pytest.approx(value, rel=2e-3, abs=1e-6)


def relaxed_value(problem, program, certificate) -> float:
    """Value of the relaxation at shares that the linear underestimate at the certificate's point prefers.

    Frank-Wolfe steps from there, with sets of the support as corners: an upper bound on its optimum.
    """
    corners = np.array(inside(problem), dtype=float)
    hessian, w, g = problem.dense_hessian(), problem.weights, problem.gradient_or_zero

    def joint(z):
        """Least value of the perspective form at shares z, and its slope in them."""
        used = z > 1e-9
        matrix = (hessian - np.diag(certificate.split))[np.ix_(used, used)]
        matrix = matrix + np.diag(certificate.split[used] / z[used])
        u = np.zeros(N)
        u[used] = np.linalg.solve(matrix, problem.linear_term()[used])
        residual = problem.linear_term() - (hessian - np.diag(certificate.split)) @ u
        value = problem.constant_term() - 0.5 * float(problem.linear_term() @ u)
        return value, -0.5 * residual**2 / certificate.split

    def selection(z):
        y = 1.0 - z
        costs = w[:, None] * hessian * w - np.diag(certificate.shift)
        slope = costs @ y - g * w + 0.5 * certificate.shift
        return float(0.5 * y @ costs @ y + (0.5 * certificate.shift - g * w) @ y), -slope

    function = joint if program == "joint" else selection
    shares = corners.mean(axis=0)
    best = np.inf
    for step in range(400):
        value, slope = function(shares)
        best = min(best, value)
        shares += 2.0 / (step + 4.0) * (corners[np.argmin(corners @ slope)] - shares)
    return best


@pytest.mark.parametrize("support", [NofM(2, 4), NofM(1, 4), NofM(3, 8), NofM(1, 2)], ids=str)
def test_a_split_in_blocks_is_tighter_and_proved(support):
    gains = []
    for seed in range(4):
        rng = np.random.default_rng([seed, 9])
        rows = rng.normal(size=(20, 16)) @ np.diag(rng.uniform(0.3, 2.0, 16))
        problem = BlockProblem(
            weights=rng.normal(size=16), hessian=rows.T @ rows / 20, damping=0.05, support=support
        )
        least = enumerate_optimum(problem, "joint").objective
        plain = lower_bound(problem, "joint", relaxation="perspective")
        found = lower_bound(problem, "joint")
        assert plain.bound <= found.bound <= least
        assert verify(problem, found).ok
        gains.append((found.bound - plain.bound) / max(least - plain.bound, 1e-12))
    assert max(gains) > (0.02 if support.m > 2 else -1.0)


def blocks_found():
    problem = supported(NofM(2, 4), 8, hessian=True)
    plain = lower_bound(problem, "joint", relaxation="perspective").certificate
    found = relax_in_blocks(problem, plain, optimum(problem, "joint"), never)
    assert found is not None
    return problem, plain, found


def test_diagonal_blocks_prove_what_a_diagonal_split_does():
    problem, plain, found = blocks_found()
    diagonal = plain.split.reshape(2, 4)[:, :, None] * np.eye(4)
    same = dataclasses.replace(found, point=plain.point, blocks=diagonal)
    assert same.lower_bound(problem) == pytest.approx(plain.lower_bound(problem), rel=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = dataclasses.replace(found, point=found.point + rng.normal(size=N))
        assert moved.lower_bound(problem) <= optimum(problem, "joint")


def test_blocks_that_prove_nothing_are_refused():
    problem, plain, found = blocks_found()
    bound = found.lower_bound(problem)
    assert plain.lower_bound(problem) < bound <= optimum(problem, "joint")
    wrong = found.blocks.copy()
    wrong[0, 0, 1] *= 1.5
    sunk = found.blocks - 2.0 * np.linalg.eigvalsh(found.blocks).max() * np.eye(4)
    changes = ({"blocks": 1.2 * found.blocks}, {"blocks": wrong}, {"blocks": sunk}, {"basis": plain})
    for change in (*changes, {"blocks": found.blocks[:1]}, {"point": found.point[:4]}):
        assert dataclasses.replace(found, **change).lower_bound(problem) == -np.inf
    for support in (Count(4), NofM(1, 2), Groups(np.arange(N) // 4, 1)):
        assert found.lower_bound(supported(support, 8, hessian=True)) == -np.inf


def test_a_split_in_blocks_goes_through_a_file(tmp_path):
    problem, _, _ = blocks_found()
    found = lower_bound(problem, "joint")
    assert found.certificate.kind == "block_perspective"
    write_solution(tmp_path / "bound.npz", problem, found)
    back = read_solution(tmp_path / "bound.npz", problem)
    assert back.certificate.kind == "block_perspective"
    assert verify(problem, back).ok
    for support, relaxation in ((Count(4), "block_perspective"), (NofM(2, 4), "rlt")):
        program = "joint" if relaxation == "block_perspective" else "selection"
        with pytest.raises(UnsupportedProblemError, match=relaxation):
            lower_bound(supported(support), program, relaxation=relaxation)


def test_a_bound_of_one_support_is_none_of_another():
    """A certificate is computed anew for the support at hand, and says which one it was made for."""
    pattern, count = supported(NofM(2, 4), 3), supported(Count(4), 3)
    for program in PROGRAMS:
        found = lower_bound(pattern, program)
        assert lower_bound(count, program).bound <= found.bound + 1e-12
        assert found.certificate.subject.support == "2:4"
        assert found.certificate.lower_bound(count) <= optimum(count, program)
        foreign = dataclasses.replace(found, support=None)
        assert verify(count, foreign).wrong


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", [NofM(2, 4), NofM(1, 8), Groups(np.arange(704) // 8, 40)], ids=str)
def test_large_blocks_are_bounded_from_their_rows(support, program):
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(30, 704)) / np.sqrt(30)
    problem = BlockProblem(weights=rng.normal(size=704), rows=rows, damping=0.5, support=support)
    found = lower_bound(problem, program, limits=Limits(iteration_limit=40))
    assert verify(problem, found).ok
    assert 0.0 < found.bound <= found.objective
    assert found.gap < 0.6


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_branch_and_bound_proves_the_optimum(support, program):
    for seed, options in enumerate(({}, {"search": "depth"}, {"reduction": False}, {"swaps": False})):
        problem = supported(support, seed, hessian=seed % 2 == 1, damping=0.02)
        least = optimum(problem, program)
        found = branch_and_bound(problem, program, **options)
        assert found.proved
        assert found.objective == pytest.approx(least, rel=1e-6, abs=1e-12)
        assert found.bound <= least + 1e-12
        assert not verify(problem, found).wrong


@pytest.mark.parametrize("program", PROGRAMS)
def test_branch_and_bound_agrees_with_enumeration_on_larger_blocks(program):
    for seed in range(6):
        rng = np.random.default_rng([seed, 3])
        labels = rng.integers(0, 7, 16)
        support = (NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(1, 2), Groups(labels, 3), Groups(labels, 5))[seed]
        problem = BlockProblem(
            weights=rng.normal(size=16), rows=rng.normal(size=(9, 16)), damping=0.01, support=support
        )
        least = enumerate_optimum(problem, program).objective
        found = branch_and_bound(problem, program)
        assert found.proved
        assert found.objective == pytest.approx(least, rel=1e-6)


def test_limits_leave_a_set_of_the_support_and_a_valid_bound():
    for support in (NofM(2, 4), Groups(np.arange(N) // 2, 2)):
        problem = supported(support, 2, damping=1e-3)
        for program in PROGRAMS:
            least = optimum(problem, program)
            for limits in (Limits(time_limit=0.0), Limits(node_limit=0), Limits(node_limit=2)):
                found = branch_and_bound(problem, program, limits=limits)
                assert problem.allows(found.keep)
                assert found.bound is None or found.bound <= least + 1e-12


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_outer_approximation_proves_the_optimum(support, program):
    problem = supported(support, 4, damping=0.3)
    least = optimum(problem, program)
    found = outer_approximation(problem, program)
    assert problem.allows(found.keep)
    assert found.objective == pytest.approx(least, rel=1e-5, abs=1e-9)
    assert found.bound is None or found.bound <= least + 1e-9
    assert not verify(problem, found).wrong


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_the_rows_of_a_support_hold_for_its_sets_alone(support):
    for kept in (True, False):
        rows = support.equations(N, kept)
        for keep in SUBSETS:
            ones = keep if kept else ~keep
            holds = all(float(value @ ones[index]) == right for index, value, right in rows)
            assert holds == support.contains(keep)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_has_the_optimum_of_the_support(name):
    """Of the models that HiGHS or SCIP takes: the others share their rows with these."""
    spec = MODELS[name]
    solvers = [solver for solver in ("highs", "scip") if name in models_for(solver, spec.program)]
    available = {info.name for info in available_solvers() if info.available}
    solver = next((solver for solver in solvers if solver in available), None)
    if solver is None:
        pytest.skip("no solver for it")
    rng = np.random.default_rng(6)
    rows, weights = rng.normal(size=(3, 4)), rng.normal(size=4)
    for support in (NofM(1, 2), Groups([0, 1, 0, 2], 2)):
        problem = BlockProblem(weights=weights, rows=rows, damping=0.5, support=support)
        form = standard_form(spec.build(problem))
        size = spec.size(problem)
        assert form.matrix.shape[0] <= size.linear_rows
        assert form.n_columns <= size.variables
        least = enumerate_optimum(problem, spec.program).objective
        found = solve_with(solver, problem, spec.program, model=name, limits=Limits(rel_gap=1e-4))
        assert problem.allows(found.keep)
        assert found.objective == pytest.approx(least, rel=1e-3, abs=1e-9)
        assert found.bound is None or found.bound <= least * (1.0 + 1e-4) + 1e-9
        assert not verify(problem, found).wrong


def test_an_exported_model_has_a_row_for_every_cell(tmp_path):
    written = export_model(supported(NofM(2, 4)), "selection_qp", tmp_path / "model.mps")
    assert written.linear_rows == 2
    assert export_model(supported(Count(4)), "selection_qp", tmp_path / "count.mps").linear_rows == 1


def test_a_method_that_cannot_take_a_support_names_those_that_can():
    for kind, support in zip(KINDS, (Count(4), NofM(2, 4), Groups(np.arange(N) // 2, 2)), strict=True):
        able = [name for name, kinds in TAKEN.items() if kind in kinds]
        assert {"enumeration", "greedy_obs", "swap_search"} <= set(able)
        for name in able:
            require_support(support, name)
        if kind != "count":
            with pytest.raises(UnsupportedProblemError, match=", ".join(able)):
                require_support(support, "a stranger")
