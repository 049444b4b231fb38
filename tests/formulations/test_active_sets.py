"""Steps of the two solvers of the relaxations: which entries move where, and that they end at the optimum."""

from __future__ import annotations

import math
from types import SimpleNamespace

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
            assert blur == pytest.approx(
                error_of(smooth, linear, state.point, slope, size), rel=1e-9, abs=0.0
            )
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
            assert bound == pytest.approx(quadratic - 0.5 * float(squares[-size:].sum()), rel=1e-9, abs=0.0)
        else:
            slopes = np.sort(linear + smooth @ start)
            assert bound == pytest.approx(quadratic + float(slopes[:size].sum()), rel=1e-9, abs=0.0)


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


@pytest.mark.parametrize(
    ("best", "blur", "value", "error", "lifts"),
    [
        # Errors that differ by the factor itself are alike: the larger value wins.
        (1.0, 2.0**-20, 1.0 + 2.0**-30, 1000.0 * 2.0**-20, True),
        (1.0, 1000.0 * 2.0**-20, 1.0 - 2.0**-30, 2.0**-20, False),
        (1.0, 2.0**-20, 1.0 + 2.0**-30, 1001.0 * 2.0**-20, False),
        (1.0, 1001.0 * 2.0**-20, 1.0 - 2.0**-30, 2.0**-20, True),
        # A value that is no larger lifts nothing, nor does one that proves no more.
        (1.0, 2.0**-20, 1.0, 2.0**-20, False),
        (1.0, 2.0**-20, 1.5 - 2.0**-20, 0.5, False),
        (1.0, 2.0**-20, 1.5, 0.5, True),
    ],
)
def test_what_lifts_nothing_is_not_taken(best, blur, value, error, lifts):
    figures = np.array([best, math.nan, blur])
    assert ascent.rises(figures, value, error) == lifts


@pytest.mark.parametrize(
    ("best", "before", "cutoff", "idle"),
    [
        (1.0, 0.75, math.inf, False),
        (1.0, 0.76, math.inf, True),
        (-1.0, -1.25, math.inf, False),
        (-1.0, -1.24, math.inf, True),
        (2.0, 1.75, 3.0, False),
        (2.0, 1.75, 3.125, True),
        (-2.0, -2.25, -1.0, False),
        (-2.0, -2.25, -0.5, True),
    ],
)
def test_a_gain_of_the_very_share_that_is_asked_for_is_enough(best, before, cutoff, idle):
    figures, counts = np.array([best, before, 0.0]), np.zeros(4, dtype=np.int64)
    counts[ascent.STEPS], counts[ascent.STALLED] = 6, 3
    ascent.end_climb(figures, counts, ascent.GIVEN_UP, cutoff, 0.25, 300)
    assert counts[ascent.STALLED] == (4 if idle else 0)
    assert counts[ascent.PHASE] == ascent.SPLITTING


@pytest.mark.parametrize(
    ("steps", "best", "most", "phase"),
    [
        (0, 1.0, 300, ascent.SPLITTING),
        (4, 1.0, 300, ascent.SPLITTING),
        (5, 1.0, 300, ascent.CLIMBING),
        (6, 1.0, 300, ascent.SPLITTING),
        (11, 1.0, 300, ascent.CLIMBING),
        (8, 1.0, 9, ascent.CLIMBING),
        (7, 1.0, 9, ascent.SPLITTING),
        (7, 2.0, 9, ascent.ENDED),
        (7, 3.0, 9, ascent.ENDED),
        (5, 2.0, 9, ascent.CLIMBING),
    ],
)
def test_a_climb_follows_six_steps_the_last_or_none_once_the_cutoff_is_met(steps, best, most, phase):
    counts = np.array([ascent.SPLITTING, steps, 0, 0])
    ascent.end_step(np.array([best, 0.0, 0.0]), counts, 2.0, most)
    assert counts.tolist() == [phase, steps + 1, 0, 0]


