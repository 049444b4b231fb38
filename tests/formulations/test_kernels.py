"""Kernels on small data against plain definitions: greedy sets, swaps, sums, errors and Newton points."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from formulations.dense_forms import UNIT_ROUNDOFF, dense_form, joint_form, selection_form
from formulations.incumbents import joint_tableau
from formulations.relaxations import capped_simplex_kernels as simplex
from formulations.relaxations import perspective_kernels as perspective
from formulations.relaxations.support_norm import largest_sum, prox_support_norm
from formulations.swap_kernels import IMPROVEMENT, prune_joint, prune_selection, swap_joint, swap_selection
from tests.formulations import blocks
from tests.formulations.blocks import block

KINDS = tuple(kind for kind in blocks.KINDS if kind != "real")
PROGRAMS = ("selection", "joint")


def form_of(kind: str, program: str, n: int = 7, seed: int = 0):
    return dense_form(block(kind, n, 3, seed), program)


def selection_value(form, pruned) -> float:
    y = np.asarray(pruned, dtype=float)
    return float(0.5 * y @ form.matrix @ y + form.linear @ y)


def joint_value(form, keep) -> float:
    index = np.flatnonzero(keep)
    linear = form.linear[index]
    return float(-0.5 * linear @ np.linalg.solve(form.matrix[np.ix_(index, index)], linear))


def best_swap(form, program, chosen):
    """Least value after one swap of a pruned weight with a kept one."""
    value = selection_value if program == "selection" else joint_value
    least = np.inf
    for i, j in itertools.product(np.flatnonzero(chosen), np.flatnonzero(~chosen)):
        other = chosen.copy()
        other[i], other[j] = False, True
        least = min(least, value(form, other))
    return least


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_greedy_selection_takes_the_least(kind):
    form = form_of(kind, "selection")
    for count in range(7):
        pruned = prune_selection(form.matrix, form.linear, count)
        assert pruned.sum() == count
        following = prune_selection(form.matrix, form.linear, count + 1)
        assert (following >= pruned).all()
        least = min(selection_value(form, pruned | (np.arange(7) == i)) for i in np.flatnonzero(~pruned))
        assert selection_value(form, following) == pytest.approx(least, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "duplicates"])
def test_every_step_of_greedy_elimination_takes_the_least(kind):
    form = form_of(kind, "joint")
    inverse = np.linalg.inv(form.matrix)

    def pruned_to(count):
        pruned = np.zeros(7, dtype=bool)
        prune_joint(inverse.copy(), inverse @ form.linear, pruned, count)
        return pruned

    for count in range(6):
        pruned, following = pruned_to(count), pruned_to(count + 1)
        assert pruned.sum() == count
        assert (following >= pruned).all()
        least = min(joint_value(form, ~(pruned | (np.arange(7) == i))) for i in np.flatnonzero(~pruned))
        assert joint_value(form, ~following) == pytest.approx(least, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("place", range(3))
def test_where_every_cost_overflows_one_weight_goes_all_the_same(place):
    pruned = np.arange(3) == place
    prune_joint(np.eye(3), np.full(3, 1e200), pruned, 1)
    assert pruned.sum() == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", range(3))
def test_a_swap_is_the_best_one_and_the_last_leaves_none(program, kind, seed):
    form = form_of(kind, program, seed=seed)
    rng = np.random.default_rng(seed)
    chosen = np.zeros(7, dtype=bool)
    chosen[rng.choice(7, 3, replace=False)] = True

    def swapped(most):
        now = chosen.copy()
        if program == "selection":
            count = swap_selection(form.matrix, form.linear, now, most)
        else:
            table, state = joint_tableau(form.matrix, form.linear, now)
            count = swap_joint(table, state, now, most)
            # What the kernel goes on with is the tableau of the set that it has come to.
            fresh, at_rest = joint_tableau(form.matrix, form.linear, now)
            size = max(1.0, np.abs(fresh).max())
            np.testing.assert_allclose(table, fresh, atol=1e-7 * size)
            np.testing.assert_allclose(state, at_rest, atol=1e-7 * size)
        return now, count

    value = selection_value if program == "selection" else joint_value
    tolerance = 1e-9 * max(1.0, abs(value(form, chosen)))
    after, count = swapped(1)
    assert after.sum() == 3
    least = best_swap(form, program, chosen)
    if count:
        assert value(form, after) == pytest.approx(least, abs=tolerance)
        assert value(form, after) < value(form, chosen)
    else:
        assert least >= value(form, chosen) - tolerance
    last, total = swapped(100)
    assert total < 100
    assert best_swap(form, program, last) >= value(form, last) - tolerance
    assert swapped(0)[1] == 0
    if total > 1:
        assert swapped(total - 1)[1] == total - 1


def test_a_gain_below_rounding_is_no_swap():
    """Two weights are the same but for an ulp or two; more than that is a swap."""
    for difference, moves in ((4.0 * UNIT_ROUNDOFF, 0), (1e3 * IMPROVEMENT, 1)):
        matrix = np.diag([1.0, 1.0 - difference, 5.0])
        pruned = np.array([True, False, False])
        assert swap_selection(matrix, np.zeros(3), pruned, 10) == moves
        assert pruned.tolist() == [not moves, bool(moves), False]
        keep, linear = np.array([True, False, False]), np.array([1.0, 1.0 + difference, 0.1])
        table, state = np.eye(3), linear.copy()
        table[0, 0], state[0] = -1.0, linear[0]
        assert swap_joint(table, state, keep, 10) == moves
        assert keep.tolist() == [not moves, bool(moves), False]


def test_a_gain_is_set_against_the_terms_it_is_the_difference_of():
    """Slopes cancel all but the diagonal, against which a gain of 2e-11 is next to nothing."""
    for gain, moves in ((2e-11, 0), (1e-9, 1)):
        matrix = np.diag([1.0, 1.0, 10.0])
        linear = np.array([-1.0, -0.5 - gain, 0.0])
        matrix[0, 2] = matrix[2, 0] = 1e-3
        pruned = np.array([True, False, False])
        assert swap_selection(matrix, linear + np.array([0.5, 0.0, 0.0]), pruned, 10) == moves


def test_of_equal_ones_the_first_is_taken():
    """So that a set does not hang on the order in which equal ones are looked at."""
    identity, ones = np.eye(4), np.ones(4)
    for count in range(5):
        first = np.arange(4) < count
        assert prune_selection(identity, ones, count).tolist() == first.tolist()
        pruned = np.zeros(4, dtype=bool)
        prune_joint(identity.copy(), ones.copy(), pruned, count)
        assert pruned.tolist() == first.tolist()
    for chosen in ([0, 1], [2, 3]):
        others = [i for i in range(4) if i not in chosen]
        pruned = np.isin(np.arange(4), chosen)
        assert swap_selection(identity, np.where(pruned, 4.0, 1.0), pruned, 1) == 1
        assert np.flatnonzero(pruned).tolist() == sorted([chosen[1], others[0]])
        keep = np.isin(np.arange(4), chosen)
        table, state = np.diag(np.where(keep, -1.0, 1.0)), np.where(keep, 1.0, 4.0)
        assert swap_joint(table, state, keep, 1) == 1
        assert np.flatnonzero(keep).tolist() == sorted([chosen[1], others[0]])


def test_a_share_begins_and_ends_where_it_would_not_change_anything():
    """An entry at the very level of the others is whole, or zero."""
    order, image = np.empty(4, dtype=np.int64), np.empty(4)
    assert tuple(prox_support_norm(np.array([4.0, 3.0, 3.0, 2.0]), 2, 1.0, order, image)) == (1, 3)
    np.testing.assert_allclose(image, [2.0, 1.0, 1.0, 0.0])
    assert tuple(prox_support_norm(np.array([4.0, 2.0, 1.0, -1.0]), 2, 1.0, order, image)) == (2, 2)
    np.testing.assert_allclose(image, [2.0, 1.0, 0.0, 0.0])
    assert tuple(prox_support_norm(np.array([-4.0, 2.0, 1.0, -1.0]), 0, 1.0, order, image)) == (0, 0)
    assert not image.any()
    assert order.tolist()[:2] == [0, 1]
    assert tuple(prox_support_norm(np.array([-4.0, 2.0, 1.0, -1.0]), 4, 3.0, order, image)) == (4, 4)
    np.testing.assert_allclose(image, [-1.0, 0.5, 0.25, -0.25])


def test_where_nothing_costs_anything_nothing_is_swapped():
    pruned = np.array([True, False, False])
    assert swap_selection(np.zeros((3, 3)), np.zeros(3), pruned, 10) == 0
    assert pruned.tolist() == [True, False, False]
    for everything in (False, True):
        keep, table = np.full(3, everything), np.eye(3)
        table *= -1.0 if everything else 1.0
        assert swap_joint(table, np.ones(3), keep, 10) == 0
        assert (keep == everything).all()
    keep, table = np.array([True, False, False]), np.diag([-1.0, 1.0, 1.0])
    assert swap_joint(table, np.zeros(3), keep, 10) == 0
    assert keep.tolist() == [True, False, False]


def test_sums_of_largest_and_smallest_entries():
    rng = np.random.default_rng(0)
    for size in range(1, 12):
        for values in (rng.normal(size=size), rng.integers(0, 3, size).astype(float)):
            before, ranked = values.copy(), np.sort(values)
            for count in range(-1, size + 2):
                wanted = max(min(count, size), 0)
                assert largest_sum(values, count) == pytest.approx(ranked[size - wanted :].sum())
                assert simplex.smallest_sum(values, count) == pytest.approx(ranked[:wanted].sum())
            np.testing.assert_array_equal(values, before)


def test_the_proximal_map_keeps_shares_and_drops_entries_and_is_least():
    rng = np.random.default_rng(1)
    for _ in range(60):
        n = int(rng.integers(2, 9))
        size, step = int(rng.integers(1, n + 1)), float(10.0 ** rng.uniform(-2, 2))
        point, order, image = rng.normal(size=n), np.empty(n, dtype=np.int64), np.empty(n)
        if rng.random() < 0.5:
            point = np.sign(point) * (1.0 + 0.1 * np.abs(point))
        left, right = prox_support_norm(point, size, step, order, image)
        assert sorted(order) == list(range(n))
        assert 0 <= left <= size <= right <= n
        np.testing.assert_allclose(image[order[:left]], point[order[:left]] / (1.0 + step))
        shares = np.abs(point - image)[order[left:right]]
        assert np.ptp(shares) <= 1e-9 if shares.size else True
        assert (image[order[right:]] == 0.0).all()

        def value(u, point=point, size=size, step=step):
            return 0.5 * float(((u - point) ** 2).sum()) + step * half_support_norm(u, size)

        least = value(image)
        for _ in range(20):
            moved = image + 10.0 ** rng.uniform(-5, -1) * rng.normal(size=n)
            assert value(moved) >= least - 1e-12
        prox_support_norm(point, 0, step, order, image)
        assert not image.any()


def exact_dual(smooth, linear, split, point, size) -> Fraction:
    image = [
        sum(Fraction(a) * Fraction(b) for a, b in zip(row, point, strict=True)) for row in smooth.tolist()
    ]
    squares = [
        (Fraction(b) - q) ** 2 / Fraction(d)
        for b, q, d in zip(linear.tolist(), image, split.tolist(), strict=True)
    ]
    quadratic = sum(Fraction(a) * q for a, q in zip(point, image, strict=True))
    return -quadratic / 2 - sum(sorted(squares, reverse=True)[:size], Fraction(0)) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_of_the_dual_value_is_bounded(kind):
    rng = np.random.default_rng(2)
    form = form_of(kind, "joint")
    smooth = form.matrix - 0.5 * np.linalg.eigvalsh(form.matrix)[0] * np.eye(7)
    ones = np.ones(7)
    for point in (rng.normal(size=7), 1e3 * rng.normal(size=7), np.linalg.lstsq(smooth, form.linear)[0]):
        for size in (1, 3, 6):
            residual = form.linear - smooth @ point
            value = perspective.dual_value(point, smooth @ point, form.linear, ones, size)
            error = perspective.dual_rounding(smooth, form.linear, point, residual, size)
            true = exact_dual(smooth, form.linear, ones, point.tolist(), size)
            assert abs(Fraction(float(value)) - true) <= Fraction(float(error))
            root = np.sqrt(np.diagonal(smooth))
            reach = float(root @ np.abs(point))
            size_of = root * reach + np.abs(form.linear) + np.abs(residual)
            terms = size_of * np.abs(residual)
            least = 7 * UNIT_ROUNDOFF * (reach**2 + np.sort(terms)[-size:].sum())
            square = 1e3 * UNIT_ROUNDOFF**2 * float((size_of**2).sum())
            assert least <= error <= 10.0 * least + 100.0 * square


@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_of_the_linearisation_is_bounded(kind):
    rng = np.random.default_rng(3)
    form = form_of(kind, "selection")
    for point in (rng.random(7), 100.0 * rng.normal(size=7), np.ones(7)):
        for count in (1, 3, 6):
            slope = form.matrix @ point + form.linear
            error = simplex.linearisation_rounding(form.matrix, form.linear, point, slope, count)
            root = np.sqrt(np.maximum(np.diagonal(form.matrix), 0.0))
            reach = float(root @ np.abs(point))
            both = reach + np.sort(root)[-count:].sum()
            terms = root * reach + np.abs(form.linear) + np.abs(slope)
            least = UNIT_ROUNDOFF * 7 * (reach**2 + np.sort(terms)[-count:].sum() + both**2)
            assert least <= error <= 10.0 * least


def test_a_point_far_from_every_good_set_pays_for_an_indefinite_matrix():
    rng = np.random.default_rng(4)
    for _ in range(20):
        smooth = rng.normal(size=(5, 5))
        smooth = smooth @ smooth.T
        linear, point = rng.normal(size=5), rng.normal(size=5)
        residual = linear - smooth @ point
        constant, minimum = float(rng.normal()), float(rng.normal()) - 3.0
        reach = np.array([1e-14, 2.0, 3.0, minimum])
        value = constant + 0.5 * point @ (smooth + np.eye(5)) @ point - linear @ point
        size = 2.0 + 3.0 * np.sqrt(2.0 * max(value - minimum, 0.0))
        found = perspective.indefinite_rounding(linear, point, residual, constant, reach)
        assert found == pytest.approx(1e-14 * size**2, rel=1e-9, abs=0.0)


def test_newton_points_are_stationary_on_their_entries():
    rng = np.random.default_rng(5)
    for _ in range(20):
        n, size = 6, int(rng.integers(1, 5))
        smooth = rng.normal(size=(n, n))
        smooth = smooth @ smooth.T / n
        linear = rng.normal(size=n)
        whole, shared = int(rng.integers(0, size)), int(rng.integers(1, 3))
        place = np.zeros(n, dtype=np.int64)
        order = rng.permutation(n)
        place[order[:whole]] = perspective.WHOLE
        place[order[whole : whole + shared]] = perspective.SHARED
        sign, point = np.sign(rng.normal(size=n)), np.full(n, 7.0)
        written, (level,) = perspective.newton_support(smooth, linear, size, place, sign, point)
        assert written
        residual = linear - smooth @ point
        full, part = place == perspective.WHOLE, place == perspective.SHARED
        np.testing.assert_allclose(point[full], residual[full], atol=1e-8)
        np.testing.assert_allclose(residual[part] * sign[part], level, atol=1e-8)
        assert not point[place == perspective.ZERO].any()
        assert (point * sign)[part].sum() == pytest.approx((size - whole) * level, abs=1e-8)
        wrong = np.where(np.arange(n) < size + 1, perspective.WHOLE, perspective.ZERO)
        assert not perspective.newton_support(smooth, linear, size, wrong, sign, point)[0]


def test_newton_points_of_the_capped_simplex_keep_their_sum():
    rng = np.random.default_rng(6)
    for _ in range(20):
        n, count = 6, 3
        smooth = rng.normal(size=(n, n))
        smooth = smooth @ smooth.T / n
        linear, point = rng.normal(size=n), np.empty(n)
        place = rng.permutation([0, 1, 2, 2, 2, int(rng.integers(0, 3))]).astype(np.int64)
        written, (level,) = simplex.newton_simplex(smooth, linear, count, place, point)
        assert written
        inside = place == simplex.INSIDE
        slope = smooth @ point + linear
        assert point.sum() == pytest.approx(count, abs=1e-6)
        np.testing.assert_allclose(slope[inside], level, atol=1e-6)
        assert (point[place == simplex.AT_ONE] == 1.0).all()
        assert (point[place == simplex.AT_ZERO] == 0.0).all()
        assert not simplex.newton_simplex(smooth, linear, count, np.zeros(n, dtype=np.int64), point)[0]


@pytest.mark.parametrize("kind", ["random", "hessian", "wide", "duplicates"])
def test_both_relaxations_are_solved_to_a_small_gap(kind):
    """The value of the relaxation at the point found, set against the bound that it proves."""
    problem = block(kind, 8, 4, seed=1)
    form = joint_form(problem)
    split = 0.9 * max(float(np.linalg.eigvalsh(form.matrix)[0]), 1e-3)
    smooth = form.matrix / split
    smooth += (0.1 - np.linalg.eigvalsh(smooth)[0]) * np.eye(8)
    linear = form.linear / np.sqrt(split)
    value, point, residual, _ = perspective.solve_perspective(
        smooth, linear, 4, np.zeros(8), np.inf, 300, 1e-5
    )
    np.testing.assert_allclose(residual, linear - smooth @ point, atol=1e-6 * (1.0 + np.abs(linear).max()))
    assert value <= perspective.dual_value(point, smooth @ point, linear, np.ones(8), 4)
    proved = perspective.dual_value(point, smooth @ point, linear, np.ones(8), 4)
    assert value == pytest.approx(proved, rel=1e-9, abs=0.0)
    primal = 0.5 * point @ smooth @ point - linear @ point + half_support_norm(point, 4)
    assert value <= primal + 1e-9
    assert value == pytest.approx(primal, rel=1e-3, abs=0.0)
    selection = selection_form(problem)
    bound, y, slope, _ = simplex.solve_capped_simplex(
        selection.matrix, selection.linear, 4, np.full(8, 0.3), np.full(8, 0.5), np.inf, 300, 1e-5
    )
    np.testing.assert_allclose(slope, selection.matrix @ y + selection.linear, atol=1e-6)
    quadratic = -0.5 * float(y @ selection.matrix @ y)
    assert bound == pytest.approx(quadratic + simplex.smallest_sum(slope, 4), rel=1e-9, abs=1e-12)
    feasible = np.empty(8)
    simplex.project_capped_simplex(y, np.ones(8), 4, feasible)
    assert feasible.sum() == pytest.approx(4.0, abs=1e-9)
    assert bound <= selection_value(selection, feasible) + 1e-12
    assert bound == pytest.approx(selection_value(selection, feasible), rel=5e-3, abs=1e-4)


def half_support_norm(point, size) -> float:
    """Half the least sum of squares over shares in (0, 1] that add up to `size`, by bisection."""
    low, high = 0.0, float(np.abs(point).sum())
    for _ in range(100):
        level = 0.5 * (low + high)
        low, high = (level, high) if np.minimum(np.abs(point) / level, 1.0).sum() > size else (low, level)
    share = np.minimum(np.abs(point) / high, 1.0)
    used = share > 0.0
    return 0.5 * float((point[used] ** 2 / share[used]).sum())
