"""Steps of the two solvers of the relaxations: which entries move where, and that they end at the optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest

from formulations.relaxations import ascent
from formulations.relaxations import capped_simplex_kernels as simplex
from formulations.relaxations import perspective_kernels as perspective
from tests.formulations.test_kernels import half_support_norm


def test_entries_are_named_by_where_they_lie():
    guess = np.array([0.0, 5e-10, 0.5, 1.0 - 5e-10, 1.0, 0.25, 1e-6, 1.0 - 1e-6])
    place = np.full(8, -7, dtype=np.int64)
    simplex.places_of(guess, place)
    zero, one, inside = simplex.AT_ZERO, simplex.AT_ONE, simplex.INSIDE
    assert place.tolist() == [zero, zero, inside, one, one, inside, inside, inside]


@pytest.mark.parametrize(
    ("before", "point", "slope", "after"),
    [
        (simplex.INSIDE, 0.5, 2.0, simplex.INSIDE),
        (simplex.INSIDE, -1e-6, 2.0, simplex.AT_ZERO),
        (simplex.INSIDE, 1.0 + 1e-6, 2.0, simplex.AT_ONE),
        (simplex.AT_ZERO, 0.0, 2.1, simplex.AT_ZERO),
        (simplex.AT_ZERO, 0.0, 1.9, simplex.INSIDE),
        (simplex.AT_ZERO, 0.0, 2.0 - 1e-12, simplex.AT_ZERO),
        (simplex.AT_ONE, 1.0, 1.9, simplex.AT_ONE),
        (simplex.AT_ONE, 1.0, 2.1, simplex.INSIDE),
        (simplex.AT_ONE, 1.0, 2.0 + 1e-12, simplex.AT_ONE),
    ],
)
@pytest.mark.parametrize("where", [0, 2])
def test_an_entry_moves_where_the_optimum_wants_it(before, point, slope, after, where):
    """Others are where they belong; the multiplier of the sum is 2."""
    points, slopes = np.full(3, 0.5), np.full(3, 2.0)
    place = np.full(3, simplex.INSIDE, dtype=np.int64)
    points[where], slopes[where], place[where] = point, slope, before
    wanted = place.copy()
    wanted[where] = after
    assert simplex.move_places(points, slopes, 2.0, place) == int(before != after)
    assert place.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("before", "part", "residual", "after"),
    [
        (perspective.SHARED, 0.5, 2.0, perspective.SHARED),
        (perspective.SHARED, -1e-3, 2.0, perspective.ZERO),
        (perspective.SHARED, 2.001, 2.0, perspective.WHOLE),
        (perspective.SHARED, 1.999, 2.0, perspective.SHARED),
        (perspective.ZERO, 0.0, 1.999, perspective.ZERO),
        (perspective.ZERO, 0.0, 2.001, perspective.SHARED),
        (perspective.ZERO, 0.0, -2.001, perspective.SHARED),
        (perspective.WHOLE, 2.5, 2.001, perspective.WHOLE),
        (perspective.WHOLE, 2.5, -2.001, perspective.WHOLE),
        (perspective.WHOLE, 2.5, 1.999, perspective.SHARED),
    ],
)
@pytest.mark.parametrize("where", [0, 4])
def test_an_entry_is_whole_shared_or_zero_as_the_optimum_wants_it(before, part, residual, after, where):
    """The level is 2: whole entries have more, zero ones less, and shares lie between 0 and it."""
    place = np.array([perspective.SHARED] * 5, dtype=np.int64)
    point, residuals, sign = np.full(5, -0.5), np.full(5, -2.0), np.full(5, -1.0)
    place[where], residuals[where] = before, residual
    sign[where] = 1.0
    point[where] = part
    wanted = place.copy()
    wanted[where] = after
    assert perspective.move_support(point, residuals, 2.0, 4, place, sign) == int(before != after)
    assert place.tolist() == wanted.tolist()
    entered = after == perspective.SHARED and before != after
    assert sign[where] == (math.copysign(1.0, residual) if entered else 1.0)


def test_without_a_share_the_level_lies_between_whole_and_zero_entries():
    whole, zero, shared = perspective.WHOLE, perspective.ZERO, perspective.SHARED

    def moved(residual, size=4):
        place, sign = np.array([whole, whole, zero, zero], dtype=np.int64), np.ones(4)
        count = perspective.move_support(np.ones(4), np.array(residual), 0.0, size, place, sign)
        return count, place.tolist(), sign.tolist()

    assert moved([3.0, -2.0, 1.0, -1.9])[:2] == (0, [whole, whole, zero, zero])
    # Between 2 and 4: the whole entry of 2 and the zero one of -4 share.
    count, place, sign = moved([5.0, 2.0, 1.0, -4.0])
    assert (count, place) == (2, [whole, shared, zero, shared])
    assert sign == [1.0, 1.0, 1.0, -1.0]


def test_the_smallest_whole_entries_give_up_a_unit_to_share():
    whole, shared = perspective.WHOLE, perspective.SHARED
    residual = np.array([3.0, -2.5, 4.0, 2.0, 2.0])
    place, sign = np.array([whole, whole, whole, shared, shared], dtype=np.int64), np.ones(5)
    point = np.array([3.0, -2.5, 4.0, 1.0, 1.0])
    assert perspective.move_support(point, residual, 2.0, 2, place.copy(), sign.copy()) == 2
    now = place.copy()
    perspective.move_support(point, residual, 2.0, 3, now, sign)
    assert now.tolist() == [whole, shared, whole, shared, shared]
    assert sign.tolist() == [1.0, -1.0, 1.0, 1.0, 1.0]
    # A share that becomes whole makes one whole entry too many: it is the smallest itself.
    now, point = place.copy(), np.array([3.0, -2.5, 4.0, 2.4, 1.0])
    assert perspective.move_support(point, residual, 2.0, 4, now, np.ones(5)) == 2
    assert now.tolist() == [whole, whole, whole, shared, shared]
    assert perspective.move_support(point, residual, 2.0, 5, now, np.ones(5)) == 1
    assert now.tolist() == [whole, whole, whole, whole, shared]


def singular(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A semidefinite matrix of low rank, on which active sets go round in circles, and a linear term."""
    rng = np.random.default_rng([seed, 41])
    n = int(rng.integers(6, 10))
    rows = rng.normal(size=(int(rng.integers(2, n)), n)) * 10.0 ** rng.uniform(0, 1)
    rows *= 10.0 ** rng.uniform(-0.5, 0.5, n)
    return rows.T @ rows, rng.normal(size=n) * 10.0 ** rng.uniform(0, 1.5), int(rng.integers(2, n - 1))