@pytest.mark.parametrize(("n", "work"), [(2, 125_000_000), (100, 1000), (1000, 1), (3000, 1)])
def test_between_two_looks_at_the_clock_lies_so_much_work(monkeypatch, n, work):
    """Phases: two climbs, ADMM with its inverse, a climb, the end; a step takes its number of seconds."""
    now, told, asked = 0.0, [], []
    state = SimpleNamespace(linear=np.zeros(n), counts=np.zeros(4, dtype=np.int64))
    phases = [ascent.CLIMBING, ascent.SPLITTING, ascent.SPLITTING, ascent.CLIMBING, ascent.ENDED]
    lasted = iter([1.0, 2.0, 7.0, 3.0, 1.0, 1.0])
    monkeypatch.setattr(ascent.time, "perf_counter", lambda: now)

    def advance(_, inverse, work):
        nonlocal now
        now += next(lasted)
        told.append((inverse.size, work))
        state.counts[ascent.PHASE] = phases.pop(0)

    def invert(_):
        nonlocal now
        now += next(lasted)
        told.append("inverse")
        return np.ones((3, 3))

    def stopped(ahead):
        asked.append(ahead)
        return False

    ascent.ascend(state, advance, invert, stopped)
    assert told == [(0, work), (0, work), "inverse", (9, work), (9, work), (9, work)]
    assert asked == [ascent.SHARE_AHEAD * longest for longest in (0.0, 1.0, 2.0, 7.0, 7.0, 7.0)]
    state.counts[ascent.PHASE] = ascent.CLIMBING
    ascent.ascend(state, advance, invert, lambda ahead: True)
    assert len(told) == 6


def begun(program: str, seed: int, **changes):
    """A state before its first step, and the kernels that move it."""
    if program == "joint":
        state = perspective.begin_perspective(*given_perspective(seed, **changes))
        return state, perspective.newton_step, perspective.admm_step, perspective.invert_perspective
    state = simplex.begin_simplex(*given_simplex(seed, **changes))
    return state, simplex.newton_step, simplex.admm_step, simplex.invert_simplex


def value_of(program: str, state, point) -> float:
    """The bound that a point proves."""
    product = state.smooth @ point
    quadratic = -0.5 * float(point @ product)
    if program == "joint":
        return quadratic - 0.5 * float(np.sort((state.linear - product) ** 2)[-state.size :].sum())
    return quadratic + float(np.sort(product + state.linear)[: state.n_prune].sum())


def blur_of(program: str, state, point) -> float:
    """The rounding of that bound."""
    if program == "joint":
        residual = state.linear - state.smooth @ point
        return perspective.dual_rounding(state.smooth, state.linear, point, residual, state.size)
    slope = state.linear + state.smooth @ point
    return simplex.linearisation_rounding(state.smooth, state.linear, point, slope, state.n_prune)


def held(program: str, state):
    """The vector kept beside the point: residual or slope, as it should be."""
    product = state.smooth @ state.point
    return (
        (state.residual, state.linear - product)
        if program == "joint"
        else (state.slope, state.linear + product)
    )


