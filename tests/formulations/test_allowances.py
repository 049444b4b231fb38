"""Allowances for rounding, part by part: what the proofs in their docstrings come to, counted anew here.

Other tests say that an allowance covers the exact error. As the constants of a proof have room, a term
that is left out may show nowhere: here inputs are such that the other terms vanish or are known.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from formulations import BlockProblem
from formulations.dense_forms import (
    UNIT_ROUNDOFF,
    Rounding,
    _dip,
    _lowest_and_minimiser,
    error_factor,
    joint_form,
    selection_form,
)
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.loss import objective
from formulations.relaxations import capped_simplex_kernels as simplex
from formulations.relaxations import lower_bound
from formulations.relaxations import perspective_kernels as perspective
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.certificate import Fixing, Linearisation, RelaxationCertificate, _rise
from formulations.relaxations.certified import (
    CHUNK,
    BoundedVector,
    bounded_product,
    bounded_value,
    column_norms,
    definiteness_margin,
    provable_split,
    row_norms,
    split_is_valid,
    value_ceiling,
)
from formulations.relaxations.linear import LinearCertificate
from formulations.relaxations.only_set import only_set_certificate
from formulations.relaxations.perspective import PerspectiveCertificate
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


def test_the_square_of_the_targets_that_are_eliminated_errs_by_twice_their_product():
    problem, smaller = flat(5, 2, 0.5), flat(3, 2, 0.5)
    value, error = np.array([3.0, -4.0, 0.0, 0.0, 0.0]), np.array([4e-9, 3e-9, 0.0, 0.0, 0.0])
    assert within(reduction(problem, smaller, value=value, error=error), 2.0 * 5.0 * 5e-9 / 0.5)


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


def test_what_is_carried_may_be_nothing_but_its_error():
    """No figure is carried, and no point has a slope to meet: the square of the error is left."""
    rows = np.array([[3.0, -1.0, 1.0, 2.0, 0.5], [1.0, 2.0, -1.0, 1.0, 2.0]])
    problem, smaller = flat(5, 2, 0.5, rows=rows), flat(3, 2, 0.5)
    error = np.array([1e-9, -2e-9, 0.0, 0.0, 0.0])
    dt = float(np.linalg.norm(rows[:, :2])) * float(np.linalg.norm(error)) / 0.5
    assert within(reduction(problem, smaller, error=error), 3.0 * 1.2 * dt * dt)


def test_errors_of_one_slope_add_up_in_a_reduction():
    """Of one free weight: what is carried to it, the error of its target, and how it is encoded."""
    rows = np.array([[3.0, -1.0, 1e-3, 0.0, 0.0], [1.0, 2.0, -1e-3, 0.0, 0.0]])
    problem = flat(5, 2, 0.5, rows=rows)
    cutoff, first = 1e12, np.eye(3)[0]
    nothing = reduction(problem, flat(3, 2, 0.5), cutoff=cutoff)
    changes = (
        {"carried": np.array([40.0, -30.0])},
        {"error": 3e-14 * np.eye(5)[2]},
        {"value": 60.0 * np.eye(5)[2]},
        {"gradient": 3.0 * first},
        {"weights": 5.0 * first},
    )

    def more(*given) -> float:
        data = {name: value for change in given for name, value in change.items()}
        encoded = {name: data.pop(name) for name in ("gradient", "weights") if name in data}
        # The quadratic part is all that there is without them, and is left out.
        return reduction(problem, flat(3, 2, 0.5, **encoded), cutoff=cutoff, **data) - nothing

    alone = [more(change) for change in changes]
    assert min(alone) > 1e-3 * nothing
    # Weights are encoded in the slopes of others too, which a norm adds up to a little less.
    for first_one, second_one in itertools.combinations(range(len(changes)), 2):
        both = more(changes[first_one], changes[second_one])
        assert 0.85 * (alone[first_one] + alone[second_one]) <= both
        assert both <= 1.05 * (alone[first_one] + alone[second_one])


def test_a_reduction_pays_for_a_gradient_of_either_sign():
    weights, smaller = np.array([1.0, -2.0, 0.0, 0.0, 0.0]), flat(3, 2, 0.5)
    for place in range(5):
        up, down = (
            reduction(flat(5, 2, 0.5, weights=weights, gradient=sign * np.eye(5)[place]), smaller)
            for sign in (1.0, -1.0)
        )
        assert up == down
        # Its products with the weights, as a term of the constant and as one of the sum.
        assert within(up, 2.0 * error_factor(5 + 16) * abs(weights[place]), spare=1e-17)


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
        assert sloped - found == pytest.approx(2.0**-40 * 5.0 * one_norm, rel=1e-9, abs=0.0)
    assert Rounding(gamma=2.0**-40, fixed=6.0).allowance(0.0) == 2.0**-40 * 6.0
    grown = Rounding(**plain, growth=2.0, minimum=-3.0, one_norm=1.0)
    # Above the minimum by 8: r = 1 + 2 sqrt(2 * 8).
    assert grown.allowance(5.0) == pytest.approx(2.0**-40 * 3.0 * 81.0, rel=1e-9, abs=0.0)
    assert grown.allowance(-4.0) >= 2.0**-40 * 3.0
    assert grown.allowance(-4.0) == pytest.approx(2.0**-40 * 3.0, rel=1e-4, abs=0.0)
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
        assert rounding.fixed * form.scale == pytest.approx(
            144.0 + np.abs(g) @ np.abs(weights), rel=1e-9, abs=0.0
        )
        assert rounding.slope * math.sqrt(form.scale) == pytest.approx(
            12.0 + np.abs(g).max() / 2.0, rel=1e-9, abs=0.0
        )
        target = weights - g / 4.0
        assert rounding.one_norm * math.sqrt(form.scale) == pytest.approx(
            2.0 * np.abs(target).sum(), rel=1e-5, abs=0.0
        )
        assert rounding.growth == pytest.approx(math.sqrt(n), rel=1e-9, abs=0.0)
        assert rounding.growth > math.sqrt(n)
        assert rounding.minimum * form.scale == pytest.approx(-0.5 * float(g @ g) / 4.0, rel=1e-9, abs=0.0)


def test_the_rounding_of_a_selection_form_is_made_up_of_its_terms():
    weights, gradient = np.array([1.0, -2.0, 3.0, 0.5]), np.array([1.0, 8.0, 0.0, -4.0])
    for slope in (None, gradient):
        problem = BlockProblem(weights=weights, rows=np.eye(4), damping=3.0, gradient=slope, n_prune=2)
        form = selection_form(problem)
        # The two largest a_i = d_i |w_i| add up to 10.
        counted = 2.0 * (100.0 + float(np.abs(problem.gradient_or_zero) @ np.abs(weights)))
        assert form.rounding.fixed * form.scale == pytest.approx(counted, rel=1e-9, abs=0.0)
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
    assert more == pytest.approx(2.0 * found, rel=1e-3, abs=0.0)
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


def drawn(rng: np.random.Generator, n: int, spread: float = 5.0) -> np.ndarray:
    """Entries of one size, which is drawn, of either sign; a third of the time one of them alone."""
    entries = rng.normal(size=n) * 10.0 ** rng.uniform(-spread, spread)
    if rng.random() < 1.0 / 3.0:
        entries *= np.arange(n) == rng.integers(n)
    return entries


def terms_in_turn(seed: int, n: int) -> tuple[BlockProblem, np.random.Generator]:
    """A block whose weights, gradient and curvature are of sizes far apart: any term may be the largest."""
    rng = np.random.default_rng([seed, n, 61])
    diagonal = 10.0 ** rng.uniform(-4.0, 4.0) * rng.uniform(0.1, 1.0, n)
    weights, gradient = drawn(rng, n), drawn(rng, n)
    weights[0] += 1e-6
    gradient = None if seed % 4 == 0 else gradient
    given = {"weights": weights, "gradient": gradient, "n_prune": n // 2}
    if seed % 2:
        return BlockProblem(hessian=np.diag(diagonal), damping=0.0, **given), rng
    return BlockProblem(rows=np.sqrt(diagonal)[None] * rng.normal(size=(1, n)), damping=1e-2, **given), rng


@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("seed", range(40))
def test_the_errors_of_a_certificate_are_the_sum_of_those_of_its_terms(seed, n):
    """Eight roundings where a term is formed, n and some where they are added up."""
    problem, rng = terms_in_turn(seed, n)
    norms, nothing = column_norms(problem), Fixing.by_count(problem)
    w, g = problem.weights, problem.gradient_or_zero
    eight, sums = error_factor(8), error_factor(n + 16)
    u, d = drawn(rng, n), np.abs(drawn(rng, n)) + 1e-9
    line = PerspectiveCertificate(point=u, split=d).underestimate(problem, nothing, norms)
    change = bounded_product(problem, w - u, norms)
    moved = change.error + eight * norms * float(norms @ (np.abs(w) + np.abs(u)))
    residual = np.abs(change.value - g + d * u)
    blur = moved + eight * (np.abs(change.value) + np.abs(g) + d * np.abs(u))
    errors = 0.5 * ((2.0 * residual * blur + blur**2) / d + eight * residual**2 / d)
    lost = 0.5 * float(np.abs(w + u) @ moved)
    lost += sums * float(np.abs(w + u) @ np.abs(change.value) + np.abs(g) @ np.abs(w) + d @ u**2)
    np.testing.assert_allclose(line.error, errors, rtol=1e-9)
    np.testing.assert_allclose(line.cost, -0.5 * residual**2 / d, rtol=1e-9)
    assert line.lost == pytest.approx(lost, rel=1e-9, abs=0.0)
    y, shift = drawn(rng, n, 2.0), drawn(rng, n)
    line = CappedSimplexCertificate(point=y, shift=shift).underestimate(problem, nothing, norms)
    product = bounded_product(problem, w * y, norms)
    moved = product.error + eight * norms * float(norms @ np.abs(w * y))
    formed = np.abs(w * product.value) + np.abs(shift) * (np.abs(y) + 0.5) + np.abs(g * w)
    np.testing.assert_allclose(line.error, np.abs(w) * moved + eight * formed, rtol=1e-9)
    lost = 0.5 * float(np.abs(w * y) @ moved)
    lost += sums * float(np.abs(w * y) @ np.abs(product.value) + np.abs(shift) @ y**2)
    assert line.lost == pytest.approx(lost, rel=1e-9, abs=0.0)


@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("seed", range(24))
def test_the_error_of_a_loss_is_the_sum_of_those_of_its_terms(seed, n):
    problem, rng = terms_in_turn(seed, n)
    new = drawn(rng, n)
    step, g = new - problem.weights, np.abs(problem.gradient_or_zero)
    size, norms = np.abs(step), column_norms(problem)
    product = bounded_product(problem, step, norms)
    counted = float(size @ product.error) + 2.0 * error_factor(8) * float((norms @ size) ** 2 + g @ size)
    counted += error_factor(n + 16) * float(size @ np.abs(product.value) + 2.0 * (g @ size))
    value, error = bounded_value(problem, new)
    assert error == pytest.approx(counted, rel=1e-9, abs=0.0)
    assert value == pytest.approx(
        0.5 * step @ product.value + problem.gradient_or_zero @ step, abs=error, rel=1e-12
    )
    assert value_ceiling(problem, new) == value + error


@pytest.mark.parametrize(("n", "height"), [(1, 1), (2, 900), (700, 3), (100 * CHUNK, 1)])
def test_the_error_of_a_product_with_rows_counts_chunks_rows_and_damping(n, height):
    """Sums of a chunk, sums of the chunks, then sums over the rows."""
    rng = np.random.default_rng([n, height])
    for seed in range(6):
        rows = rng.normal(size=(height, n))
        damping = 10.0 ** rng.uniform(-6, 6)
        problem = BlockProblem(weights=np.zeros(n), rows=rows, damping=damping, n_prune=0)
        x = drawn(rng, n)
        if seed == 0 and n > 1:
            # Nothing is left of the image: what it was the sum of counts all the same.
            x = np.zeros(n)
            rows[:, 1] = rows[:, 0]
            x[:2] = 1.0, -1.0
            problem = replace(problem, rows=rows)
        norms = column_norms(problem)
        found = bounded_product(problem, x, norms)
        image, columns = rows @ x, row_norms(problem, norms)
        np.testing.assert_allclose(
            found.value, rows.T @ image + damping * x, rtol=1e-9, atol=1e-9 * np.abs(found.value).max()
        )
        chunks = math.ceil(n / CHUNK)
        moved = error_factor(CHUNK + chunks + 8) * float(columns @ np.abs(x))
        moved += error_factor(height + 8) * float(np.linalg.norm(image))
        rest = error_factor(8) * (np.abs(found.value) + damping * np.abs(x))
        assert (found.error >= columns * moved * 1.005 + rest * (1.0 - 1e-9)).all()
        assert (found.error <= columns * moved * 1.015 + rest * (1.0 + 1e-9)).all()


def test_with_rows_a_split_of_the_damping_itself_needs_no_factorisation():
    """H less the damping is singular, so that no factorisation would prove it."""
    problem = BlockProblem(weights=np.ones(4), rows=np.ones((1, 4)), damping=0.5, n_prune=1)
    norms, everything = column_norms(problem), np.ones(4, dtype=bool)
    split = np.full(4, 0.5)
    assert provable_split(problem, split) is split
    assert split_is_valid(problem, split, norms, everything)
    more = np.where(np.arange(4) == 2, math.nextafter(0.5, 1.0), split)
    assert provable_split(problem, more)[0] < 0.5
    assert not split_is_valid(problem, more, norms, everything)
    assert split_is_valid(problem, more, norms, np.arange(4) != 2)


@pytest.mark.parametrize(("height", "order"), [(None, 1), (None, 50), (1, 3), (400, 3), (5, 200)])
def test_the_margin_of_definiteness_is_four_times_what_is_lost(height, order):
    rows = {"hessian": np.eye(order)} if height is None else {"rows": np.zeros((height, order))}
    problem = BlockProblem(weights=np.zeros(order), damping=1.0, n_prune=0, **rows)
    formed, factorised = error_factor((height or 1) + 4), error_factor(order + 4)
    assert definiteness_margin(problem, order) == pytest.approx(
        4.0 * order * (formed + factorised), rel=1e-9, abs=0.0
    )
    split = np.full(order, 2.0)
    lost = 2.0 * definiteness_margin(problem, order) * column_norms(problem) ** 2
    np.testing.assert_allclose(provable_split(problem, split), split - lost, rtol=1e-15)


@pytest.mark.parametrize("n", [1, 7, 400])
@pytest.mark.parametrize("seed", range(30))
def test_the_rounding_of_the_kernels_is_the_sum_of_that_of_their_terms(seed, n):
    """A sum of n terms and a dozen additions around it; of the terms the largest that a set can have."""
    rng = np.random.default_rng([seed, n, 62])
    smooth = np.diag(np.abs(drawn(rng, n)))
    if seed % 3 == 0:
        # A diagonal that rounding has made negative bounds nothing.
        smooth -= 2.0 * np.diag(np.diagonal(smooth)) * (np.arange(n) % 2)
    linear, point, rest = drawn(rng, n), drawn(rng, n), drawn(rng, n)
    root = np.sqrt(np.maximum(np.diagonal(smooth), 0.0))
    reach = float(root @ np.abs(point))
    unit = UNIT_ROUNDOFF * (n + 12)
    size = root * reach + np.abs(linear) + np.abs(rest)
    for count in {1, max(n // 2, 1), n}:
        largest = np.sort(root)[n - count :].sum()
        counted = reach**2 + np.sort(size)[n - count :].sum() + (reach + largest) ** 2
        found = simplex.linearisation_rounding(smooth, linear, point, rest, count)
        assert unit * counted <= found <= 1.1 * UNIT_ROUNDOFF * (n + 16) * counted
        gamma = UNIT_ROUNDOFF * (n + 16)
        terms = np.abs(rest) * size + gamma * size**2
        counted = reach**2 + np.sort(terms)[n - count :].sum()
        found = perspective.dual_rounding(smooth, linear, point, rest, count)
        assert unit * counted <= found <= 1.2 * gamma * counted


def test_a_residual_that_vanishes_may_be_of_the_size_of_its_rounding():
    """The square of the error, which nothing else counts then."""
    for n in (3, 300):
        linear = np.full(n, 2.0)
        found = perspective.dual_rounding(np.zeros((n, n)), linear, np.zeros(n), np.zeros(n), 2)
        gamma = UNIT_ROUNDOFF * (n + 16)
        assert gamma**2 * 8.0 <= found <= 1.2 * gamma**2 * 8.0


@pytest.mark.parametrize("n", [3, 60])
@pytest.mark.parametrize("seed", range(20))
def test_the_errors_of_a_linear_certificate_are_the_sum_of_those_of_its_terms(seed, n):
    problem, rng = terms_in_turn(seed, n)
    above, below = np.abs(drawn(rng, n * n)).reshape(n, n), np.abs(drawn(rng, n * n)).reshape(n, n)
    degree = drawn(rng, n)
    certificate = LinearCertificate(relaxation="rlt", above=above, below=below, degree=degree)
    line = certificate.linearisation(problem, Fixing.by_count(problem))
    w, g = problem.weights, problem.gradient_or_zero
    height = 1 if problem.rows is None else len(problem.rows)
    gamma, eight = error_factor(height + 8), error_factor(8)
    reach = column_norms(problem) * np.abs(w)
    costs = problem.dense_hessian() * np.outer(w, w)
    base = lost = 0.0
    pairs = list(itertools.combinations(range(n), 2))
    length = error_factor(len(pairs) + n + 16)
    for i, j in pairs:
        parts = [costs[i, j], -above[i, j], below[i, j], below[j, i], degree[i], degree[j]]
        charged = min(sum(parts), 0.0)
        base += charged - above[i, j]
        lost += gamma * reach[i] * reach[j] + eight * float(np.abs(parts).sum())
        lost += length * (abs(charged) + above[i, j])
    assert line.base == pytest.approx(base, rel=1e-9, abs=0.0)
    assert line.lost == pytest.approx(lost, rel=1e-9, abs=0.0)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        pushed = sum(above[min(i, j), max(i, j)] for j in others)
        parts = [0.5 * costs[i, i], -g[i] * w[i], pushed, -sum(below[i, j] for j in others)]
        parts.append(-(problem.n_prune - 1) * degree[i])
        assert line.cost[i] == pytest.approx(sum(parts), rel=1e-9, abs=1e-12 * float(np.abs(parts).sum()))
        error = gamma * reach[i] ** 2 + length * float(np.abs(parts).sum())
        assert line.error[i] == pytest.approx(error, rel=1e-9, abs=0.0)


@pytest.mark.parametrize("n", [1, 8, 60])
def test_the_least_eigenvalue_is_proved_by_either_way(n, monkeypatch):
    """Small forms by all eigenvalues, large ones by a share of an estimate that a factorisation confirms."""
    rng = np.random.default_rng([n, 63])
    linear = rng.normal(size=n)
    for largest, small in ((n, True), (n - 1, False)):
        monkeypatch.setattr("formulations.dense_forms.EIGENVALUES_LARGEST", largest)
        for decades in (0.0, 3.0, 9.0):
            rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
            eigenvalues = 10.0 ** np.linspace(-decades, 0.0, n)[::-1]
            matrix = (rotation * eigenvalues) @ rotation.T
            matrix = np.ascontiguousarray(0.5 * (matrix + matrix.T))
            lowest, minimiser = _lowest_and_minimiser(matrix, linear, 0.0)
            true = float(eigenvalues[-1])
            lost = n * UNIT_ROUNDOFF * float(eigenvalues[0])
            if small:
                assert true - 8.0 * lost - 1e-15 <= lowest <= true - lost
            else:
                # An estimate is at most twice the eigenvalue; the margin is that of a factorisation.
                assert 0.2 * true - 4.0 * n * error_factor(n + 8) <= lowest < true
            wanted = np.linalg.solve(matrix, linear)
            np.testing.assert_allclose(minimiser, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
        for matrix in (-np.eye(n), np.ones((n, n)) - np.eye(n) - 1e-3):
            lowest, minimiser = _lowest_and_minimiser(matrix, linear, 0.0)
            assert lowest <= 0.0
            assert not minimiser.any()
        exact, _ = _lowest_and_minimiser(np.eye(n), linear, 0.0)
        lost = 4.0 * n * UNIT_ROUNDOFF if small else 0.5 + 2.0 * n * error_factor(n + 8)
        assert 1.0 - exact == pytest.approx(lost, abs=3e-16)
    # What is known by itself is not estimated.
    assert _lowest_and_minimiser(np.eye(n), linear, 0.125)[0] == 0.125


def test_a_form_of_few_rows_rests_on_its_damping(monkeypatch):
    monkeypatch.setattr("formulations.dense_forms.EIGENVALUES_LARGEST", 0)
    rng = np.random.default_rng(64)
    for height, few in ((3, True), (6, False), (40, False)):
        rows = rng.normal(size=(height, 6))
        problem = BlockProblem(weights=np.ones(6), rows=rows, damping=0.5, n_prune=2)
        form = joint_form(problem)
        lowest = 6.0 / form.rounding.growth**2
        least = 0.5 / float(problem.hessian_diagonal().max())
        if few:
            assert least * (1.0 - 1e-8) <= lowest < least
        else:
            assert lowest > 1.001 * least or lowest < 0.999 * least


def test_a_form_whose_least_eigenvalue_is_within_its_rounding_has_no_allowance():
    """Forming the matrix moves an eigenvalue by n gamma at most."""
    n = 4
    gamma = error_factor(2 * 1 + 12 * n + 64)
    for share, proved in ((0.5, False), (3.0, True)):
        hessian = np.full((n, n), 1.0 - share * n * gamma) + share * n * gamma * np.eye(n)
        problem = BlockProblem(weights=np.ones(n), hessian=hessian, damping=0.0, n_prune=2)
        assert math.isfinite(joint_form(problem).rounding.growth) == proved


def test_the_forms_of_a_hessian_count_one_rounding_of_its_own():
    problem = BlockProblem(weights=np.ones(4), hessian=2.0 * np.eye(4), damping=0.0, n_prune=2)
    for form in (joint_form(problem), selection_form(problem)):
        assert form.rounding.gamma == error_factor(2 * 1 + 12 * 4 + 64)


def test_a_form_of_a_singular_matrix_is_refused():
    problem = BlockProblem(weights=np.ones(3), hessian=np.ones((3, 3)), damping=0.0, n_prune=1)
    with pytest.raises(NotPositiveDefiniteError):
        joint_form(problem)
    assert selection_form(problem).rounding.growth == 0.0


def test_a_form_has_room_for_what_underflows_and_for_the_rounding_of_its_minimiser():
    nothing = BlockProblem(weights=np.zeros(3), rows=np.zeros((1, 3)), damping=1.0, n_prune=1)
    for form in (joint_form(nothing), selection_form(nothing)):
        assert 1e-300 * (1.0 - 1e-9) <= form.rounding.allowance(0.0) * form.scale <= 1e-299
    # Columns of one norm: the minimiser is that of the scaled weights, all of one size.
    problem = BlockProblem(weights=np.ones(4), rows=np.eye(4), damping=3.0, n_prune=2)
    assert 1.0 + 5e-7 <= joint_form(problem).rounding.one_norm / 4.0 <= 1.0 + 2e-6


@pytest.mark.parametrize("above", [False, True])
def test_an_eigenvalue_that_rounding_may_take_away_proves_nothing(monkeypatch, above):
    """The least eigenvalue less n gamma is 0, or the next number above it."""
    problem = BlockProblem(weights=np.ones(4), hessian=np.eye(4), damping=0.0, n_prune=2)
    lost = 4 * error_factor(2 * 1 + 12 * 4 + 64)
    lowest = math.nextafter(lost, 1.0) if above else lost
    monkeypatch.setattr("formulations.dense_forms._lowest_and_minimiser", lambda *_: (lowest, np.ones(4)))
    assert math.isfinite(joint_form(problem).rounding.growth) == above


class Line(RelaxationCertificate):
    """A certificate that states its line."""

    chosen_are_kept = True
    kind = "line"

    def __init__(self, cost, error=0.0, base=0.0, lost=0.0, **more):
        super().__init__(**more)
        cost = np.array(cost)
        line = Linearisation(base=base, lost=lost, cost=cost, error=np.broadcast_to(error, cost.shape))
        object.__setattr__(self, "line", line)

    def linearisation(self, problem, given):
        return self.line


@pytest.mark.parametrize("n", [4, 5, 200])
def test_a_bound_pays_for_the_sum_of_its_costs(n):
    """What is added up cancels, so that the allowance alone is left: n terms and some around them."""
    problem = BlockProblem(weights=np.ones(n), rows=np.eye(n), damping=1.0, n_prune=n - 3)
    gamma = error_factor(n + 16)
    one = np.arange(n) < 2
    fixing = Fixing(keep=one, prune=one & ~one, cutoff=300.0)
    basis = Line(np.where(one, -1e3, 0.0), base=2e3, fixing=fixing)
    for chosen, free, base in ((64.0, 0.0, -60.0), (0.0, 64.0, 0.0), (0.5, 256.0, 0.0)):
        cost = np.full(n, -free)
        cost[:2] = chosen, -chosen
        line = Line(cost, base=base, basis=basis)
        exact_value = base - free
        lost = Fraction(exact_value) - Fraction(line.lower_bound(problem))
        counted = 2.0 * gamma * (2.0 * chosen + free)
        # As far as two numbers of the size of the value can tell.
        blur = 2.0 * UNIT_ROUNDOFF * abs(exact_value)
        assert abs(float(lost) - counted) <= blur + 1e-9 * counted
    assert Line(np.zeros(n)).lower_bound(problem) == -2e-300
    assert Line(np.zeros(n)).proves_bound(problem, -1.5e-300)
    assert not Line(np.zeros(n)).proves_bound(problem, math.nextafter(-1.5e-300, 0.0))


def test_a_bound_with_one_cost_in_place_of_another_is_rounded_down():
    for bound, new, old in (
        (1.0, 0.0, 0.0),
        (-1.0, 0.0, 0.0),
        (0.0, 8.0, 8.0),
        (0.0, -8.0, -8.0),
        (3.0, 1.0, -2.0),
    ):
        lost = bound + (new - old) - float(_rise(bound, new, old))
        size = abs(bound) + abs(new) + abs(old)
        assert abs(lost - error_factor(8) * size) <= 2.0 * UNIT_ROUNDOFF * abs(bound + new - old)


def test_a_weight_is_fixed_only_where_the_cutoff_is_exceeded():
    """The other way it has exactly the cutoff: a set as good may have it so."""
    problem = BlockProblem(weights=np.ones(4), rows=np.eye(4), damping=1.0, n_prune=2)
    line = Line([-5.0, -3.0, 2.0, 7.0])
    bound = line.lower_bound(problem)
    leave = [float(_rise(bound, 2.0, old)) for old in (-5.0, -3.0)]
    enter = [float(_rise(bound, new, -3.0)) for new in (2.0, 7.0)]
    for place, value in ((0, leave[0]), (1, leave[1]), (2, enter[0]), (3, enter[1])):
        at, below = (
            line.fixed_below(problem, value),
            line.fixed_below(problem, math.nextafter(value, -math.inf)),
        )
        assert at.free[place]
        assert not below.free[place]
        assert (below.keep if place < 2 else below.prune)[place]
    for n_prune, kept in ((0, True), (4, False), (1, None)):
        fixing = Fixing.by_count(replace(problem, n_prune=n_prune))
        assert fixing.keep.all() == (kept is True) == fixing.keep.any()
        assert fixing.prune.all() == (kept is False) == fixing.prune.any()
        assert fixing.cutoff == math.inf


def test_what_is_singular_or_has_no_damping_is_reduced_and_bounded_all_the_same():
    """Without damping nothing may be divided by it; with as many rows as weights they are still rows."""
    rng = np.random.default_rng(65)
    for height in (5, 6, 9):
        for damping in (0.0, 0.5):
            if height < 6 and damping == 0.0:
                continue
            rows = rng.normal(size=(height, 6))
            problem = BlockProblem(weights=rng.normal(size=6), rows=rows, damping=damping, n_prune=3)
            keep = np.arange(6) < 2
            reduced = reduced_block(problem, "joint", Fixing(keep=keep, prune=keep & ~keep, cutoff=1e3))
            assert (reduced.problem.rows is not None) == (damping > 0.0 and height <= 6)
            best = enumerate_optimum(reduced.problem, "joint")
            value = objective(problem, reduced.lifted(best.keep), "joint")
            assert best.objective + reduced.offset == pytest.approx(value, rel=1e-7)
            single = replace(problem, n_prune=0)
            bound = only_set_certificate(single, "joint").lower_bound(single)
            assert -1e-9 <= bound <= 0.0
    lowest, minimiser = _lowest_and_minimiser(np.zeros((3, 3)), np.ones(3), 0.0)
    assert lowest == 0.0
    assert not minimiser.any()
    problem = BlockProblem(weights=np.ones(3), rows=np.eye(3), damping=1.0, n_prune=1)
    for split in ([0.5, 0.0, 0.5], [0.5, 0.5, -0.1]):
        assert (
            PerspectiveCertificate(point=np.ones(3), split=np.array(split)).lower_bound(problem) == -math.inf
        )
    assert PerspectiveCertificate(point=np.ones(3), split=np.full(3, 0.5)).lower_bound(problem) > -math.inf


def test_where_all_are_chosen_the_bound_is_the_sum_of_their_costs():
    problem = BlockProblem(weights=np.ones(5), rows=np.eye(5), damping=1.0, n_prune=3)
    two = np.arange(5) < 2
    fixing = Fixing(keep=two, prune=two & ~two, cutoff=-150.0)
    basis = Line(np.where(two, -100.0, 100.0), fixing=fixing)
    line = Line([-3.0, 5.0, -70.0, -80.0, -90.0], base=-300.0, basis=basis)
    assert line.lower_bound(problem) == pytest.approx(-298.0, rel=1e-12)
    # No bound that rests on fixings is above what they hold for.
    assert Line([-3.0, 5.0, 0.0, 0.0, 0.0], base=300.0, basis=basis).lower_bound(problem) == -150.0


def test_a_certificate_is_proved_on_the_weights_that_matter_alone():
    """Joint: on all that are not pruned. Selection: on those that are neither."""
    weights = np.array([1.0, -2.0, 3.0])
    problem = BlockProblem(weights=weights, rows=np.ones((1, 3)), damping=0.5, n_prune=1)
    nothing, last = np.zeros(3, dtype=bool), np.arange(3) == 2
    split = np.array([0.5, 0.5, 9.0])
    joint = PerspectiveCertificate(point=weights, split=split)
    selection = CappedSimplexCertificate(point=np.ones(3), shift=split * weights**2 * (1.0 - 1e-9))
    for keep, prune, proved in ((nothing, nothing, ()), (nothing, last, (0, 1)), (last, nothing, (1,))):
        given = Fixing(keep=keep, prune=prune, cutoff=math.inf)
        for place, certificate in enumerate((joint, selection)):
            assert (certificate.linearisation(problem, given) is not None) == (place in proved)
    free = Fixing.by_count(problem)
    for shape in ((2,), (4,)):
        short = np.full(shape, 0.25)
        for other in (
            replace(joint, point=short),
            replace(joint, split=short),
            replace(joint, point=short, split=short),
            replace(selection, point=short),
            replace(selection, shift=short),
        ):
            assert other.linearisation(problem, free) is None


def test_a_shift_is_proved_up_to_the_damping_in_exact_arithmetic():
    """With one row nothing but the damping proves a shift: a quotient rounded down proves too much."""
    said = {True: 0, False: 0}
    for seed in range(60):
        rng = np.random.default_rng([seed, 66])
        weights, damping = rng.normal(size=3), float(rng.uniform(0.1, 1.0))
        problem = BlockProblem(weights=weights, rows=np.ones((1, 3)), damping=damping, n_prune=1)
        given = Fixing.by_count(problem)
        for ulps in (-20, -4, -3, -2, -1, 0, 1, 2):
            shift = damping * weights**2 * (1.0 + ulps * 2.0 * UNIT_ROUNDOFF)
            certificate = CappedSimplexCertificate(point=np.ones(3), shift=shift)
            proved = certificate.linearisation(problem, given) is not None
            valid = all(
                Fraction(u) <= Fraction(damping) * Fraction(w) ** 2
                for u, w in zip(shift.tolist(), weights.tolist(), strict=True)
            )
            said[proved] += 1
            assert valid or not proved
            assert proved or ulps > -20
    assert min(said.values()) > 50


def test_a_weight_too_small_to_be_squared_has_no_shift():
    problem = BlockProblem(weights=np.array([1e-80, 1.0, 2.0]), rows=np.eye(3), damping=1.0, n_prune=1)
    small = np.arange(3) == 0
    for shift, given, proved in (
        (1e-200, None, False),
        (0.0, None, True),
        (-1e-200, None, True),
        (1e-200, Fixing(keep=small, prune=small & ~small, cutoff=math.inf), True),
    ):
        certificate = CappedSimplexCertificate(point=np.ones(3), shift=shift * small)
        found = certificate.linearisation(problem, given or Fixing.by_count(problem))
        assert (found is not None) == proved


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_a_ridge_is_taken_off_the_weights_that_are_eliminated(ridge):
    rng = np.random.default_rng(67)
    keep, prune = np.arange(6) < 2, np.arange(6) == 2
    kept, free = np.flatnonzero(keep), np.array([3, 4, 5])
    for height in (4, 9):
        rows = rng.normal(size=(height, 6))
        problem = BlockProblem(weights=rng.normal(size=6), rows=rows, damping=0.5, n_prune=3)
        fixing = Fixing(keep=keep, prune=prune, cutoff=1.0)
        reduced = reduced_block(problem, "joint", fixing, ridge=ridge)
        matrix, target = problem.dense_hessian(), problem.linear_term()
        inner = matrix[np.ix_(kept, kept)] - ridge * np.eye(2)
        across = np.linalg.solve(inner, matrix[np.ix_(kept, free)])
        wanted = matrix[np.ix_(free, free)] - matrix[np.ix_(free, kept)] @ across
        np.testing.assert_allclose(reduced.problem.dense_hessian(), wanted, atol=1e-9)
        np.testing.assert_allclose(
            reduced.problem.linear_term(), target[free] - across.T @ target[kept], atol=1e-9
        )
        assert math.isfinite(reduced.allowance) == (ridge == 0.0 and height == 4)
        assert (reduced.problem.n_prune, reduced.free.tolist()) == (2, free.tolist())


def test_what_comes_out_of_a_reduced_block_claims_no_more_than_is_known():
    problem = BlockProblem(weights=np.arange(1.0, 6.0), rows=np.eye(5), damping=1.0, n_prune=2)
    fixing = Fixing(keep=np.arange(5) == 4, prune=np.zeros(5, dtype=bool), cutoff=1e6)
    for program in ("joint", "selection"):
        reduced = reduced_block(problem, program, fixing)
        solution = enumerate_optimum(reduced.problem, program)
        assert solution.proved
        lifted = reduced.lift(solution)
        assert lifted.bound is None
        assert not lifted.proved
        assert lifted.keep.tolist() == [False, False, True, True, True]
        if program == "joint":
            relaxed = lower_bound(problem, program).certificate
        else:
            relaxed = CappedSimplexCertificate(point=np.zeros(5), shift=np.zeros(5))
        proved = replace(reduced, certificate=relaxed)
        known = relaxed.lower_bound(problem)
        assert proved.lift(replace(solution, bound=None, termination=Termination.FEASIBLE)).bound == known
        for wrong in (replace(solution, keep=None), replace(solution, program="none")):
            with pytest.raises(ArgumentError, match=f"the {program} program"):
                proved.lift(wrong)
        again = proved.lift(solution)
        assert again.bound >= known
        assert again.rel_gap == solution.rel_gap
        # Where no gap was asked for, none is met by a bound below the value.
        assert proved.lift(replace(solution, rel_gap=None)).termination is Termination.FEASIBLE


def test_a_form_has_the_unit_of_its_costs_or_of_its_slopes_or_none():
    given = {"weights": np.array([1.0, -1.0]), "damping": 0.0, "n_prune": 1}
    for rows, gradient, scale in (
        (np.diag([2.0, 4.0]), None, 10.0),
        (np.diag([2.0, 4.0]), np.array([1.0, 3.0]), 10.0),
        (np.zeros((1, 2)), np.array([1.0, 3.0]), 2.0),
        (np.zeros((1, 2)), np.array([3.0, 1.0]), 2.0),
        (np.zeros((1, 2)), None, 1.0),
    ):
        form = selection_form(BlockProblem(rows=rows, gradient=gradient, **given))
        assert form.scale == scale
        slope = np.zeros(2) if gradient is None else np.array([-gradient[0], gradient[1]])
        np.testing.assert_allclose(form.linear * scale, slope)


@pytest.mark.parametrize("gradient", [None, np.array([0.0, 3.0])])
def test_a_unit_is_positive_where_weights_leave_nothing_but_costs_below_zero(gradient):
    """What rounding has made negative in a Hessian may be all that its weights of 0 leave of it."""
    problem = BlockProblem(
        weights=np.array([0.0, 1.0]), hessian=np.diag([1.0, -1e-12]), gradient=gradient, n_prune=1
    )
    form = selection_form(problem)
    assert form.scale == 0.5e-12
    np.testing.assert_allclose(form.matrix * form.scale, np.diag([0.0, -1e-12]))
    np.testing.assert_allclose(form.linear * form.scale, [0.0, -problem.gradient_or_zero[1]])


def test_an_eigenvalue_of_which_no_share_is_confirmed_is_not_known(monkeypatch):
    monkeypatch.setattr("formulations.dense_forms.EIGENVALUES_LARGEST", 0)
    monkeypatch.setattr("formulations.dense_forms._factorises", lambda matrix: False)
    assert _lowest_and_minimiser(np.eye(3), np.ones(3), 0.0)[0] == -math.inf
    tried = []
    monkeypatch.setattr("formulations.dense_forms._factorises", lambda matrix: bool(tried.append(matrix)))
    _lowest_and_minimiser(2.0 * np.eye(3), np.ones(3), 0.0)
    # Ever smaller shares of the eigenvalue are taken off the diagonal, and nothing off the rest.
    assert [round(2.0 - float(matrix[0, 0]), 12) for matrix in tried] == [1.0, 0.1, 0.01]
    for matrix in tried:
        np.testing.assert_allclose(matrix, matrix[0, 0] * np.eye(3), atol=1e-12)


def test_the_target_of_a_reduced_block_errs_by_its_product_and_by_the_difference(monkeypatch):
    told = []
    place = "formulations.relaxations.reduced_block.joint_allowance"
    monkeypatch.setattr(place, lambda problem, smaller, kept, free, target, *rest: told.append(target) or 0.0)
    rows, gradient = np.random.default_rng(68).normal(size=(3, 5)), np.array([1e3, -1e3, 1e-3, 0.0, -1e6])
    for weights in (np.ones(5), np.zeros(5)):
        problem = BlockProblem(weights=weights, rows=rows, damping=0.5, gradient=gradient, n_prune=2)
        keep = np.arange(5) < 2
        reduced_block(problem, "joint", Fixing(keep=keep, prune=keep & ~keep, cutoff=1e9))
        product = bounded_product(problem, weights, column_norms(problem))
        formed = np.abs(product.value) + np.abs(gradient)
        np.testing.assert_allclose(told[-1].error, product.error + error_factor(4) * formed, rtol=1e-9)
        np.testing.assert_allclose(told[-1].value, product.value - gradient, rtol=1e-12)