def given_perspective(seed: int, **changes):
    """Arguments of the solver of the perspective relaxation on such a matrix."""
    smooth, linear, size = singular(seed)
    given = {"cutoff": math.inf, "max_steps": 300, "tolerance": 1e-5} | changes
    start = given.pop("start", np.zeros(linear.size))
    return smooth, linear, size, start, *given.values()


def solved_perspective(seed: int, **changes):
    given = given_perspective(seed, **changes)
    return *given[:3], perspective.solve_perspective(*given)


def given_simplex(seed: int, **changes):
    """Arguments of the solver of the relaxation over the capped simplex on such a matrix."""
    smooth, linear, count = singular(seed)
    scale = float(np.diagonal(smooth).mean())
    smooth, linear = smooth / scale, 3.0 * linear / np.abs(linear).max()
    given = {"cutoff": math.inf, "max_steps": 300, "tolerance": 1e-5} | changes
    start = given.pop("start", np.full(linear.size, count / linear.size))
    metric = simplex.METRIC_SHARE * (np.diagonal(smooth) + simplex.METRIC_FLOOR)
    return smooth, linear, count, metric, start, *given.values()


def solved_simplex(seed: int, **changes):
    given = given_simplex(seed, **changes)
    return *given[:3], simplex.solve_capped_simplex(*given)


