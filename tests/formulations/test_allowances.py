"""Allowances for rounding, part by part: what the proofs in their docstrings come to, counted anew here.

Other tests say that an allowance covers the exact error. As the constants of a proof have room, a term
that is left out may show nowhere: here inputs are such that the other terms vanish or are known.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from formulations import BlockProblem
from formulations.dense_forms import UNIT_ROUNDOFF, Rounding, _dip, error_factor, joint_form, selection_form
from formulations.enumeration import enumerate_optimum
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.certificate import Fixing
from formulations.relaxations.certified import BoundedVector, bounded_product, column_norms
from formulations.relaxations.reduced_block import reduced_block
from formulations.relaxations.reduction_rounding import joint_allowance, selection_allowance
from formulations.solution import Termination

ROOM = 1.05
"""Allowances may be larger than what is counted here by what their own rounding is given."""


def within(allowance: float, counted: float, room: float = ROOM, spare: float = 0.0) -> bool:
    return counted - spare <= allowance <= room * counted + spare


def flat(n: int, height: int, damping: float = 1.0, **more: np.ndarray) -> BlockProblem:
    """A block of nothing: every term of an allowance is 0 but those of what is put into it."""
    data = {"weights": np.zeros(n), "rows": np.zeros((height, n)), **more}
    return BlockProblem(damping=damping, n_prune=1, **data)


def reduction(problem: BlockProblem, smaller: BlockProblem, **changes) -> float:
    """`joint_allowance` with the first two weights eliminated; error-free and zero what is not given."""
    n = problem.n
    target = BoundedVector(changes.get("value", np.zeros(n)), changes.get("error", np.zeros(n)))
    carried = changes.get("carried", np.zeros(problem.rows.shape[0]))
    kept, free = np.arange(2), np.arange(2, n)
    return joint_allowance(problem, smaller, kept, free, target, carried, changes.get("cutoff", 0.0))


def curvature_errors(problem: BlockProblem) -> tuple[float, float]:
    """``e1`` and ``e2`` of the docstring of `joint_allowance`."""
    m = problem.rows.shape[0]
    spread = m + float((problem.rows[:, :2] ** 2).sum()) / problem.damping
    gamma_k, gamma_m = error_factor(2 + 8), error_factor(m + 8)
    return 2.0 * (gamma_k + gamma_m) * spread, 2.0 * gamma_m * math.sqrt(spread)


@pytest.mark.parametrize("height", [1, 3, 40])
def test_the_quadratic_part_of_a_reduction_grows_with_the_square_of_the_reach(height):
    rows = np.random.default_rng(height).normal(size=(height, 5))
    problem, smaller = flat(5, height, 2.0, rows=rows), flat(3, height)
    e1, e2 = curvature_errors(problem)
    square = float((rows[:, 2:] ** 2).sum())
    for cutoff in (1.0, 9.0, 1e4):
        # |u|^2 <= 2 cutoff / damping, as the minimiser is 0.
        found = reduction(problem, smaller, cutoff=cutoff)
        assert within(found, (e1 + 2.0 * e2) * square * 2.0 * cutoff / problem.damping)
    assert reduction(problem, smaller) == reduction(problem, smaller, cutoff=-1.0) == 0.0


def test_the_reach_of_a_reduction_is_that_of_weights_gradient_and_cutoff():
    rows = np.random.default_rng(1).normal(size=(3, 5))
    weights, gradient = np.arange(5.0), np.array([0.0, 3.0, 0.0, -4.0, 0.0])
    e1, e2 = curvature_errors(flat(5, 3, 2.0, rows=rows))
    square = float((rows[:, 2:] ** 2).sum())
    problem = flat(5, 3, 2.0, rows=rows, weights=weights, gradient=gradient)
    value = float(np.linalg.norm(weights)) + 5.0 / 2.0 + math.sqrt(2.0 * (7.0 + 25.0 / 4.0) / 2.0)
    # Curvature of the free weights is so large that the other terms are nothing.
    large = replace(problem, rows=rows * np.array([1.0, 1.0, 1e8, 1e8, 1e8]))
    counted = (e1 + 2.0 * e2) * 1e16 * square * value**2
    assert within(reduction(large, flat(3, 3), cutoff=7.0), counted)


def test_the_linear_part_of_a_reduction_counts_what_is_carried_and_what_it_carries():
    """As a polynomial in the scale of the free columns, whose coefficients are the parts."""
    rows = np.array([[3.0, -1.0, 1.0, 2.0, 0.5], [1.0, 2.0, -1.0, 1.0, 2.0]])
    damping, cutoff = 0.5, 4.0
    reach = math.sqrt(2.0 * cutoff / damping)
    kept_norm = float(np.linalg.norm(rows[:, :2]))
    e1, e2 = curvature_errors(flat(5, 2, damping, rows=rows))
    for value, error, carried in (
        ([2.0, -3.0], [0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.0], [1e-15, 2e-15], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0], [4.0, -3.0]),
        ([1.0, 1.0], [1e-15, 1e-15], [0.3, 0.4]),
    ):
        target = {"value": np.array([*value, 0.0, 0.0, 0.0]), "error": np.array([*error, 0.0, 0.0, 0.0])}
        parts = []
        for scale in (0.0, 1.0, 2.0):
            problem = flat(5, 2, damping, rows=rows * np.array([1.0, 1.0, scale, scale, scale]))
            smaller = flat(3, 2, damping)
            parts.append(reduction(problem, smaller, carried=np.array(carried), cutoff=cutoff, **target))
        constant = parts[0]
        quadratic = 0.5 * (parts[2] - 2.0 * parts[1] + parts[0])
        linear = parts[1] - constant - quadratic
        b, b_error = math.hypot(*value), math.hypot(*error)
        dt = kept_norm * (b_error + error_factor(2 + 8) * b) / damping
        c = 1.2 * (math.hypot(*carried) + dt)
        norm = float(np.linalg.norm(rows[:, 2:]))
        # A column of zeros has a norm of a thousandth of the root of the damping, as norms are from above.
        spare = 1e-4 * parts[1]
        assert within(quadratic, (e1 + 2.0 * e2) * (norm * reach) ** 2, spare=spare)
        assert within(linear, norm * reach * ((5.0 * e2 + 2.0 * e1) * c + 2.0 * dt), spare=spare)
        counted = 3.0 * c * dt + (4.0 * e2 + 2.0 * e1) * c * c
        counted += (2.0 * b * b_error + error_factor(2 + 8) * b * b) / damping
        assert within(constant, counted, spare=spare)


def test_errors_of_the_free_targets_and_of_the_weights_pass_through_a_reduction():
    problem, smaller = flat(5, 2, 0.5), flat(3, 2, 0.5)
    reach = math.sqrt(2.0 * 4.0 / 0.5)
    error = np.array([0.0, 0.0, 3e-15, 0.0, 4e-15])
    assert within(reduction(problem, smaller, cutoff=4.0, error=error), 5e-15 * reach)
    value = np.array([0.0, 0.0, 3.0, 0.0, -4.0])
    found = reduction(problem, smaller, cutoff=4.0, value=value)
    assert within(found, error_factor(8) * 5.0 * reach)
    # The constant 1/2 w.(b + g) - g.w, at weights whose reach meets no slope.
    weights = np.array([1.0, -2.0, 0.0, 0.0, 0.0])
    held = flat(5, 2, 0.5, weights=weights)
    for place in (0, 1):
        only = np.eye(5)[place]
        least = error_factor(5 + 16) * abs(weights[place]) + error_factor(2 + 8) / 0.5
        assert within(reduction(held, smaller, value=only), least)
        least = 1e-15 * abs(weights[place])
        assert within(reduction(held, smaller, error=1e-15 * only), least)


def test_the_gradient_that_encodes_a_reduced_block_is_rounded():
    problem = flat(5, 2, 0.5)
    reach = math.sqrt(2.0 * 4.0 / 0.5)
    gamma = error_factor(3 + 2 + 32)
    gradient = np.array([0.0, -3.0, 4.0])
    smaller = flat(3, 2, 0.5, gradient=gradient)
    assert within(reduction(problem, smaller, cutoff=4.0), 2.0 * gamma * 5.0 * reach)
    weights = np.array([1.0, 0.0, -2.0])
    norms = math.sqrt(0.5) * np.ones(3)
    smaller = flat(3, 2, 0.5, weights=weights)
    size = float(norms @ np.abs(weights))
    counted = 2.0 * gamma * float(np.linalg.norm(norms)) * size * reach + gamma * size**2
    assert within(reduction(problem, smaller, cutoff=4.0), counted)
    both = flat(3, 2, 0.5, weights=weights, gradient=gradient)
    assert within(reduction(problem, both), gamma * (size**2 + 8.0))


def test_a_reduction_too_near_to_singular_has_no_allowance():
    rows = np.ones((2, 5))
    for damping, proved in ((1e-10, True), (1e-15, False)):
        problem = flat(5, 2, damping, rows=rows)
        assert max(curvature_errors(problem)) > 0.0
        assert (max(curvature_errors(problem)) <= 0.1) == proved
        assert math.isfinite(reduction(problem, flat(3, 2, damping), cutoff=1.0)) == proved


def test_the_allowance_of_a_reduced_selection_counts_every_term():
    weights = np.array([2.0, -3.0, 5.0, 7.0])
    free, removed = np.array([1, 2]), np.array([2.0, 0.0, 0.0, 7.0])
    nothing = np.zeros(4)

    def allowance(value, error, gradient=None):
        problem = flat(4, 2, 1.0, weights=weights, gradient=gradient)
        return selection_allowance(problem, removed, BoundedVector(value, error), free)

    for i in range(4):
        one = np.eye(4)[i]
        inside = abs(weights[i]) if i in free else 0.0
        gone = removed[i]
        # An error of H removed moves the gradient of a free weight, and half of the offset.
        assert within(allowance(nothing, -0.0 + 1e-15 * one), 2e-15 * (inside + 0.5 * gone), 1.0 + 1e-9)
        for sign in (1.0, -1.0):
            rounded = error_factor(4) * inside + error_factor(4 + 16) * gone
            assert within(allowance(sign * one, nothing), 2.0 * rounded, 1.0 + 1e-9)
            assert within(allowance(nothing, nothing, sign * one), 2.0 * rounded, 1.0 + 1e-9)


def test_what_a_bound_loses_when_it_is_carried_out_of_a_reduced_block():
    problem = BlockProblem(weights=np.arange(1.0, 6.0), rows=np.eye(5), damping=1.0, n_prune=2)
    fixing = Fixing(keep=np.arange(5) == 4, prune=np.zeros(5, dtype=bool), cutoff=1e6)
    weak = CappedSimplexCertificate(point=np.full(5, -1e3), shift=np.zeros(5))
    reduced = replace(reduced_block(problem, "selection", fixing), certificate=weak)
    assert -math.inf < weak.lower_bound(problem) < -1e3
    solution = replace(enumerate_optimum(reduced.problem, "selection"), termination=Termination.FEASIBLE)
    for bound, offset, allowance in ((-3.0, 1.0, 0.0), (0.0, -7.0, 0.0), (-2.0, 0.0, 0.0), (1.0, 1.0, 0.5)):
        moved = replace(reduced, offset=offset, allowance=allowance)
        lifted = moved.lift(replace(solution, bound=bound)).bound
        lost = Fraction(bound) + Fraction(offset) - Fraction(lifted)
        counted = allowance + error_factor(4) * (abs(bound) + abs(offset))
        assert lost >= Fraction(0.9) * Fraction(counted)
        assert lost <= Fraction(1.6) * Fraction(counted)
    low = replace(reduced, fixing=replace(fixing, cutoff=-50.0))
    assert low.lift(replace(solution, bound=0.0)).bound == -50.0


def test_the_allowance_of_a_form_follows_its_terms():
    plain = {"gamma": 2.0**-40, "fixed": 0.0}
    for one_norm in (1.0, 8.0):
        found = Rounding(**plain, one_norm=one_norm).allowance(0.0)
        assert within(found, 2.0**-40 * 3.0 * one_norm**2, 1.0 + 1e-9)
        sloped = Rounding(**plain, one_norm=one_norm, slope=5.0).allowance(0.0)
        assert sloped - found == pytest.approx(2.0**-40 * 5.0 * one_norm, rel=1e-9)
    assert Rounding(gamma=2.0**-40, fixed=6.0).allowance(0.0) == 2.0**-40 * 6.0
    grown = Rounding(**plain, growth=2.0, minimum=-3.0, one_norm=1.0)
    # Above the minimum by 8: r = 1 + 2 sqrt(2 * 8).
    assert grown.allowance(5.0) == pytest.approx(2.0**-40 * 3.0 * 81.0, rel=1e-9)
    assert grown.allowance(-4.0) >= 2.0**-40 * 3.0
    assert grown.allowance(-4.0) == pytest.approx(2.0**-40 * 3.0, rel=1e-4)
    assert Rounding(gamma=0.25, fixed=1.0, growth=2.0).allowance(0.0) > 0.25 * (1.0 + 3.0 * 2.0)
    assert Rounding(gamma=0.25, fixed=1.0, growth=math.inf).allowance(0.0) == math.inf


def test_the_rounding_of_a_joint_form_is_made_up_of_its_terms():
    """Columns of one norm: the scaled form is the identity, and the minimiser the scaled weights."""
    n, weights, gradient = 4, np.array([1.0, -2.0, 3.0, 0.0]), np.array([0.0, 8.0, 0.0, -4.0])
    for slope in (None, gradient):
        problem = BlockProblem(weights=weights, rows=np.eye(n), damping=3.0, gradient=slope, n_prune=2)
        form = joint_form(problem)
        rounding = form.rounding
        g = problem.gradient_or_zero
        assert rounding.gamma == error_factor(2 * n + 12 * n + 64)
        # d = 2 everywhere, so sum_i d_i |w_i| = 12.
        assert rounding.fixed * form.scale == pytest.approx(144.0 + np.abs(g) @ np.abs(weights))
        assert rounding.slope * math.sqrt(form.scale) == pytest.approx(12.0 + np.abs(g).max() / 2.0)
        target = weights - g / 4.0
        assert rounding.one_norm * math.sqrt(form.scale) == pytest.approx(
            2.0 * np.abs(target).sum(), rel=1e-5
        )
        assert rounding.growth == pytest.approx(math.sqrt(n), rel=1e-9)
        assert rounding.growth > math.sqrt(n)
        assert rounding.minimum * form.scale == pytest.approx(-0.5 * float(g @ g) / 4.0)


def test_the_rounding_of_a_selection_form_is_made_up_of_its_terms():
    weights, gradient = np.array([1.0, -2.0, 3.0, 0.5]), np.array([1.0, 8.0, 0.0, -4.0])
    for slope in (None, gradient):
        problem = BlockProblem(weights=weights, rows=np.eye(4), damping=3.0, gradient=slope, n_prune=2)
        form = selection_form(problem)
        # The two largest a_i = d_i |w_i| add up to 10.
        counted = 2.0 * (100.0 + float(np.abs(problem.gradient_or_zero) @ np.abs(weights)))
        assert form.rounding.fixed * form.scale == pytest.approx(counted)
        assert form.rounding.gamma == error_factor(2 * 4 + 12 * 4 + 64)
        assert form.rounding.growth == 0.0


def pair(dip: float) -> BlockProblem:
    """Two weights whose Hessian has the eigenvalue ``-dip``, up to scaling by powers of two."""
    edge = 8.0 * (1.0 + dip)
    hessian = np.array([[4.0, edge], [edge, 16.0]])
    return BlockProblem(weights=np.ones(2), hessian=hessian, damping=0.0, n_prune=1)


def test_a_hessian_may_dip_below_zero_by_no_more_than_is_allowed_for():
    """A factorisation tells a dip up to its own backward error (Higham 2002, theorem 10.3)."""
    ulp = 2.0 * UNIT_ROUNDOFF
    passed = [count for count in range(1, 200) if math.isfinite(_dip(pair(count * ulp)))]
    found = _dip(pair(ulp))
    assert passed == list(range(1, len(passed) + 1))
    assert len(passed) >= 20
    assert found >= passed[-1] * ulp + 2.0 * error_factor(2 + 1)
    assert found <= 3.0 * passed[-1] * ulp
    assert found == _dip(pair(5.0 * ulp))
    allowed = selection_form(pair(ulp)).rounding
    assert _dip(BlockProblem(weights=np.ones(2), rows=np.ones((1, 2)), damping=0.0, n_prune=1)) == 0.0
    # 1/2 dip (y - z).A_ii (y - z) for the diagonal, 2 in units of its mean, on top of what all pay.
    more = allowed.gamma * (allowed.fixed - 2.0 * 16.0 / 10.0)
    assert more == pytest.approx(2.0 * found, rel=1e-3)
    assert selection_form(pair(199.0 * ulp)).rounding.allowance(0.0) == math.inf


def test_a_diagonal_that_is_zero_or_negative_hides_nothing():
    for hessian, known in (
        ([[1.0, 0.0], [0.0, 0.0]], True),
        ([[1.0, 1e-20], [1e-20, 0.0]], False),
        ([[1.0, 0.0], [0.0, -1e-17]], False),
    ):
        problem = BlockProblem(weights=np.ones(2), hessian=np.array(hessian), damping=0.0, n_prune=1)
        assert math.isfinite(_dip(problem)) == known
        rounding = selection_form(problem).rounding
        assert rounding.fixed >= 0.0
        assert math.isfinite(rounding.allowance(1.0)) == known


@pytest.mark.parametrize("n", [1, 5, 40, 300])
def test_the_error_of_a_product_grows_with_the_length_of_its_sums(n):
    problem = BlockProblem(weights=np.ones(n), hessian=np.eye(n), damping=0.0, n_prune=1)
    x = np.linspace(1.0, 2.0, n)
    found = bounded_product(problem, x, column_norms(problem))
    length = (found.error / float(x.sum()) / UNIT_ROUNDOFF).max()
    # n products, the sum of them, and the damping.
    assert n + 2 <= length <= n + 16
