"""Better diagonal splits: supergradients against differences, single steps, and where rounds of them end."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from formulations import BlockProblem
from formulations.dense_forms import joint_form, selection_form
from formulations.enumeration import enumerate_optimum
from formulations.relaxations.capped_simplex import relax_selection, round_selection
from formulations.relaxations.capped_simplex_kernels import shift_slopes
from formulations.relaxations.diagonal_split import barrier_step, interior_split
from formulations.relaxations.perspective import relax_joint, round_joint
from formulations.relaxations.perspective_kernels import split_slopes
from formulations.relaxations.split_relaxation import (
    joint_split,
    relax_with_split,
    selection_certificate,
    selection_shift,
)
from tests.formulations.blocks import block
from tests.stress.exact import ExactBlock

PROGRAMS = ("selection", "joint")


def relaxed(problem: BlockProblem, program: str, **given):
    if program == "joint":
        form = joint_form(problem)
        split = given.pop("split", joint_split(problem, form))
        return form, relax_joint(form, problem.n_keep, split, **given)
    form = selection_form(problem)
    split = given.pop("split", selection_shift(problem, form))
    return form, relax_selection(form, problem.n_prune, split, **given)


def test_slopes_of_a_split_are_those_of_the_bound():
    problem = replace(block("random", 7, 3, seed=2), damping=1.0)
    split = 0.5 * joint_split(problem, joint_form(problem))
    _, (bound, point, residual, _) = relaxed(problem, "joint", split=split)
    root = np.sqrt(split)
    slopes = split_slopes(point, point * root, residual, problem.n_keep)
    shares = slopes > 1e-9
    assert 1 <= shares.sum() < problem.n
    for i in range(problem.n):
        step = 1e-4 * split[i] * np.eye(problem.n)[i]
        up, down = (relaxed(problem, "joint", split=split + sign * step)[1][0] for sign in (1.0, -1.0))
        assert (up - down) / (2.0 * step[i]) == pytest.approx(slopes[i], rel=1e-3, abs=1e-7 * abs(bound))


def test_a_share_of_next_to_nothing_has_a_large_slope_that_is_a_number():
    """Two entries share a unit, and rounding leaves the second nothing of it."""
    point = np.array([2.0, math.nextafter(1.0, 2.0)])
    slopes = split_slopes(np.ones(2), point, np.zeros(2), 1)
    assert 1e11 <= slopes[1] <= 1e12
    assert slopes[0] >= 0.0


def test_slopes_of_a_shift_are_those_of_the_bound_and_none_is_zero():
    problem = replace(block("random", 7, 3, seed=1), damping=1.0)
    shift = 0.5 * selection_shift(problem, selection_form(problem))
    _, (_, point, _) = relaxed(problem, "selection", split=shift)
    slopes = shift_slopes(point)
    assert (slopes > 1e-3).sum() >= 2
    for i in np.flatnonzero(slopes > 1e-3):
        step = 1e-4 * shift[i] * np.eye(problem.n)[i]
        up, down = (relaxed(problem, "selection", split=shift + sign * step)[1][0] for sign in (1.0, -1.0))
        assert (up - down) / (2.0 * step[i]) == pytest.approx(slopes[i], rel=1e-3, abs=0.0)
    np.testing.assert_allclose(shift_slopes(np.array([0.5, 0.0, 1.0])), [0.125, 0.125e-3, 0.125e-3])
    assert (shift_slopes(np.array([0.0, 1.0, -0.5, 1.5])) > 0.0).all()


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("n", [1, 4, 50])
def test_a_step_near_the_centre_is_that_of_newton(n, positive):
    """Slopes are such that the given split is nearly the centre: no step is shortened there."""
    rng = np.random.default_rng(n)
    rows = rng.normal(size=(n, n)) / math.sqrt(n)
    matrix = rows.T @ rows + np.eye(n)
    centre = rng.uniform(0.2, 0.5, n)
    weight = 0.3
    inverse = np.linalg.inv(matrix - np.diag(centre))
    slopes = weight * (np.diagonal(inverse) - (1.0 / centre if positive else 0.0))
    split = centre + 1e-4 * rng.normal(size=n)
    for _ in range(3):
        before = np.abs(split - centre).max()
        assert barrier_step(matrix, split, slopes, weight, positive)
        assert np.abs(split - centre).max() <= max(before**1.7, 1e-11)


def test_a_shortened_step_stays_off_the_boundary():
    for weight in 10.0 ** np.linspace(-5.0, -1.0, 60):
        split = np.full(1, 0.5)
        assert barrier_step(np.eye(1), split, np.ones(1), weight, False)
        assert split[0] >= 0.6
        if weight < 0.1:
            assert split[0] <= 0.951
    outside = np.full(2, 1.5)
    assert not barrier_step(np.eye(2), outside, np.ones(2), 0.1, False)
    assert outside.tolist() == [1.5, 1.5]


def uneven(seed: int) -> BlockProblem:
    """Nearly a diagonal Hessian, most of which the split can take, and a damping that is next to nothing."""
    rng = np.random.default_rng([seed, 51])
    rows = np.diag(rng.uniform(1.0, 3.0, 6)) + 1e-4 * rng.normal(size=(6, 6))
    return BlockProblem(weights=rng.uniform(1.0, 2.0, 6), rows=rows, damping=1e-2, n_prune=3)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("program", PROGRAMS)
def test_rounds_lead_to_the_best_split(program, known):
    """Of a diagonal Hessian the split takes all, and the relaxation has no gap."""
    for seed in range(3):
        problem = uneven(seed)
        optimum = enumerate_optimum(problem, program).objective
        form, plain = relaxed(problem, program)
        cutoff = optimum / form.scale if known else math.inf
        best = relaxed(problem, program, split_rounds=40, cutoff=cutoff)[1]
        optimum /= form.scale
        assert plain[0] < 0.99 * optimum
        assert optimum * (1.0 - 1e-3) <= best[0] <= optimum * (1.0 + 1e-9)
        # The split that is returned is valid, and the point proves the bound with it.
        assert np.linalg.eigvalsh(form.matrix - np.diag(best[-1]))[0] >= -1e-12
        again = relaxed(problem, program, split=best[-1])[1]
        assert again[0] == pytest.approx(best[0], rel=1e-4, abs=0.0)
        one = relaxed(problem, program, split_rounds=1)[1]
        assert plain[0] <= one[0] <= best[0]


@pytest.mark.parametrize("program", PROGRAMS)
def test_rounds_end_when_nothing_is_gained_or_time_is_over(program):
    problem = uneven(1)
    asked = []

    def stopped(ahead=None, *, after=math.inf):
        # Asked between rounds, where nothing is ahead, and within them, where a step is.
        if ahead is None:
            asked.append(None)
        return len(asked) >= after

    relaxed(problem, program, split_rounds=400, stopped=stopped)
    # Eight rounds in a row that gain less than 1e-4.
    assert 9 <= len(asked) <= 30
    last = len(asked)
    asked.clear()
    short = relaxed(problem, program, split_rounds=last - 9, stopped=stopped)[1]
    final = relaxed(problem, program, split_rounds=last)[1]
    assert short[0] == pytest.approx(final[0], rel=2e-3, abs=0.0)
    for damping in (1e3, 1e4, 1e6):
        asked.clear()
        # Next to nothing is gained from the first round on.
        easy = replace(block("random", 8, 4, seed=1), damping=damping)
        relaxed(easy, program, split_rounds=400, stopped=stopped)
        assert len(asked) == 8
    asked.clear()
    relaxed(problem, program, split_rounds=400, stopped=partial(stopped, after=3))
    assert len(asked) == 3
    asked.clear()
    relaxed(problem, program, split_rounds=400, stopped=stopped, cutoff=-1e9)
    assert not asked


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_start_near_the_solution_gives_the_same_bound(program):
    problem = block("gradient", 8, 4, seed=3)
    form, found = relaxed(problem, program)
    again = relaxed(problem, program, start=found[1])[1]
    assert again[0] == pytest.approx(found[0], rel=1e-6, abs=0.0)
    certificate, keep = relax_with_split(problem, program, math.inf, 0)
    assert certificate.lower_bound(problem) == pytest.approx(found[0] * form.scale, rel=1e-6, abs=0.0)
    assert keep.sum() == problem.n_keep
    warm, _ = relax_with_split(problem, program, math.inf, 0, start=certificate.point)
    assert warm.lower_bound(problem) == pytest.approx(found[0] * form.scale, rel=1e-6, abs=0.0)
    # A cutoff that the start meets already is in units of the loss.
    cut, _ = relax_with_split(problem, program, 0.999 * found[0] * form.scale, 0, start=certificate.point)
    np.testing.assert_allclose(cut.point, certificate.point, rtol=1e-9)


def test_a_first_split_is_at_most_the_damping_in_exact_arithmetic():
    for seed in range(4):
        problem = block("random", 12, 5, seed)
        diagonal = [row[i] for i, row in enumerate(ExactBlock(problem).hessian)]
        split = joint_split(problem, joint_form(problem))
        form = selection_form(problem)
        shift = selection_shift(problem, form)
        for i, entry in enumerate(diagonal):
            share = Fraction(float(split[i])) * entry / Fraction(problem.damping)
            assert 1 - Fraction(1, 10**8) <= share <= 1
            weight = Fraction(float(problem.weights[i]))
            whole = Fraction(float(shift[i])) * Fraction(form.scale)
            share = whole / (weight * weight * Fraction(problem.damping))
            assert 1 - Fraction(1, 10**8) <= share <= 1


def test_an_interior_split_is_strictly_inside():
    matrix = np.array([[2.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(interior_split(matrix, np.ones(2), True), [0.7, 0.7])
    np.testing.assert_allclose(interior_split(matrix, np.ones(2), False), [0.68, 0.68])
    singular = np.ones((2, 2))
    assert np.linalg.eigvalsh(singular - np.diag(interior_split(singular, np.zeros(2), False)))[0] > 0.0


def scripted(monkeypatch, program: str, bounds: list[float], **given):
    """Rounds of a relaxation whose bounds are given: what is handed to every step, and what is returned."""
    module = "perspective" if program == "joint" else "capped_simplex"
    home = f"formulations.relaxations.{module}."
    problem = block("random", 6, 2, seed=1)
    form = replace((joint_form if program == "joint" else selection_form)(problem), constant=0.125)
    first = joint_split(problem, form) if program == "joint" else selection_shift(problem, form)
    rounds, steps, left = [], [], iter(bounds)

    def begin(smooth, linear, count, *rest):
        start, cutoff, most, tolerance = rest[-4:]
        rounds.append((smooth.copy(), linear.copy(), count, start.copy(), cutoff, most, tolerance))
        point = np.random.default_rng(len(rounds)).random(6)
        return SimpleNamespace(point=point, residual=10.0 * point, figures=np.array([next(left), 0.0, 0.0]))

    def step(matrix, current, slopes, weight, positive):
        steps.append((current.copy(), slopes.copy(), weight, positive))
        current *= 0.9

    monkeypatch.setattr(home + ("begin_perspective" if program == "joint" else "begin_simplex"), begin)
    monkeypatch.setattr(home + "ascend", lambda *_: None)
    monkeypatch.setattr(home + "barrier_step", step)
    found = (relax_joint if program == "joint" else relax_selection)(
        form, problem.n_keep if program == "joint" else problem.n_prune, first, **given
    )
    return form, first, rounds, steps, found


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_round_starts_where_the_last_one_ended_with_a_smaller_barrier(monkeypatch, program, known):
    bounds, joint = [1.0, 2.0, -3.0, 4.0, 4.0], program == "joint"
    cutoff = 1e3 if known else math.inf
    start = np.linspace(0.1, 0.6, 6)
    kept = start.copy()
    form, first, rounds, steps, found = scripted(
        monkeypatch, program, bounds, split_rounds=4, cutoff=cutoff, start=start
    )
    assert start.tolist() == kept.tolist()
    assert (len(rounds), len(steps)) == (5, 4)
    splits = [first, *(current * 0.9 for current, *_ in steps)]
    np.testing.assert_array_equal(steps[0][0], interior_split(form.matrix, first, joint))
    for number, (smooth, linear, count, begun, limit, most, tolerance) in enumerate(rounds):
        split, root = splits[number], np.sqrt(splits[number]) if joint else np.ones(6)
        assert (count, limit, most, tolerance) == (4 if joint else 2, cutoff - form.constant, 300, 1e-5)
        np.testing.assert_allclose(
            (smooth + np.diag(np.ones(6) if joint else split)) * np.outer(root, root), form.matrix
        )
        np.testing.assert_allclose(linear * root, form.linear + (0.0 if joint else 0.5 * split))
        before = (
            start
            if number == 0
            else np.random.default_rng(number).random(6) / (np.sqrt(splits[number - 1]) if joint else 1.0)
        )
        np.testing.assert_allclose(begun, before * root)
    for number, (current, slopes, weight, positive) in enumerate(steps):
        np.testing.assert_array_equal(current, splits[number] if number else current)
        bound = bounds[number] + form.constant
        gap = cutoff - bound if known else 0.2 * 0.8**number * abs(bound)
        assert weight == pytest.approx(0.1 * gap / 6, rel=1e-12, abs=0.0)
        assert positive is joint
        point = np.random.default_rng(number + 1).random(6)
        wanted = shift_slopes(point)
        if joint:
            wanted = split_slopes(point / np.sqrt(splits[number]), point, 10.0 * point, 4)
        np.testing.assert_allclose(slopes, wanted)
    # The fourth round is the best one, and what it returns is its own.
    assert found[0] == 4.0 + form.constant
    point = np.random.default_rng(4).random(6)
    np.testing.assert_allclose(found[1], point / np.sqrt(splits[3]) if joint else point)
    np.testing.assert_array_equal(found[-1], splits[3])
    if joint:
        np.testing.assert_allclose(found[2], 10.0 * point)


@pytest.mark.parametrize("program", PROGRAMS)
def test_rounds_end_after_eight_that_gain_less_than_a_ten_thousandth(monkeypatch, program):
    def rounds(totals: list[float], **given) -> int:
        bounds = [total - 0.125 for total in totals]
        return len(scripted(monkeypatch, program, bounds, **given)[2])

    for sign in (1.0, -1.0):
        idle = [sign * (1.0 + sign * 0.9e-4)] * 8
        assert rounds([sign, *idle, 0.0, 0.0], split_rounds=50) == 9
        # A gain of a little more, and the eight are counted anew.
        better = sign * (1.0 + sign * 1.2e-4)
        idle = [*[sign] * 7, better, *[better] * 8]
        assert rounds([sign, *idle, 0.0], split_rounds=50) == 17
    assert rounds([1.0], split_rounds=0) == 1
    assert rounds([1.0, 2.0, 3.0], split_rounds=2) == 3
    assert rounds([1.0, 2.0, 3.0], split_rounds=9, cutoff=3.0) == 3
    assert rounds([1.0, 2.0, 3.0, 4.0], split_rounds=3, cutoff=3.0000001) == 4
    asked = iter([False, False, True])
    assert rounds([1.0, 2.0, 3.0, 4.0], split_rounds=9, stopped=lambda: next(asked)) == 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_next_to_the_cutoff_the_barrier_does_not_vanish(monkeypatch, program):
    bound = 0.25 - 0.125
    cutoff = math.nextafter(0.25, math.inf)
    weight = scripted(monkeypatch, program, [bound, bound], split_rounds=1, cutoff=cutoff)[3][0][2]
    assert 1e-14 / 6 <= weight <= 1e-12 / 6


@pytest.mark.parametrize("program", PROGRAMS)
def test_of_equal_rounds_the_first_is_returned(monkeypatch, program):
    found = scripted(monkeypatch, program, [1.0, 2.0, 2.0, 0.5], split_rounds=3)[-1]
    point = np.random.default_rng(2).random(6)
    assert found[0] == 2.125
    if program == "selection":
        assert found[1].tolist() == point.tolist()
    else:
        assert found[2].tolist() == (10.0 * point).tolist()


def test_a_relaxation_is_rounded_to_its_largest_entries_and_of_equal_ones_to_the_first():
    residual = np.array([1.0, -3.0, 2.0, -2.0, 0.0])
    for count, kept in enumerate(([], [1], [1, 2], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4])):
        assert np.flatnonzero(round_joint(residual, count)).tolist() == kept
    point = np.array([0.5, 1.0, 0.5, -2.0, 0.0])
    for count, pruned in enumerate(([], [1], [0, 1], [0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 3, 4])):
        assert np.flatnonzero(~round_selection(point, count)).tolist() == pruned


@pytest.mark.parametrize("positive", [True, False])
def test_a_step_is_the_longest_feasible_one_of_those_tried_less_a_tenth(positive):
    """Of one weight: the whole step of Newton, or the first of its halves that fits."""
    lengths = set()
    for weight in (10.0 ** np.linspace(-4.0, 1.0, 60)).tolist():
        for slope in (0.0, 1.0):
            gradient, curvature = slope / weight - 2.0, 4.0
            if positive:
                gradient, curvature = gradient + 2.0, curvature + 4.0
            direction = gradient / curvature
            least = 0.0 if positive else -math.inf
            tried = (0.5**halves for halves in range(20))
            length = next(x for x in tried if least < 0.5 + x * direction < 1.0)
            lengths.add(round(math.log2(length)))
            split = np.full(1, 0.5)
            assert barrier_step(np.eye(1), split, np.array([slope]), weight, positive)
            wanted = 0.5 + (0.9 * length if length < 1.0 else length) * direction
            assert split[0] == pytest.approx(wanted, rel=1e-9)
    assert len(lengths) >= 5


def test_a_step_that_cannot_be_told_leaves_the_split_as_it_is():
    for n in (2, 50):
        split = np.full(n, 0.5)
        for slopes in (np.full(n, math.inf), np.where(np.arange(n) == 1, math.nan, 1.0)):
            assert not barrier_step(np.eye(n), split, slopes, 0.1, True)
            assert (split == 0.5).all()


@pytest.mark.parametrize("kind", ["random", "gradient", "hessian", "zeros", "wide"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_certificate_proves_what_the_relaxation_has_found(program, kind):
    """In the units of the block, less next to nothing; weights of zero have no shift to prove."""
    problem = replace(block(kind, 8, 4, seed=2), damping=0.5)
    for rounds in (0, 3):
        form, (found, *_) = relaxed(problem, program, split_rounds=rounds)
        certificate, keep = relax_with_split(problem, program, math.inf, rounds)
        assert keep.sum() == 4
        assert certificate.lower_bound(problem) == pytest.approx(found * form.scale, rel=1e-5)
        if program == "selection":
            assert (certificate.shift[problem.weights == 0.0] <= 0.0).all()


def test_without_damping_the_first_split_is_nearly_the_least_eigenvalue():
    rows = np.random.default_rng(3).normal(size=(12, 5))
    for damping in (0.0, 1e-9):
        problem = BlockProblem(weights=np.ones(5), rows=rows, damping=damping, n_prune=2)
        form = joint_form(problem)
        split, lowest = joint_split(problem, form), float(np.linalg.eigvalsh(form.matrix)[0])
        assert np.ptp(split) == 0.0 if damping == 0.0 else (split < 1e-8).all()
        if damping == 0.0:
            assert split[0] == pytest.approx(0.99 * lowest, rel=1e-9)


def test_a_weight_too_small_to_be_squared_is_left_without_a_positive_shift():
    """A negative one it may have, in the units of the loss."""
    problem = BlockProblem(weights=np.array([1e-80, 1.0, 2.0]), rows=np.eye(3), damping=1.0, n_prune=1)
    form = selection_form(problem)
    for first, wanted in ((1e-3, 0.0), (-1e-3, -1e-3 * form.scale)):
        shift = np.array([first, 0.01, 0.01])
        certificate = selection_certificate(problem, form, np.full(3, 1.0 / 3.0), shift)
        assert certificate.shift[0] == pytest.approx(wanted, rel=1e-12, abs=0.0)
        np.testing.assert_allclose(certificate.shift[1:], shift[1:] * form.scale, rtol=1e-9)
        assert math.isfinite(certificate.lower_bound(problem))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_start_is_in_the_units_of_the_block_and_stays_where_it_is_good_enough(program):
    problem = block("gradient", 8, 4, seed=3)
    found, _ = relax_with_split(problem, program, math.inf, 0)
    start = found.point * np.linspace(0.95, 1.05, 8)
    proved = replace(found, point=start).lower_bound(problem)
    cutoff = proved - 1e-6 * abs(proved)
    assert proved < found.lower_bound(problem)
    again, _ = relax_with_split(problem, program, cutoff, 0, start=start)
    np.testing.assert_allclose(again.point, start, rtol=1e-12)


def test_a_damping_is_shrunk_before_it_is_scaled_and_after():
    problem = block("random", 8, 4, seed=2)
    certificate, _ = relax_with_split(problem, "joint", math.inf, 0)
    np.testing.assert_allclose(certificate.split, problem.damping * (1.0 - 2e-9), rtol=1e-12)