@pytest.mark.parametrize(
    ("value", "error", "lifts"),
    [
        (1.0 + 1e-9, 1e-6, True),
        (1.0, 1e-6, False),
        (1.0 - 1e-9, 1e-6, False),
        (1.0 + 1e-9, 9e-4, True),
        (1.0 - 1e-9, 2e-9, False),
        (1.0 + 1e-3, 1.1e-3, False),
        (1.5, 1.0, False),
        (2.0 + 1e-6, 1.0, True),
        (1.0 - 9e-7, 1e-12, True),
        (1.0 - 1.1e-6, 1e-12, False),
        (1.0 - 9e-7, 0.0, True),
    ],
)
def test_points_whose_rounding_is_unlike_are_compared_by_what_they_prove(value, error, lifts):
    """The best bound is 1, with a rounding of a millionth."""
    figures = np.full(3, math.nan)
    figures[ascent.BEST], figures[ascent.BLUR] = 1.0, 1e-6
    assert ascent.rises(figures, value, error) == lifts
    figures[ascent.BLUR] = 0.25
    assert not ascent.rises(figures, 0.75, 0.0)


@pytest.mark.parametrize(
    ("gain", "cutoff", "idle", "after", "ended"),
    [
        (0.25, 3.0, 5, 0, False),
        (0.15, 3.0, 5, 6, False),
        (0.15, math.inf, 5, 0, False),
        (0.05, math.inf, 5, 6, False),
        (0.05, math.inf, 7, 8, True),
    ],
)
def test_a_climb_is_idle_that_gains_less_than_its_share_of_the_open_gap(gain, cutoff, idle, after, ended):
    """The bound is 1 and the tolerance a tenth: of what is open to the cutoff, or of the bound."""

    def climbed(outcome=ascent.GIVEN_UP, steps=6, cutoff=cutoff, max_steps=300):
        figures, counts = np.zeros(3), np.zeros(4, dtype=np.int64)
        figures[ascent.BEST], figures[ascent.PREVIOUS] = 1.0, 1.0 - gain
        counts[ascent.STEPS], counts[ascent.STALLED], counts[ascent.MISSES] = steps, idle, 3
        ascent.end_climb(figures, counts, outcome, cutoff, 0.1, max_steps)
        assert figures[ascent.PREVIOUS] == 1.0
        assert counts[ascent.MISSES] == 0
        return counts[ascent.STALLED], counts[ascent.PHASE] == ascent.ENDED

    assert climbed() == (after, ended)
    assert climbed(steps=0) == (idle, False)
    assert climbed(outcome=ascent.OPTIMAL)[1]
    assert climbed(max_steps=6)[1]
    assert climbed(cutoff=1.0)[1]


@pytest.mark.parametrize("program", ["joint", "selection"])
def test_the_best_bound_and_its_rounding_are_those_of_its_point_after_every_step(program):
    climbing, splitting = 0, 0
    for seed in (2, 5, 18):
        if program == "joint":
            given = given_perspective(seed)
            state = perspective.begin_perspective(*given)
            inverse = perspective.invert_perspective(state)
            advance, error_of = perspective.advance_perspective, perspective.dual_rounding
        else:
            given = given_simplex(seed)
            state = simplex.begin_simplex(*given)
            inverse = simplex.invert_simplex(state)
            advance, error_of = simplex.advance_simplex, simplex.linearisation_rounding
        smooth, linear, size = given[:3]
        best_before, blur_before = state.figures[ascent.BEST], state.figures[ascent.BLUR]
        while state.counts[ascent.PHASE] != ascent.ENDED:
            climbing += state.counts[ascent.PHASE] == ascent.CLIMBING
            splitting += state.counts[ascent.PHASE] == ascent.SPLITTING
            slope = state.residual if program == "joint" else state.slope
            best, blur = state.figures[ascent.BEST], state.figures[ascent.BLUR]
            product = smooth @ state.point
            if program == "joint":
                value = perspective.dual_value(state.point, product, linear, np.ones(linear.size), size)
            else:
                value = simplex.smallest_sum(product + linear, size) - 0.5 * float(state.point @ product)
            assert best == pytest.approx(value, abs=2.0 * blur)
            assert blur == pytest.approx(error_of(smooth, linear, state.point, slope, size), rel=1e-9)
            unlike = max(blur, blur_before) > ascent.UNLIKE * min(blur, blur_before)
            assert best - blur >= best_before - blur_before if unlike else best >= best_before
            best_before, blur_before = best, blur
            advance(state, inverse, 1)
    assert min(climbing, splitting) > 0