PROGRAMS = ("joint", "selection")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_newton_step_that_lifts_the_bound_is_taken_and_others_are_counted(program):
    lifted, missed = 0, 0
    for seed in range(24):
        start = 3.0 * np.random.default_rng(seed).normal(size=singular(seed)[1].size)
        state, newton_step, _, _ = begun(program, seed, start=start)
        for step in range(5):
            misses = (seed + step) % 4
            state.counts[ascent.MISSES] = misses
            places, before = state.place.copy(), state.figures[ascent.BEST]
            outcome = newton_step(state)
            moved = not np.array_equal(places, state.place)
            vector, wanted = held(program, state)
            np.testing.assert_allclose(vector, wanted, atol=1e-9 * (1.0 + np.abs(wanted).max()))
            if state.figures[ascent.BEST] > before:
                lifted += 1
                assert state.counts[ascent.MISSES] == 0
                blur = blur_of(program, state, state.point)
                assert state.figures[ascent.BLUR] == pytest.approx(blur, rel=1e-9, abs=0.0)
                value = value_of(program, state, state.point)
                assert state.figures[ascent.BEST] == pytest.approx(value, abs=2.0 * blur)
            elif outcome != ascent.GIVEN_UP or moved:
                missed += 1
                assert state.counts[ascent.MISSES] == misses + 1
            if not moved:
                assert outcome != ascent.ONGOING
                break
            if outcome != ascent.OPTIMAL:
                given_up = state.counts[ascent.MISSES] >= ascent.NEWTON_MISSES
                assert (outcome == ascent.GIVEN_UP) == given_up
    assert min(lifted, missed) >= 4


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_newton_step_ends_at_the_cutoff_and_not_before(program):
    for seed in (0, 2, 5):
        state, newton_step, _, _ = begun(program, seed)
        # So good a bound is not lifted; it is met by a cutoff of its own.
        state.figures[ascent.BEST], state.figures[ascent.BLUR] = 1e30, 1e-30
        point = state.point.copy()
        for cutoff, outcome in ((1e30, ascent.OPTIMAL), (math.nextafter(1e30, math.inf), ascent.ONGOING)):
            again = state._replace(
                cutoff=cutoff, counts=np.zeros(4, dtype=np.int64), place=state.place.copy()
            )
            assert newton_step(again) == outcome
            assert state.point.tolist() == point.tolist()
            assert state.figures.tolist()[ascent.BEST] == 1e30


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", range(6))
def test_a_step_of_admm_is_that_of_the_textbook(program, seed):
    """Over-relaxed, with a scaled dual: Boyd et al. (2011), section 3.4.3."""
    state, _, admm_step, invert = begun(program, seed)
    n = state.linear.size
    rng = np.random.default_rng([seed, 42])
    joint = program == "joint"
    guess, dual = (state.shrunk if joint else state.guess), state.dual
    guess[:], dual[:] = rng.random(n), rng.normal(size=n)
    metric = np.ones(n) if joint else state.metric
    inverse = invert(state)
    np.testing.assert_allclose(inverse @ (state.smooth + np.diag(metric)), np.eye(n), atol=1e-8)
    linear = -state.linear if joint else state.linear
    solved = np.linalg.solve(state.smooth + np.diag(metric), metric * (guess - dual) - linear)
    relaxed = ascent.OVER_RELAXATION * solved + (1.0 - ascent.OVER_RELAXATION) * guess
    target, image = relaxed + dual, np.empty(n)
    if joint:
        perspective.prox_support_norm(target, state.size, 1.0, np.empty(n, dtype=np.int64), image)
    else:
        simplex.project_capped_simplex(target, metric, state.n_prune, image)
    value, blur = value_of(program, state, solved), blur_of(program, state, solved)
    for best, taken in (
        (value - 1e-6 * (1.0 + abs(value)), True),
        (value + 1e-6 * (1.0 + abs(value)), False),
    ):
        now = state._replace(
            figures=np.array([best, 0.0, blur]),
            point=np.zeros(n),
            **{
                name: getattr(state, name).copy()
                for name in (("shrunk",) if joint else ("guess",)) + ("dual",)
            },
        )
        admm_step(now, inverse)
        np.testing.assert_allclose(now.shrunk if joint else now.guess, image, atol=1e-7)
        np.testing.assert_allclose(now.dual, dual + relaxed - image, atol=1e-7)
        if not taken:
            assert not now.point.any()
            assert now.figures.tolist() == [best, 0.0, blur]
            continue
        np.testing.assert_allclose(now.point, solved, atol=1e-7 * (1.0 + np.abs(solved).max()))
        assert now.figures[ascent.BEST] == pytest.approx(value, abs=1e-7 * (1.0 + abs(value)))
        assert now.figures[ascent.BLUR] == pytest.approx(blur, rel=1e-6, abs=0.0)
        vector, wanted = held(program, now)
        np.testing.assert_allclose(vector, wanted, atol=1e-9 * (1.0 + np.abs(wanted).max()))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_point_whose_value_rests_on_a_bad_inverse_is_computed_anew(program):
    """An inverse that is off by a thousandth: the bound stays what its point proves."""
    for seed in range(6):
        state, _, admm_step, invert = begun(program, seed)
        n = state.linear.size
        (state.shrunk if program == "joint" else state.guess)[:] = 0.5
        state.dual[:] = 0.0
        state.figures[ascent.BEST] = -1e6
        admm_step(state, 1.001 * invert(state))
        value, blur = value_of(program, state, state.point), blur_of(program, state, state.point)
        assert state.figures[ascent.BEST] == pytest.approx(value, abs=2.0 * blur)
        vector, wanted = held(program, state)
        np.testing.assert_allclose(vector, wanted, atol=1e-12 * (1.0 + np.abs(wanted).max()) * n)
        # Where only the inexact value is better, nothing is taken.
        best = value + 1e-9 * (1.0 + abs(value))
        now = state._replace(figures=np.array([best, 0.0, blur]))
        (now.shrunk if program == "joint" else now.guess)[:] = 0.5
        now.dual[:] = 0.0
        admm_step(now, 1.001 * invert(state))
        assert now.figures.tolist() == [best, 0.0, blur]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_state_is_begun_with_the_bound_of_its_start_and_the_sets_of_its_projection(program):
    for seed in range(6):
        state = begun(program, seed)[0]
        n = state.linear.size
        value, blur = value_of(program, state, state.point), blur_of(program, state, state.point)
        assert state.figures[ascent.BEST] == pytest.approx(value, abs=2.0 * blur)
        assert state.figures[ascent.BLUR] == pytest.approx(blur, rel=1e-9, abs=0.0)
        assert not state.counts.any()
        vector, wanted = held(program, state)
        np.testing.assert_allclose(vector, wanted)
        image, order = np.empty(n), np.empty(n, dtype=np.int64)
        if program == "joint":
            left, right = perspective.prox_support_norm(state.point + vector, state.size, 1.0, order, image)
            names = np.full(n, perspective.ZERO)
            names[order[:right]] = perspective.SHARED
            names[order[:left]] = perspective.WHOLE
            assert np.array_equal(np.sign(image)[order[:right]], state.sign[order[:right]])
        else:
            simplex.project_capped_simplex(state.point, state.metric, state.n_prune, image)
            names = np.where(image <= 1e-9, simplex.AT_ZERO, simplex.INSIDE)
            names[image >= 1.0 - 1e-9] = simplex.AT_ONE
        assert state.place.tolist() == names.tolist()
        ended = begun(program, seed, cutoff=float(state.figures[ascent.BEST]))[0]
        assert ended.counts[ascent.PHASE] == ascent.ENDED
        above = begun(program, seed, cutoff=math.nextafter(float(state.figures[ascent.BEST]), math.inf))[0]
        assert above.counts[ascent.PHASE] == ascent.CLIMBING


