"""What no label, status or bound may claim without being found out, and what is refused by name."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from formulations import BlockProblem, Limit, Limits, Subject, Termination, Verdict, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.incumbents import greedy, swap_search
from formulations.loss import step_loss
from formulations.outer_approximation import outer_approximation
from formulations.relaxations import Fixing, lower_bound
from formulations.relaxations.certified import value_ceiling
from formulations.solution import MOST_THREADS
from tests.stress.exact import ExactBlock

PROGRAMS = ("selection", "joint")
METHODS = (branch_and_bound, enumerate_optimum, lower_bound, greedy, swap_search, outer_approximation)


def gaussian(seed: int = 0, n_prune: int = 5) -> BlockProblem:
    rng = np.random.default_rng(seed)
    return BlockProblem(
        weights=rng.normal(size=10), rows=rng.normal(size=(25, 10)) / 5.0, damping=0.05, n_prune=n_prune
    )


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("relaxation", [None, "rlt"])
def test_a_certificate_of_the_other_program_proves_nothing(program, relaxation):
    if program == "joint" and relaxation:
        pytest.skip("the joint program has no linear relaxation")
    problem = gaussian()
    solution = lower_bound(problem, program, relaxation=relaxation)
    assert verify(problem, solution).ok
    other = "joint" if program == "selection" else "selection"
    found = verify(problem, dataclasses.replace(solution, program=other))
    assert found.wrong
    assert not found.bound_checked


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_of_a_certificate_is_that_of_its_kind_whatever_it_says(program):
    """One that does not say what it was made for is not believed to be of the program at hand."""
    problem = gaussian()
    other = "joint" if program == "selection" else "selection"
    silent = dataclasses.replace(lower_bound(problem, other).certificate, subject=None)
    found = verify(problem, dataclasses.replace(greedy(problem, program), certificate=silent))
    assert found.wrong
    assert found.bound is None
    assert [note for note in found.notes if f"for the {other} program" in note]


@pytest.mark.parametrize(
    ("program", "relaxation", "kind"),
    [
        ("joint", None, "perspective"),
        ("joint", "cluster_perspective", "cluster_perspective"),
        ("selection", None, "capped_simplex"),
        ("selection", "rlt", "rlt"),
        ("selection", "mccormick", "mccormick"),
    ],
)
def test_a_certificate_names_its_relaxation_and_proves_nothing_of_another_size(program, relaxation, kind):
    problem = gaussian()
    solution = lower_bound(problem, program, relaxation=relaxation)
    certificate = solution.certificate
    assert certificate.kind == kind
    everything = np.ones(11, dtype=bool)
    larger = BlockProblem(weights=np.ones(11), rows=np.eye(11), damping=0.05, n_prune=5)
    fixing = Fixing(keep=everything, prune=~everything, cutoff=solution.bound)
    assert not dataclasses.replace(certificate, fixing=fixing).proves_fixing(larger)


@pytest.mark.parametrize(
    ("program", "relaxation"), [("joint", None), ("selection", None), ("selection", "rlt")]
)
def test_a_certificate_holds_copies_that_nobody_can_change(program, relaxation):
    certificate = lower_bound(gaussian(), program, relaxation=relaxation).certificate
    names = [
        f.name
        for f in dataclasses.fields(certificate)
        if isinstance(getattr(certificate, f.name), np.ndarray)
    ]
    assert names
    given = {name: np.array(getattr(certificate, name)) for name in names}
    remade = dataclasses.replace(certificate, **given)
    for name in names:
        given[name][...] = 7.0
        held = getattr(remade, name)
        assert not held.flags.writeable
        np.testing.assert_array_equal(held, getattr(certificate, name))


def test_fixings_print_as_counts():
    keep = np.arange(100_000) < 30_000
    shown = repr(Fixing(keep=keep, prune=np.arange(100_000) > 90_000, cutoff=0.25))
    assert len(shown) < 100
    for word in ("30000 kept", "9999 pruned", "100000", "0.25"):
        assert word in shown


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_certificate_states_program_count_and_block(program):
    problem = gaussian()
    solution = lower_bound(problem, program)
    assert solution.certificate.subject == Subject.of(problem, program)
    for changed in ({"n_keep": 4}, {"program": "none"}, {"fingerprint": "0" * 64}):
        subject = dataclasses.replace(solution.certificate.subject, **changed)
        certificate = dataclasses.replace(solution.certificate, subject=subject)
        assert verify(problem, dataclasses.replace(solution, certificate=certificate)).wrong
    certificate = dataclasses.replace(solution.certificate, subject=None)
    silent = verify(problem, dataclasses.replace(solution, certificate=certificate))
    assert silent.verdict is Verdict.UNCHECKED
    assert verify(gaussian(seed=1), solution).wrong
    assert verify(gaussian(n_prune=4), solution).wrong


def test_fixings_of_the_other_program_are_no_basis():
    problem = gaussian()
    best = {program: enumerate_optimum(problem, program) for program in PROGRAMS}
    fixed = {p: lower_bound(problem, p, incumbent=best[p], fix=True).certificate for p in PROGRAMS}
    mixed = dataclasses.replace(fixed["joint"], basis=fixed["selection"])
    assert mixed.lower_bound(problem) == -math.inf


@pytest.mark.parametrize(
    "claims",
    [
        {"bound": None},
        {"bound": -math.inf},
        {"bound": math.nan},
        {"bound": math.inf},
        {"half": True},
        {"rel_gap": None},
        {"rel_gap": math.nan},
        {"rel_gap": -1.0},
        {"program": "nonsense"},
        {"objective": None},
        {"objective": math.nan},
        {"keep": None, "weights": None},
        {"keep": None, "weights": None, "termination": Termination.INFEASIBLE, "bound": 1e9},
        {"termination": Termination.INFEASIBLE},
        {"termination": Termination.NO_SOLUTION},
    ],
    ids=str,
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_claims_that_contradict_each_other_are_wrong(program, claims):
    problem = gaussian()
    solution = branch_and_bound(problem, program)
    assert solution.proved
    if claims.get("half"):
        claims = {"bound": 0.5 * solution.objective, "rel_gap": 1e-9}
    assert verify(problem, dataclasses.replace(solution, **claims)).wrong


def test_a_program_that_does_not_exist_is_named():
    """Even where nothing else is claimed that could be wrong."""
    problem = gaussian()
    plain = dataclasses.replace(greedy(problem, "joint"), bound=None, certificate=None)
    assert verify(problem, plain).ok
    found = verify(problem, dataclasses.replace(plain, program="nonsense"))
    assert found.wrong
    assert any("'nonsense'" in note for note in found.notes)


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_rests_on_a_search_is_unchecked(program):
    problem = gaussian()
    solution = branch_and_bound(problem, program)
    found = verify(problem, solution)
    assert found.verdict is Verdict.UNCHECKED
    assert not found.ok
    assert not found.wrong
    assert not found.bound_checked
    raised = dataclasses.replace(solution, bound=solution.objective * 1.01, rel_gap=1.0)
    assert verify(problem, raised).wrong
    assert verify(problem, greedy(problem, program)).ok


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bound_raised_by_one_in_a_million_is_not_proved(program):
    problem = gaussian()
    solution = lower_bound(problem, program)
    raised = dataclasses.replace(solution, bound=solution.bound * (1.0 + 1e-6))
    assert verify(problem, raised).verdict is Verdict.UNCHECKED


@pytest.mark.parametrize("damping", [0.0, 1e-18, 1e-16, 1e-15])
def test_singular_to_rounding_is_one_decision_with_a_remedy(damping):
    rng = np.random.default_rng(2)
    rows = rng.integers(-2, 3, size=(4, 8)).astype(float)
    problem = BlockProblem(weights=rng.normal(size=8), rows=rows, damping=damping, n_prune=3)
    for method in METHODS:
        with pytest.raises(NotPositiveDefiniteError, match="damping"):
            method(problem, "joint")
        assert int((~method(problem, "selection").keep).sum()) == 3


def test_a_hessian_indefinite_by_rounding_is_never_a_raw_error():
    problem = BlockProblem(weights=np.ones(3), hessian=np.diag([1.0, 1.0, -1e-11]), n_prune=1)
    for method in METHODS:
        with pytest.raises(NotPositiveDefiniteError):
            method(problem, "joint")
        solution = method(problem, "selection")
        assert int((~solution.keep).sum()) == 1
        if solution.bound is not None:
            assert solution.bound <= float(ExactBlock(problem).optimum("selection"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_optimal_means_that_the_gap_was_met(program):
    problem = BlockProblem(
        weights=np.array([1e10, 1.0, 1.0, 1.0]), rows=np.eye(4) + 0.3, damping=1e-3, n_prune=1
    )
    for method in (branch_and_bound, enumerate_optimum, lower_bound, outer_approximation):
        solution = method(problem, program, limits=Limits(rel_gap=1e-6))
        assert solution.proved == (solution.gap <= 1e-6)
        if method in (branch_and_bound, enumerate_optimum) and not solution.proved:
            assert solution.limit is Limit.GAP


@pytest.mark.parametrize("damping", [1e-3, 1e-13, 1e-12])
@pytest.mark.parametrize("n_prune", [0, 3])
def test_the_bound_of_the_only_set_is_below_its_value(damping, n_prune):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(3, 3))
    rows[:, 2] = -rows[:, 1]
    weights = rng.normal(size=3)
    problem = BlockProblem(
        weights=weights, rows=rows, damping=damping, n_prune=n_prune, gradient=rows.T @ (rows @ weights)
    )
    for program in PROGRAMS:
        optimum = ExactBlock(problem).optimum(program)
        for method in (branch_and_bound, enumerate_optimum, lower_bound, outer_approximation):
            solution = method(problem, program)
            assert solution.bound is None or solution.bound <= optimum
            assert verify(problem, solution).ok


def test_the_bound_of_the_enumeration_has_room_for_rounding():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        problem = BlockProblem(
            weights=rng.normal(size=4), rows=rng.normal(size=(2, 4)), damping=4e-14, n_prune=2
        )
        try:
            solution = enumerate_optimum(problem, "joint")
        except NotPositiveDefiniteError:
            continue
        assert solution.bound is None or solution.bound <= ExactBlock(problem).optimum("joint")


@pytest.mark.parametrize("scale", [1e-80, 1e-155, 1e80, 1e160])
def test_what_over_or_underflows_is_refused_by_name(scale):
    with pytest.raises(ArgumentError, match="rescale"):
        BlockProblem(weights=np.ones(3), rows=np.eye(3) * scale, n_prune=1)
    with pytest.raises(ArgumentError, match="rescale"):
        BlockProblem(weights=np.ones(3) * scale, rows=np.eye(3), damping=0.1, n_prune=1)


@pytest.mark.parametrize("name", ["weights", "rows", "gradient"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda array: np.ma.masked_array(array, mask=array == 0.0),
        lambda array: array.astype(str),
        lambda array: array.astype("timedelta64[s]"),
        lambda array: array.astype("datetime64[s]"),
        lambda array: array.astype(str).astype(object),
        lambda array: array + 0j,
    ],
)
def test_arrays_that_hold_no_numbers_are_refused(name, spoil):
    data = {"weights": np.ones(3), "rows": np.eye(3), "gradient": np.zeros(3)}
    data[name] = spoil(data[name])
    with pytest.raises(ArgumentError, match=name):
        BlockProblem(**data, n_prune=1)


def test_more_threads_than_libraries_can_be_told_of_are_refused():
    assert Limits(threads=MOST_THREADS).threads == MOST_THREADS
    for threads in (MOST_THREADS + 1, 2**31, 2**70):
        with pytest.raises(ArgumentError, match=r"threads: .*at most 1024"):
            Limits(threads=threads)


def test_numpy_scalars_are_numbers():
    limits = Limits(
        rel_gap=np.float32(0.25), time_limit=np.float64(2.0), threads=np.int64(1), node_limit=np.int32(7)
    )
    assert [type(x) for x in (limits.rel_gap, limits.time_limit, limits.threads)] == [float, float, int]
    problem = BlockProblem(weights=np.ones(2), rows=np.eye(2), n_prune=np.int64(1), damping=np.float32(0.5))
    assert (type(problem.n_prune), type(problem.damping)) == (int, float)
    assert type(branch_and_bound(problem, "joint", limits=limits).bound) is float


def test_claims_at_the_very_edge_of_what_is_proved_hold():
    problem = gaussian()
    solution = branch_and_bound(problem, "joint")
    plain = dataclasses.replace(solution, certificate=None, termination=Termination.FEASIBLE)
    ceiling = value_ceiling(problem, solution.weights)
    assert not verify(problem, dataclasses.replace(plain, bound=ceiling)).wrong
    assert verify(problem, dataclasses.replace(plain, bound=math.nextafter(ceiling, math.inf))).wrong
    # Without a gradient no loss is below 0, which needs no certificate.
    assert verify(problem, dataclasses.replace(plain, bound=0.0)).bound_checked
    assert not verify(problem, dataclasses.replace(plain, bound=1e-300)).bound_checked
    exact = dataclasses.replace(solution, bound=solution.objective, rel_gap=0.0)
    assert not verify(problem, exact).wrong
    gap = solution.gap
    assert not verify(problem, dataclasses.replace(solution, rel_gap=gap)).wrong
    assert verify(problem, dataclasses.replace(solution, rel_gap=math.nextafter(gap, 0.0))).wrong
    # Nothing pruned: everything is 0, and what is stated has to be that.
    nothing = dataclasses.replace(problem, n_prune=0)
    still = branch_and_bound(nothing, "selection")
    assert still.objective == 0.0
    assert verify(nothing, still).ok
    assert verify(nothing, dataclasses.replace(still, objective=1e-300, bound=None, certificate=None)).wrong


@pytest.mark.parametrize(
    ("claims", "note"),
    [
        ({"keep": None, "weights": None, "termination": Termination.NO_SOLUTION}, "without a set"),
        ({"keep": np.ones(9, dtype=bool)}, "for a block of 10"),
        ({"weights": np.zeros(11)}, "for a block of 10"),
        ({"nan": 3}, "not finite"),
        ({"pruned": 1e-300}, "not exactly 0"),
        ({"more": True}, "the problem asks for"),
        ({"off": 2e-7}, "recomputed"),
        ({"off": -2e-7}, "recomputed"),
        ({"objective": None}, "recomputed"),
        ({"bound": -math.inf}, "is no number"),
        ({"bound": 1e9}, "exceeds the objective"),
        ({"rel_gap": math.inf}, "cannot have been asked for"),
        ({"rel_gap": -1e-9}, "cannot have been asked for"),
        ({"termination": Termination.INFEASIBLE}, "every count"),
        ({"termination": Termination.NO_SOLUTION}, "but there is a set"),
        ({"termination": Termination.OPTIMAL}, "called optimal"),
        ({"none": Termination.FEASIBLE}, "but there is no set"),
    ],
    ids=str,
)
def test_one_claim_that_is_wrong_is_said_to_be_it(claims, note):
    """Of a solution that claims no more than its set."""
    problem = gaussian()
    plain = dataclasses.replace(greedy(problem, "joint"), bound=None, certificate=None, rel_gap=None)
    assert verify(problem, plain).ok
    claims, keep, weights = dict(claims), plain.keep.copy(), plain.weights.copy()
    if "nan" in claims:
        weights[claims.pop("nan")] = math.nan
    if "pruned" in claims:
        weights[np.flatnonzero(~keep)[0]] = claims.pop("pruned")
    if "off" in claims:
        claims["objective"] = plain.objective * (1.0 + claims.pop("off"))
    if "none" in claims:
        none = {"keep": None, "weights": None, "objective": None}
        claims = none | {"termination": claims.pop("none")}
    if claims.pop("more", False):
        # One weight more stays, as it was: the objective is right.
        back = np.flatnonzero(~keep)[0]
        keep[back], weights[back] = True, problem.weights[back]
        claims["objective"] = step_loss(problem, weights - problem.weights)
    solution = dataclasses.replace(plain, **({"keep": keep, "weights": weights} | claims))
    found = verify(problem, solution)
    assert found.wrong
    # A bound that is wrong is not proved either, which is said too.
    assert [note in said for said in found.notes if "rests on" not in said] == [True]
    assert found.feasible == (note not in WITHOUT_A_SET)
    assert not found.bound_checked


WITHOUT_A_SET = (
    *("without a set", "for a block of 10", "not finite", "not exactly 0", "the problem asks for"),
    "but there is no set",
)
"""What is wrong with the set itself."""


def test_a_little_difference_in_the_objective_is_rounding():
    problem = gaussian()
    plain = dataclasses.replace(greedy(problem, "joint"), bound=None, certificate=None)
    for off in (5e-8, -5e-8):
        assert verify(problem, dataclasses.replace(plain, objective=plain.objective * (1.0 + off))).ok
    empty = {"keep": None, "weights": None, "objective": None, "termination": Termination.NO_SOLUTION}
    found = verify(problem, dataclasses.replace(plain, **empty))
    assert found.ok
    assert (found.feasible, found.objective, found.bound) == (False, None, None)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_weight_listed_as_fixed_that_is_not_proved_so_is_wrong(program):
    """The bound rests on no fixing, so that nothing else gives it away."""
    problem = gaussian()
    best = enumerate_optimum(problem, program)
    solution = lower_bound(problem, program, incumbent=best, fix=True)
    assert not verify(problem, solution).wrong
    plain = lower_bound(problem, program)
    everything = np.ones(10, dtype=bool)
    boast = Fixing(keep=best.keep, prune=everything & ~best.keep, cutoff=10.0 * best.objective)
    certificate = dataclasses.replace(plain.certificate, fixing=boast)
    found = verify(problem, dataclasses.replace(plain, certificate=certificate))
    assert found.wrong
    assert [note for note in found.notes if "10 weights listed as fixed" in note]