@pytest.mark.parametrize("solved", [solved_perspective, solved_simplex])
def test_a_bound_is_what_its_point_proves_and_not_its_rounding(solved):
    """Where more entries are active than the rank, Newton points may be 1e13 and their values noise."""
    for seed in range(8):
        smooth, linear, size, (bound, point, slope, _) = solved(seed)
        assert np.abs(point).max() <= 1e6
        if solved is solved_perspective:
            value = perspective.dual_value(point, smooth @ point, linear, np.ones(linear.size), size)
            error = perspective.dual_rounding(smooth, linear, point, slope, size)
            np.testing.assert_allclose(slope, linear - smooth @ point, atol=1e-9 * np.abs(linear).max())
        else:
            value = float(-0.5 * point @ smooth @ point) + simplex.smallest_sum(smooth @ point + linear, size)
            error = simplex.linearisation_rounding(smooth, linear, point, slope, size)
            np.testing.assert_allclose(slope, linear + smooth @ point, atol=1e-9 * np.abs(linear).max())
        assert bound == pytest.approx(value, abs=2.0 * error)
        assert error <= 1e-9 * max(1.0, abs(value))


@pytest.mark.parametrize("solved", [solved_perspective, solved_simplex])
def test_a_start_that_reaches_the_cutoff_is_returned_with_its_own_bound(solved):
    for seed in range(4):
        start = np.random.default_rng(seed).normal(size=singular(seed)[1].size)
        smooth, linear, size, (bound, point, _, steps) = solved(seed, cutoff=-math.inf, start=start)
        assert steps == 0
        assert point.tolist() == start.tolist()
        quadratic = -0.5 * float(start @ smooth @ start)
        if solved is solved_perspective:
            squares = np.sort((linear - smooth @ start) ** 2)
            assert bound == pytest.approx(quadratic - 0.5 * float(squares[-size:].sum()), rel=1e-9)
        else:
            slopes = np.sort(linear + smooth @ start)
            assert bound == pytest.approx(quadratic + float(slopes[:size].sum()), rel=1e-9)


def primal(solved, smooth, linear, size, point) -> float:
    """Value of the relaxation at a point: none lies below the bound."""
    if solved is solved_perspective:
        quadratic = 0.5 * float(point @ smooth @ point)
        return quadratic - float(linear @ point) + half_support_norm(point, size)
    image = np.empty(linear.size)
    simplex.project_capped_simplex(point, np.ones(linear.size), size, image)
    return float(0.5 * image @ smooth @ image + linear @ image)


@pytest.mark.parametrize(
    ("solved", "seed", "gap", "lost"),
    [
        *((solved_perspective, seed, 1e-9, 0.0) for seed in (0, 2, 8, 14)),
        *((solved_perspective, seed, 1e-9, lost) for seed, lost in ((136, 5e-4), (298, 5e-3))),
        *((solved_simplex, seed, 1e-9, 0.0) for seed in (0, 1, 5, 7, 12)),
        (solved_simplex, 4, 1e-5, 1e-8),
        (solved_simplex, 18, 1e-3, 1e-4),
    ],
)
def test_where_active_sets_go_round_in_circles_other_steps_lead_to_the_optimum(solved, seed, gap, lost):
    """`lost`: what a tolerance of 1 leaves, as it gives up after eight climbs of no great gain."""
    smooth, linear, size, (bound, point, _, steps) = solved(seed)
    value = primal(solved, smooth, linear, size, point)
    size_of = gap * abs(value)
    assert bound <= value + 1e-9 * abs(value)
    assert bound >= value - size_of
    assert 0 < steps < 300
    early = solved(seed, tolerance=1.0)[3]
    assert early[3] <= steps
    assert bound - early[0] >= lost * abs(value)
    # The start is not the optimum, and a cutoff below it ends the search.
    first = solved(seed, max_steps=0)[3]
    assert first[3] == 0
    assert first[0] <= bound
    enough = solved(seed, cutoff=first[0])[3]
    assert enough[3] == 0


@pytest.mark.parametrize("solved", [solved_perspective, solved_simplex])
def test_a_relaxation_that_gains_next_to_nothing_is_left_as_it_is(solved):
    """After eight climbs in a row, six steps each: no gain meets a tolerance of 1e9."""
    seed = 51 if solved is solved_perspective else 18
    assert solved(seed, tolerance=1e9)[3][3] <= 54
    assert solved(seed, tolerance=1e9, max_steps=20)[3][3] == 20