@pytest.mark.parametrize("program", PROGRAMS)
def test_work_is_counted_in_steps_and_admm_starts_from_where_the_climb_has_ended(program):
    advance = perspective.advance_perspective if program == "joint" else simplex.advance_simplex
    seen = 0
    for seed in (2, 5, 18):
        state, _, _, invert = begun(program, seed)
        other = begun(program, seed)[0]
        none = np.empty((0, 0))
        advance(state, none, 0)
        assert not state.counts.any()
        climbs = 0
        while other.counts[ascent.PHASE] == ascent.CLIMBING:
            advance(other, none, 1)
            climbs += 1
        # So many steps at once are the same ones, and more wait for the inverse.
        advance(state, none, climbs - 1)
        assert state.counts[ascent.PHASE] == ascent.CLIMBING
        advance(state, none, 10)
        assert state.counts.tolist() == other.counts.tolist()
        assert state.figures.tolist() == other.figures.tolist()
        if state.counts[ascent.PHASE] != ascent.SPLITTING:
            continue
        seen += 1
        n = state.linear.size
        if program == "joint":
            assert state.shrunk.tolist() == state.point.tolist()
            assert state.dual.tolist() == state.residual.tolist()
        else:
            image = np.empty(n)
            simplex.project_capped_simplex(state.point, state.metric, state.n_prune, image)
            np.testing.assert_allclose(state.guess, image)
            np.testing.assert_allclose(state.dual, -state.slope / state.metric)
        advance(state, invert(state), 2)
        assert state.counts[ascent.STEPS] == 2
        dual = state.dual.copy()
        advance(state, invert(state), 4)
        assert state.counts[ascent.PHASE] == ascent.CLIMBING
        assert not np.array_equal(state.dual, dual)
        if program == "selection":
            names = np.empty(n, dtype=np.int64)
            simplex.places_of(state.guess, names)
            assert state.place.tolist() == names.tolist()
        # A second climb leaves what ADMM has come to.
        dual = state.dual.copy()
        while state.counts[ascent.PHASE] == ascent.CLIMBING:
            advance(state, none, 1)
        assert state.dual.tolist() == dual.tolist()
    assert seen


@pytest.mark.parametrize("level", [1e-6, 1.0, 1e7])
@pytest.mark.parametrize(("share", "moves"), [(1e-14, False), (1e-12, False), (1e-6, True)])
def test_what_differs_from_the_level_by_rounding_stays_where_it_is(level, share, moves):
    """A difference is set against the level itself, whatever the units."""
    zero, shared, whole = perspective.ZERO, perspective.SHARED, perspective.WHOLE
    for place, part, residual in (
        (shared, -share * level, level),
        (shared, (1.0 + share) * level, level),
        (zero, 0.0, (1.0 + share) * level),
        (whole, 2.0 * level, (1.0 - share) * level),
    ):
        places = np.array([place, shared, shared], dtype=np.int64)
        point = np.array([part, 0.5 * level, 0.5 * level])
        residuals = np.array([residual, level, level])
        assert perspective.move_support(point, residuals, level, 3, places, np.ones(3)) == int(moves)
        assert (places[0] != place) == moves


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e7])
def test_without_a_share_whole_and_zero_entries_are_compared_up_to_rounding(unit):
    zero, shared, whole = perspective.ZERO, perspective.SHARED, perspective.WHOLE
    for largest, moved in ((1.0, 0), (1.0 + 1e-14, 0), (1.0 + 1e-8, 2)):
        places, residual = np.array([whole, zero], dtype=np.int64), unit * np.array([1.0, largest])
        found = perspective.move_support(np.zeros(2), residual, 0.0, 2, places, np.ones(2))
        assert found == moved
        assert places.tolist() == ([shared, shared] if moved else [whole, zero])


def test_a_whole_entry_that_shares_leaves_its_unit():
    """Two whole entries of a size of 2: once one shares, a unit is left and the other stays whole."""
    whole, shared = perspective.WHOLE, perspective.SHARED
    places = np.array([whole, whole, shared, shared], dtype=np.int64)
    residual = np.array([3.0, 1.0, 2.0, 2.0])
    found = perspective.move_support(np.array([3.0, 1.0, 1.0, 1.0]), residual, 2.0, 2, places, np.ones(4))
    assert found == 1
    assert places.tolist() == [whole, shared, shared, shared]


@pytest.mark.parametrize("multiplier", [-1e7, -2.0, 0.0, 2.0, 1e7])
def test_a_slope_that_differs_from_the_multiplier_by_rounding_moves_nothing(multiplier):
    unit = 1.0 + abs(multiplier)
    zero, one, inside = simplex.AT_ZERO, simplex.AT_ONE, simplex.INSIDE
    for place, sign in ((zero, -1.0), (one, 1.0)):
        for share, moved in ((1e-13, 0), (1e-12, 0), (1e-9, 1), (1e-3, 1), (-1e-3, 0)):
            places = np.array([place, inside], dtype=np.int64)
            slopes = np.array([multiplier + sign * share * unit, multiplier])
            assert simplex.move_places(np.array([0.0, 0.5]), slopes, multiplier, places) == moved
            assert (places[0] == inside) == bool(moved)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_a_system_that_is_singular_up_to_rounding_has_a_newton_point(unit):
    """Weights that are the same share what one of them would have alone."""
    smooth, linear = unit * np.ones((3, 3)), unit * np.array([1.0, 1.0, 0.5])
    place = np.array([perspective.SHARED, perspective.SHARED, perspective.ZERO], dtype=np.int64)
    point = np.empty(3)
    written, level = perspective.newton_support(smooth, linear, 1, place, np.ones(3), point)
    assert written
    assert point[2] == 0.0
    assert point[0] == pytest.approx(point[1], rel=1e-2, abs=0.0)
    assert level == pytest.approx(unit / (unit + 1.0), rel=1e-3, abs=0.0)
    assert point[:2].sum() == pytest.approx(level, rel=1e-3, abs=0.0)
    place = np.full(3, simplex.INSIDE, dtype=np.int64)
    written, multiplier = simplex.newton_simplex(smooth, np.zeros(3), 2, place, point)
    assert written
    np.testing.assert_allclose(point, 2.0 / 3.0, rtol=1e-2)
    assert multiplier == pytest.approx(2.0 * unit, rel=1e-2, abs=0.0)
    indefinite = unit * np.array([[1.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert tuple(simplex.newton_simplex(indefinite, np.zeros(3), 2, place, point)) == (False, 0.0)
    if unit > 1.0:
        place = np.array([perspective.WHOLE, perspective.WHOLE, perspective.ZERO], dtype=np.int64)
        found = perspective.newton_support(indefinite, linear, 2, place, np.ones(3), point)
        assert tuple(found) == (False, 0.0)


def test_a_newton_point_that_overflows_is_none():
    place, point = np.full(2, simplex.INSIDE, dtype=np.int64), np.empty(2)
    for linear in ([1e300, -1e300], [1e300, 0.0]):
        with np.errstate(all="ignore"):
            found = simplex.newton_simplex(1e-20 * np.eye(2), np.array(linear), 1, place, point)
        assert tuple(found) == (False, 0.0)


@pytest.mark.parametrize(
    ("module", "solve", "invert"),
    [
        (perspective, "solve_perspective", "invert_perspective"),
        (simplex, "solve_capped_simplex", "invert_simplex"),
    ],
)
def test_no_inverse_is_formed_where_newton_steps_lead_to_the_end(module, solve, invert, monkeypatch):
    """An inverse takes as long as many Newton steps, and most nodes of a tree need none."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(30, 10))
    arguments = [rows.T @ rows / 30.0, generator.normal(size=10), 4]
    if module is simplex:
        arguments.append(np.ones(10))
    solver = getattr(module, solve)
    inverted = []
    monkeypatch.setattr(module, invert, inverted.append)
    plain = getattr(solver, "py_func", solver)
    *_, steps = plain(*arguments, np.zeros(10), np.inf, 100, 1e-9)
    assert steps == 0
    assert not inverted


def test_an_entry_at_the_very_edge_of_rounding_stays():
    zero, one, inside = simplex.AT_ZERO, simplex.AT_ONE, simplex.INSIDE
    edge = simplex.ON_BOUND
    place = np.empty(4, dtype=np.int64)
    simplex.places_of(
        np.array([edge, math.nextafter(edge, 1.0), 1.0 - edge, math.nextafter(1.0 - edge, 0.0)]), place
    )
    assert place.tolist() == [zero, inside, one, inside]
    tolerance = 1e-10 * (1.0 + 2.0)
    for before, point, slope in (
        (inside, -edge, 2.0),
        (inside, 1.0 + edge, 2.0),
        (zero, 0.0, 2.0 - tolerance),
        (one, 1.0, 2.0 + tolerance),
    ):
        place = np.array([before], dtype=np.int64)
        assert simplex.move_places(np.array([point]), np.array([slope]), 2.0, place) == 0
        assert place[0] == before
    zero, shared, whole = perspective.ZERO, perspective.SHARED, perspective.WHOLE
    high, low = 2.0 * (1.0 + 1e-10), 2.0 * (1.0 - 1e-10)
    for before, part, residual in (
        (shared, -1e-10 * 2.0, 2.0),
        (shared, high, 2.0),
        (zero, 0.0, high),
        (whole, 3.0, low),
    ):
        place = np.array([before, shared, shared], dtype=np.int64)
        point, residuals = np.array([part, 0.5, 0.5]), np.array([residual, 2.0, 2.0])
        assert perspective.move_support(point, residuals, 2.0, 3, place, np.ones(3)) == 0
        assert place[0] == before
    # Without a share: the largest zero entry is the smallest whole one, up to rounding.
    place = np.array([whole, zero], dtype=np.int64)
    residuals = np.array([1.0, 1.0 * (1.0 + 1e-12)])
    assert perspective.move_support(np.zeros(2), residuals, 0.0, 2, place, np.ones(2)) == 0


def test_of_equal_whole_entries_the_first_shares_and_none_at_all_has_the_sign_of_plus():
    whole, shared = perspective.WHOLE, perspective.SHARED
    for residual, moved in (
        ([3.0, -3.0, 2.0], 0),
        ([4.0, 3.0, 2.0], 1),
        ([2.5, 3.0, 2.0], 0),
        ([0.0, 3.0, 2.0], 0),
    ):
        place, sign = np.array([whole, whole, shared], dtype=np.int64), -np.ones(3)
        given = np.array(residual)
        perspective.move_support(np.array([3.0, 3.0, -1.0]), given, 2.0, 2, place, sign)
        assert place.tolist() == [shared if i == moved else whole for i in (0, 1)] + [shared]
        assert sign[moved] == (1.0 if residual[moved] >= 0.0 else -1.0)
    place, sign = np.array([whole, shared], dtype=np.int64), -np.ones(2)
    perspective.move_support(np.array([1.0, -1.0]), np.array([0.0, 2.0]), 0.0, 1, place, sign)
    assert place.tolist() == [shared, shared]
    assert sign[0] == 1.0


def test_where_no_unit_is_left_to_share_all_are_whole():
    smooth, linear, point = np.diag([1.0, 3.0, 1.0]), np.array([2.0, 8.0, 5.0]), np.empty(3)
    whole, zero, shared = perspective.WHOLE, perspective.ZERO, perspective.SHARED
    place = np.array([whole, whole, zero], dtype=np.int64)
    written, level = perspective.newton_support(smooth, linear, 2, place, np.ones(3), point)
    assert (written, level) == (True, 0.0)
    np.testing.assert_allclose(point, [1.0, 2.0, 0.0])
    for names in ([whole, whole, shared], [whole, zero, zero], [zero, zero, zero], [whole, whole, whole]):
        place = np.array(names, dtype=np.int64)
        found = perspective.newton_support(smooth, linear, 2, place, np.ones(3), point)
        assert tuple(found) == (False, 0.0)
