"""What proofs say of their own rounding, against exact rational arithmetic.

Blocks are small, and chosen so that terms cancel: a bound on an error that is left out shows there.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from formulations import BlockProblem, Limits, Subject, Termination, Verdict, verify
from formulations.dense_forms import UNIT_ROUNDOFF, error_factor, joint_form, selection_form
from formulations.enumeration import enumerate_optimum
from formulations.incumbents import IncumbentPool
from formulations.loss import objective, solved_weights
from formulations.relaxations import lower_bound
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.certificate import Fixing, RelaxationCertificate
from formulations.relaxations.certified import (
    bounded_product,
    bounded_value,
    column_norms,
    definiteness_margin,
    largest_sum,
    provable_split,
    row_norms,
    split_is_valid,
    value_ceiling,
)
from formulations.relaxations.only_set import only_set_certificate
from formulations.relaxations.perspective import PerspectiveCertificate
from formulations.relaxations.reduced_block import reduced_block
from formulations.solvers.conclusion import Outcome, conclude
from tests.formulations.test_allowances import Line
from tests.stress.exact import ExactBlock

PROGRAMS = ("selection", "joint")
Exact = list[Fraction]


def exact(values) -> Exact:
    return [Fraction(float(value)) for value in values]


def cancelling(seed: int, n: int = 5) -> BlockProblem:
    """A block whose terms cancel, by a kind that the seed chooses, with rows or a Hessian."""
    rng = np.random.default_rng([seed, 31])
    rows = rng.normal(size=(int(rng.integers(2, 8)), n)) * 10.0 ** rng.uniform(-3, 3)
    if seed % 3 == 1:
        rows[:, 1] = -rows[:, 0] * (1.0 + 1e-14 * rng.normal(size=len(rows)))
    weights = rng.normal(size=n) * 10.0 ** rng.uniform(-4, 4, n)
    gradient = None
    if seed % 4 == 1:
        gradient = rows.T @ (rows @ weights)
    if seed % 4 == 2:
        gradient = rng.normal(size=n) * float((rows**2).sum())
    damping = float((rows**2).mean()) * 10.0 ** rng.uniform(-13, 1)
    if seed % 2:
        gram = rows.T @ rows
        model = {"hessian": 0.5 * (gram + gram.T)}
    else:
        model = {"rows": rows}
    return BlockProblem(
        weights=weights, damping=damping, gradient=gradient, n_prune=int(rng.integers(1, n)), **model
    )


def points(problem: BlockProblem, seed: int) -> Iterator[np.ndarray]:
    """Points where a product is large, and where it is nothing but rounding."""
    rng = np.random.default_rng([seed, 32])
    yield rng.normal(size=problem.n)
    yield problem.weights * rng.normal(size=problem.n)
    yield problem.weights
    hessian = problem.dense_hessian()
    _, vectors = np.linalg.eigh(hessian)
    yield vectors[:, 0] * 10.0 ** rng.uniform(-6, 6)


@pytest.mark.parametrize("seed", range(12))
def test_a_product_is_within_its_error_and_the_error_covers_the_worst_order_of_summation(seed):
    problem = cancelling(seed)
    block = ExactBlock(problem)
    norms = column_norms(problem)
    for x in points(problem, seed):
        found = bounded_product(problem, x, norms)
        image = [sum(h * z for h, z in zip(row, exact(x), strict=True)) for row in block.hessian]
        for value, error, true in zip(found.value, found.error, image, strict=True):
            assert abs(Fraction(float(value)) - true) <= Fraction(float(error))
        if problem.rows is None:
            worst = problem.n * UNIT_ROUNDOFF * (np.abs(problem.dense_hessian()) @ np.abs(x))
        else:
            m, size = len(problem.rows), np.abs(problem.rows)
            worst = problem.n * UNIT_ROUNDOFF * (size.T @ (size @ np.abs(x)))
            worst += m * UNIT_ROUNDOFF * (size.T @ np.abs(problem.rows @ x))
            worst += UNIT_ROUNDOFF * problem.damping * np.abs(x)
        assert (found.error >= 0.999 * worst).all()
        assert (found.error <= 1e4 * UNIT_ROUNDOFF * norms * float(norms @ np.abs(x)) + 1e-300).all()


def test_the_error_of_a_product_covers_what_a_tall_block_sums_up():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20_000, 2))
    rows[:, 1] -= rows[:, 0] * float(rows[:, 0] @ rows[:, 1]) / float(rows[:, 0] @ rows[:, 0])
    problem = BlockProblem(weights=np.ones(2), rows=rows, damping=1e-9, n_prune=1)
    found = bounded_product(problem, np.array([1.0, 0.0]), column_norms(problem))
    length = float(np.linalg.norm(rows[:, 0]) * np.linalg.norm(rows[:, 1]))
    assert found.error[1] >= 20_000 * UNIT_ROUNDOFF * length
    assert found.error[1] <= 60_000 * UNIT_ROUNDOFF * length


def test_many_columns_are_summed_in_chunks_whose_error_is_counted():
    rng = np.random.default_rng(1)
    problem = BlockProblem(weights=np.ones(600), rows=rng.normal(size=(2, 600)), damping=1e-6, n_prune=1)
    x = rng.normal(size=600)
    found = bounded_product(problem, x, column_norms(problem))
    np.testing.assert_allclose(found.value, problem.hessian_product(x), rtol=1e-10, atol=1e-10)
    size = np.abs(problem.rows)
    assert (found.error >= 256 * UNIT_ROUNDOFF * (size.T @ (size @ np.abs(x))) / math.sqrt(600)).all()


@pytest.mark.parametrize("seed", range(8))
def test_norms_lie_above_the_diagonal_they_are_the_root_of(seed):
    problem = cancelling(seed)
    norms = column_norms(problem)
    diagonal = [row[i] for i, row in enumerate(ExactBlock(problem).hessian)]
    for norm, entry in zip(exact(norms), diagonal, strict=True):
        assert entry <= norm**2 <= entry * Fraction(1.00001)
    if problem.rows is not None:
        for norm, column in zip(exact(row_norms(problem, norms)), problem.rows.T, strict=True):
            square = sum(entry * entry for entry in exact(column))
            assert square <= norm**2 <= square + (square + Fraction(problem.damping)) / 10**5


@pytest.mark.parametrize("seed", range(16))
def test_the_loss_of_a_point_is_within_its_error(seed):
    problem = cancelling(seed)
    block = ExactBlock(problem)
    keep = np.arange(problem.n) % 2 == 0
    candidates = [np.where(keep, problem.weights, 0.0), *points(problem, seed)]
    candidates.append(problem.weights * (1.0 + 1e-15 * np.arange(problem.n)))
    for new in candidates:
        value, error = bounded_value(problem, new)
        true = block.loss(new.tolist())
        assert abs(Fraction(value) - true) <= Fraction(error)
        assert true <= Fraction(value_ceiling(problem, new))
        step = np.abs(new - problem.weights)
        reach = float(column_norms(problem) @ step) ** 2 + float(np.abs(problem.gradient_or_zero) @ step)
        assert error <= 1e3 * UNIT_ROUNDOFF * reach
        # On top of the product's: the step is rounded before it, and inner products after it.
        found = bounded_product(problem, new - problem.weights, column_norms(problem))
        least = float(step @ found.error) + 2.0 * UNIT_ROUNDOFF * reach
        least += problem.n * UNIT_ROUNDOFF * float(step @ np.abs(found.value))
        assert error >= 0.999 * least


def test_a_split_called_valid_leaves_no_negative_eigenvalue():
    """By Sylvester's rule in exact arithmetic, on matrices that are singular up to rounding."""
    said = {True: 0, False: 0}
    for seed in range(150):
        rng = np.random.default_rng([seed, 33])
        n = int(rng.integers(2, 6))
        rows = rng.normal(size=(max(n - 1, 1), n))
        gram = rows.T @ rows
        problem = BlockProblem(weights=np.ones(n), hessian=0.5 * (gram + gram.T), damping=0.0, n_prune=1)
        norms = column_norms(problem)
        scale = [0.0, 1e-16, -1e-16, -1e-15, -1e-13, -1e-12][seed % 6]
        split = scale * np.diagonal(gram)
        part = np.ones(n, dtype=bool)
        valid = split_is_valid(problem, split, norms, part)
        said[valid] += 1
        if valid:
            shifted = [row[:] for row in ExactBlock(problem).hessian]
            for i, entry in enumerate(exact(split)):
                shifted[i][i] -= entry
            assert _semidefinite(shifted), (seed, scale)
    assert min(said.values()) > 20


def test_the_margin_of_a_split_is_that_of_forming_and_factorising():
    for m, order in ((1, 3), (40, 3), (5, 30)):
        problem = BlockProblem(weights=np.ones(order), rows=np.ones((m, order)), damping=1.0, n_prune=1)
        margin = definiteness_margin(problem, order)
        # Forming: m u of the diagonal in every entry; factorising: (n + 1) u (Higham 2002, theorem 10.5).
        assert (
            order * (m + order + 1) * UNIT_ROUNDOFF <= margin <= 40 * order * (m + order + 10) * UNIT_ROUNDOFF
        )
    problem = BlockProblem(weights=np.ones(4), hessian=np.eye(4), n_prune=1)
    assert 4 * 5 * UNIT_ROUNDOFF <= definiteness_margin(problem, 4) <= 1e3 * UNIT_ROUNDOFF
    split = np.full(4, 0.5)
    given_way = provable_split(problem, split)
    assert (given_way < split).all()
    assert (given_way > split - 1e-11).all()
    assert split_is_valid(problem, given_way, column_norms(problem), np.ones(4, dtype=bool))
    assert not split_is_valid(problem, np.full(4, 1.1), column_norms(problem), np.ones(4, dtype=bool))
    rows = BlockProblem(weights=np.ones(4), rows=np.eye(4), damping=0.5, n_prune=1)
    assert provable_split(rows, split) is split
    assert provable_split(rows, 1.5 * split) is not split
    assert split_is_valid(rows, split, column_norms(rows), np.ones(4, dtype=bool))
    assert not split_is_valid(rows, np.full(4, 1.6), column_norms(rows), np.ones(4, dtype=bool))
    half = np.array([True, True, False, False])
    assert split_is_valid(rows, np.array([0.5, 0.5, 9.0, 9.0]), column_norms(rows), half)
    assert split_is_valid(rows, np.array([1.4, 1.4, 9.0, 9.0]), column_norms(rows), half)
    assert split_is_valid(rows, np.full(4, 9.0), column_norms(rows), np.zeros(4, dtype=bool))


def _semidefinite(matrix: list[list[Fraction]]) -> bool:
    """Whether a symmetric matrix is positive semidefinite, by exact elimination with pivoting."""
    rest = [row[:] for row in matrix]
    while rest:
        diagonal = [row[i] for i, row in enumerate(rest)]
        pivot = max(range(len(rest)), key=diagonal.__getitem__)
        if min(diagonal) < 0:
            return False
        if diagonal[pivot] == 0:
            return all(entry == 0 for row in rest for entry in row)
        lead = rest[pivot]
        rest = [
            [row[j] - row[pivot] * lead[j] / lead[pivot] for j in range(len(row)) if j != pivot]
            for i, row in enumerate(rest)
            if i != pivot
        ]
    return True


def exact_line(
    problem: BlockProblem, certificate: RelaxationCertificate, given: Fixing
) -> tuple[Fraction, Exact]:
    """Base and costs of the underestimate of a certificate, as the docstrings of their classes state them."""
    block = ExactBlock(problem)
    w, g = block.weights, block.gradient
    if isinstance(certificate, PerspectiveCertificate):
        d = exact(certificate.split)
        u = exact(np.where(given.prune, 0.0, certificate.point))
        smooth = [row[:] for row in block.hessian]
        for i, entry in enumerate(d):
            smooth[i][i] -= entry
        image = [_dot(row, u) for row in smooth]
        target = [_dot(row, w) - gi for row, gi in zip(block.hessian, g, strict=True)]
        base = _dot(w, [_dot(row, w) for row in block.hessian]) / 2 - _dot(g, w) - _dot(u, image) / 2
        costs = [-((b - q) ** 2) / (2 * di) for b, q, di in zip(target, image, d, strict=True)]
        return base, costs
    assert isinstance(certificate, CappedSimplexCertificate)
    shift = exact(certificate.shift)
    y = exact(np.where(given.prune, 1.0, np.where(given.keep, 0.0, certificate.point)))
    x = [wi * yi for wi, yi in zip(w, y, strict=True)]
    image = [_dot(row, x) for row in block.hessian]
    costs = [
        wi * h - ui * yi - gi * wi + ui / 2 for wi, h, ui, yi, gi in zip(w, image, shift, y, g, strict=True)
    ]
    return -_dot(x, image) / 2 + sum(ui * yi * yi for ui, yi in zip(shift, y, strict=True)) / 2, costs


def _dot(first: Exact, second: Exact) -> Fraction:
    return sum((a * b for a, b in zip(first, second, strict=True)), Fraction(0))


def certificates(problem: BlockProblem, seed: int) -> Iterator[RelaxationCertificate]:
    """Certificates of either program: those of the relaxation, and at points where costs cancel."""
    rng = np.random.default_rng([seed, 34])
    diagonal = problem.hessian_diagonal()
    small = float(problem.damping) * np.ones(problem.n)
    target = problem.linear_term()
    for split in (small, 0.3 * diagonal):
        for point in (problem.weights, rng.normal(size=problem.n), *_stationary(problem, target, split)):
            yield PerspectiveCertificate(point=point, split=split)
    for shift in (small * problem.weights**2, -diagonal * problem.weights**2, np.zeros(problem.n)):
        for point in (rng.random(problem.n), rng.normal(size=problem.n), np.ones(problem.n)):
            yield CappedSimplexCertificate(point=point, shift=shift)


def _stationary(problem: BlockProblem, target: np.ndarray, split: np.ndarray) -> Iterator[np.ndarray]:
    """The point where all residuals of the perspective bound vanish but for rounding."""
    smooth = problem.dense_hessian() - np.diag(split)
    yield np.linalg.lstsq(smooth, target)[0]


@pytest.mark.parametrize("seed", range(24))
def test_base_and_costs_of_a_certificate_are_within_their_errors(seed):
    problem = cancelling(seed)
    norms = column_norms(problem)
    keep = np.arange(problem.n) == 0
    givens = [Fixing.by_count(problem), Fixing(keep=keep, prune=np.roll(keep, 1), cutoff=math.inf)]
    for certificate, given in itertools.product(certificates(problem, seed), givens):
        line = certificate.underestimate(problem, given, norms)
        base, costs = exact_line(problem, certificate, given)
        assert abs(Fraction(line.base) - base) <= Fraction(line.lost)
        for cost, error, true in zip(exact(line.cost), exact(line.error), costs, strict=True):
            assert abs(cost - true) <= error


@pytest.mark.parametrize("seed", range(12))
def test_the_errors_of_a_certificate_cover_the_rounding_of_every_term(seed):
    """Entry by entry: the product, what it is added to, and the square or the weight it is multiplied by."""
    problem = cancelling(seed)
    norms = column_norms(problem)
    given = Fixing.by_count(problem)
    u0 = UNIT_ROUNDOFF
    w, g = problem.weights, problem.gradient_or_zero
    for certificate in certificates(problem, seed):
        line = certificate.underestimate(problem, given, norms)
        if isinstance(certificate, PerspectiveCertificate):
            u, d = certificate.point, certificate.split
            change = bounded_product(problem, w - u, norms)
            residual = np.abs(change.value - g + d * u)
            moved = change.error + u0 * norms * float(norms @ (np.abs(w) + np.abs(u)))
            blur = moved + u0 * (np.abs(change.value) + np.abs(g) + d * np.abs(u))
            least = (residual * blur + 0.5 * blur**2 + u0 * residual**2) / d
            terms = np.abs(w + u) @ moved + u0 * (np.abs(g) @ np.abs(w) + d @ u**2)
            terms += u0 * (np.abs(w + u) @ np.abs(change.value))
        else:
            y, shift = certificate.point, certificate.shift
            product = bounded_product(problem, w * y, norms)
            moved = product.error + u0 * norms * float(norms @ np.abs(w * y))
            least = np.abs(w) * moved + u0 * (np.abs(shift) * (np.abs(y) + 0.5) + np.abs(g * w))
            least += u0 * np.abs(w * product.value)
            terms = np.abs(w * y) @ moved + u0 * (np.abs(shift) @ y**2)
            terms += u0 * (np.abs(w * y) @ np.abs(product.value))
        assert (line.error >= 0.999 * least).all()
        assert line.lost >= 0.499 * terms
        assert (line.error <= 100.0 * least + 1e-300).all()
        assert line.lost <= 100.0 * terms + 1e-300


def values(problem: BlockProblem, program: str) -> dict[tuple[int, ...], Fraction]:
    """The exact value of every kept set of the right size."""
    block = ExactBlock(problem)
    found = {}
    for kept in itertools.combinations(range(problem.n), problem.n_keep):
        if program == "joint":
            value = block.joint_value(kept)
        else:
            keep = np.isin(np.arange(problem.n), kept)
            value = block.loss(np.where(keep, problem.weights, 0.0).tolist())
        assert value is not None
        found[kept] = value
    return found


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", range(10))
def test_bound_and_fixings_hold_for_every_set(seed, program):
    problem = cancelling(seed)
    problem = replace(problem, damping=max(problem.damping, 1e-3 * float(problem.hessian_diagonal().mean())))
    every = values(problem, program)
    best = min(every.values())
    relaxed = lower_bound(problem, program).certificate
    subject = Subject.of(problem, program)
    assert relaxed.subject == subject
    assert relaxed.lower_bound(problem) <= best
    for cutoff in (float(best), float(best) + 0.05 * abs(float(best)), float(max(every.values()))):
        fixing = relaxed.fixed_below(problem, cutoff)
        assert fixing.cutoff == cutoff
        assert not (fixing.keep & fixing.prune).any()
        _obeyed(every, fixing, cutoff)
        rests = replace(relaxed, fixing=None, basis=replace(relaxed, fixing=fixing))
        assert rests.lower_bound(problem) <= best
        again = rests.fixed_below(problem, cutoff)
        assert (again.keep >= fixing.keep).all()
        assert (again.prune >= fixing.prune).all()
        _obeyed(every, again, cutoff)
        assert rests.fixed_below(problem, cutoff + 1.0 + abs(cutoff)) is None


def _obeyed(every, fixing, cutoff):
    for kept, value in every.items():
        if value <= Fraction(cutoff):
            keep = np.isin(np.arange(fixing.keep.size), kept)
            assert keep[fixing.keep].all()
            assert not keep[fixing.prune].any()


@pytest.mark.parametrize("relaxation", ["mccormick", "rlt"])
@pytest.mark.parametrize("seed", range(6))
def test_a_linear_certificate_underestimates_every_set(seed, relaxation):
    problem = cancelling(seed)
    certificate = lower_bound(problem, "selection", relaxation=relaxation).certificate
    line = certificate.linearisation(problem, Fixing.by_count(problem))
    every = values(problem, "selection")
    for kept, value in every.items():
        pruned = [i for i in range(problem.n) if i not in kept]
        lost = Fraction(line.lost) + sum(exact(line.error[pruned]))
        assert Fraction(line.base) + sum(exact(line.cost[pruned])) - lost <= value
    assert certificate.lower_bound(problem) <= min(every.values())
    reach = (column_norms(problem) @ np.abs(problem.weights)) ** 2
    pairs = problem.n * (problem.n - 1) // 2
    assert line.lost >= (pairs + problem.n) * UNIT_ROUNDOFF * float(np.triu(certificate.above, 1).sum())
    assert line.lost + line.error.sum() >= UNIT_ROUNDOFF * float(np.abs(line.cost).sum())
    assert line.lost + line.error.sum() <= 1e-11 * (reach + np.abs(line.cost).sum() + abs(line.base))


@pytest.mark.parametrize("program", PROGRAMS)
def test_equal_weights_are_never_fixed_against_each_other(program):
    """Two columns are the same: a set as good has the one or the other."""
    for seed in range(8):
        rng = np.random.default_rng([seed, 35])
        rows, weights = rng.normal(size=(9, 5)), rng.normal(size=5)
        rows[:, 1], weights[1] = rows[:, 0], weights[0]
        problem = BlockProblem(weights=weights, rows=rows, damping=1.0, n_prune=2)
        every = values(problem, program)
        best = min(every.values())
        least = lower_bound(problem, program, incumbent=enumerate_optimum(problem, program)).certificate
        for cutoff in (float(best), math.nextafter(float(best), math.inf)):
            _obeyed(every, least.fixed_below(problem, cutoff), cutoff)


def test_a_bound_is_lowered_by_the_errors_of_the_costs_that_a_set_can_have():
    """Twice by those of the chosen and by the largest of the free, and by that of the base."""
    problem = BlockProblem(weights=np.ones(5), rows=np.eye(5), damping=1.0, n_prune=3)
    error = np.array([1.0, 8.0, 2.0, 4.0, 0.0])
    for given, lost in ((None, 12.0), (0, 9.0), (4, 8.0)):
        basis = None
        if given is not None:
            one = np.arange(5) == given
            cost = np.where(one, -100.0, 0.0)
            basis = Line(cost, fixing=Fixing(keep=one, prune=np.zeros(5, dtype=bool), cutoff=-50.0))
            assert basis.proves_fixing(problem)
        line = Line(np.full(5, -200.0), error, basis=basis, lost=0.5, base=7.0)
        assert line.lower_bound(problem) == pytest.approx(7.0 - 400.0 - 2.0 * (lost + 0.5), rel=1e-9, abs=0.0)
        assert line.proves_bound(problem, 7.0 - 400.0 - 1.6 * (lost + 0.5))
        assert not line.proves_bound(problem, 7.0 - 400.0 - 1.4 * (lost + 0.5))
    assert Line(np.full(5, 1e16)).lower_bound(problem) < 2e16 * (1.0 - 2.0 * UNIT_ROUNDOFF * 5)


def test_once_all_are_chosen_the_others_are_fixed_too():
    problem = BlockProblem(weights=np.ones(5), rows=np.eye(5), damping=1.0, n_prune=3)
    two, three = np.arange(5) < 2, np.arange(5) > 1
    nothing = np.zeros(5, dtype=bool)
    for keep, prune in ((two, nothing), (nothing, three)):
        basis = Line(np.where(two, -100.0, 100.0), fixing=Fixing(keep=keep, prune=prune, cutoff=-150.0))
        found = Line(np.zeros(5), base=-200.0, basis=basis).fixed_below(problem, -150.0)
        assert found.keep.tolist() == two.tolist()
        assert found.prune.tolist() == three.tolist()
        assert found.count == 5
        assert not found.free.any()
        assert found.cutoff == -150.0
    assert Fixing(keep=two, prune=nothing, cutoff=0.0).count == 2
    assert Fixing(keep=nothing, prune=three, cutoff=0.0).count == 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_enough_is_fixed_where_one_set_stands_out(program):
    problem = BlockProblem(
        weights=np.array([5.0, 4.0, 3.0, 1e-3, 1e-3, 2e-3]), rows=np.eye(6), damping=10.0, n_prune=3
    )
    best = enumerate_optimum(problem, program)
    certificate = lower_bound(problem, program, incumbent=best, fix=True).certificate
    ceiling = value_ceiling(problem, best.weights)
    fixing = certificate.fixed_below(problem, ceiling)
    assert fixing.keep.tolist() == [True] * 3 + [False] * 3
    assert fixing.prune.tolist() == [False] * 3 + [True] * 3
    assert certificate.proves_fixing(problem)
    assert certificate.lower_bound(problem) == pytest.approx(best.objective, rel=1e-6, abs=0.0)
    wrong = Fixing(keep=~fixing.keep, prune=~fixing.prune, cutoff=fixing.cutoff)
    assert not replace(certificate, fixing=wrong).proves_fixing(problem)
    half = Fixing(keep=fixing.keep, prune=np.zeros(6, dtype=bool), cutoff=fixing.cutoff)
    assert replace(certificate, fixing=half).proves_fixing(problem)
    for fits in (fixing.keep[:5], np.ones(7, dtype=bool)):
        misfit = Fixing(keep=fits, prune=np.zeros_like(fits), cutoff=fixing.cutoff)
        assert not replace(certificate, fixing=misfit).proves_fixing(problem)


@pytest.mark.parametrize("program", PROGRAMS)
def test_fixings_that_leave_no_set_prove_nothing_below_their_cutoff(program):
    problem = cancelling(4)
    certificate = lower_bound(problem, program).certificate
    everything = np.ones(problem.n, dtype=bool)
    nothing = ~everything
    for keep, prune in ((everything, nothing), (nothing, everything)):
        basis = replace(certificate, fixing=Fixing(keep=keep, prune=prune, cutoff=1e9))
        # The basis is not proved, so neither is what rests on it.
        assert replace(certificate, basis=basis).lower_bound(problem) == -math.inf
        assert replace(certificate, basis=basis).fixed_below(problem, 0.0) is None
        # Nor is there a least value of sets that there are not.
        none_left = Fixing(keep=everything, prune=everything, cutoff=1e9)
        line = certificate.linearisation(problem, Fixing.by_count(problem))
        assert certificate._restricted(problem, line, none_left) == math.inf


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1.0])
def test_where_nothing_may_stay_a_singular_block_has_the_bound_of_its_value(damping):
    """Nothing moves, so that nothing has to be definite."""
    problem = BlockProblem(
        weights=np.array([1.0, -2.0, 3.0]), rows=np.ones((1, 3)), damping=damping, n_prune=3
    )
    value = objective(problem, np.zeros(3, dtype=bool), "selection")
    bound = only_set_certificate(problem, "joint").lower_bound(problem)
    assert value - 1e-12 * value <= bound <= value


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", range(10))
def test_the_bound_of_the_only_set_is_below_its_exact_value(seed, program):
    problem = cancelling(seed)
    for n_prune in (0, problem.n):
        single = replace(
            problem,
            n_prune=n_prune,
            damping=max(problem.damping, 1e-6 * float(problem.hessian_diagonal().max())),
        )
        optimum = ExactBlock(single).optimum(program)
        bound = only_set_certificate(single, program).lower_bound(single)
        assert bound <= optimum
        keep = np.full(problem.n, n_prune == 0)
        value, error = bounded_value(single, solved_weights(single, keep, program))
        assert (
            bound
            >= value
            - 1e4 * error
            - 1e-6 * abs(value)
            - 1e-9 * float(column_norms(single) @ np.abs(single.weights)) ** 2
        )


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", range(16))
def test_a_value_in_the_reduced_block_is_off_by_its_allowance_at_most(seed, program):
    problem = cancelling(seed, n=6)
    problem = replace(
        problem, damping=max(problem.damping, 1e-5 * float(problem.hessian_diagonal().mean())), n_prune=3
    )
    keep, prune = np.arange(6) < 2, np.arange(6) == 2
    every = values(problem, program)
    cutoff = float(max(every.values()))
    reduced = reduced_block(problem, program, Fixing(keep=keep, prune=prune, cutoff=cutoff))
    assert reduced.problem.n == 3
    inside = values(reduced.problem, program)
    assert reduced.allowance >= 0.0
    for kept, value in inside.items():
        full = reduced.lifted(np.isin(np.arange(3), kept))
        true = every[tuple(np.flatnonzero(full).tolist())]
        if math.isfinite(reduced.allowance):
            assert abs(value + Fraction(reduced.offset) - true) <= Fraction(reduced.allowance)
    best = min(v for kept, v in every.items() if {0, 1} <= set(kept) and 2 not in kept)
    solution = enumerate_optimum(reduced.problem, program)
    lifted = reduced.lift(solution)
    assert lifted.keep[:3].tolist() == [True, True, False]
    assert lifted.bound is None or lifted.bound <= best
    assert lifted.objective == objective(problem, lifted.keep, program)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", range(10))
def test_the_allowance_of_a_form_covers_its_values(seed, program):
    problem = cancelling(seed)
    problem = replace(problem, damping=max(problem.damping, 1e-7 * float(problem.hessian_diagonal().max())))
    form = (joint_form if program == "joint" else selection_form)(problem)
    for kept, true in values(problem, program).items():
        keep = np.isin(np.arange(problem.n), kept)
        if program == "joint":
            index = list(kept)
            part, linear = form.matrix[np.ix_(index, index)], form.linear[index]
            value = form.constant - 0.5 * float(linear @ np.linalg.solve(part, linear))
        else:
            y = (~keep).astype(float)
            value = form.constant + 0.5 * float(y @ form.matrix @ y) + float(form.linear @ y)
        allowance = form.rounding.allowance(value) * form.scale
        assert abs(Fraction(value) * Fraction(form.scale) - true) <= Fraction(allowance)
        size = float(np.abs(problem.gradient_or_zero) @ np.abs(problem.weights))
        size += float(column_norms(problem) @ np.abs(problem.weights)) ** 2
        # At least the rounding of the terms that add up to the value.
        assert allowance >= UNIT_ROUNDOFF * max(abs(value) * form.scale, size)
        if program == "selection":
            assert allowance <= 1e4 * UNIT_ROUNDOFF * size


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bound_above_the_value_of_the_set_is_lowered_to_it(program):
    problem = cancelling(4)
    limits = Limits()
    best = enumerate_optimum(problem, program)
    above = math.nextafter(best.objective, math.inf)
    pool = IncumbentPool(problem, program, best)
    assert pool.solution(method="m", rel_gap=0.0, bound=above).bound == best.objective
    concluded = conclude(problem, best, limits, time.perf_counter(), Outcome(bound=above))
    assert concluded.bound == best.objective
    assert concluded.proved


def test_the_allowance_of_a_form_counts_the_samples_and_the_gradient():
    rows = np.random.default_rng(0).normal(size=(4000, 3))
    steep = 1e9 * np.ones(3)
    for gradient in (None, steep):
        problem = BlockProblem(weights=np.ones(3), rows=rows, gradient=gradient, damping=1.0, n_prune=1)
        size = float(column_norms(problem) @ np.abs(problem.weights)) ** 2
        size += 0.0 if gradient is None else 2e9
        for form in (joint_form(problem), selection_form(problem)):
            assert form.rounding.allowance(0.0) * form.scale >= 4000 * UNIT_ROUNDOFF * size / 9.0


def test_a_kept_weight_that_moved_is_no_selection_even_if_its_value_is_right():
    problem = cancelling(4)
    best = enumerate_optimum(problem, "selection")
    moved = np.where(best.keep, problem.weights * 1.001, 0.0)
    value = bounded_value(problem, moved)[0]
    claim = replace(best, weights=moved, objective=value, bound=None, termination=Termination.FEASIBLE)
    found = verify(problem, claim)
    assert found.wrong
    assert not found.feasible


def test_forms_of_nothing_have_a_unit():
    empty = BlockProblem(weights=np.zeros(0), rows=np.zeros((0, 0)), n_prune=0)
    flat = BlockProblem(weights=np.zeros(3), rows=np.zeros((0, 3)), damping=1.0, n_prune=1)
    for problem in (empty, flat):
        for form in (joint_form(problem), selection_form(problem)):
            assert form.scale == 1.0
            assert form.constant == 0.0
            assert form.rounding.allowance(0.0) <= 1e-280


def units(problem: BlockProblem, weight: float, curvature: float) -> BlockProblem:
    """The same block in other units: weights times `weight`, curvatures times `curvature` squared."""
    gradient = None if problem.gradient is None else problem.gradient * (weight * curvature**2)
    model = {} if problem.rows is None else {"rows": problem.rows * curvature}
    model |= {} if problem.hessian is None else {"hessian": problem.hessian * curvature**2}
    damping = problem.damping * curvature**2
    return replace(problem, weights=problem.weights * weight, gradient=gradient, damping=damping, **model)


def mirrored(problem: BlockProblem, seed: int) -> BlockProblem:
    """The same block with the signs of some weights changed."""
    signs = np.where(np.random.default_rng([seed, 36]).random(problem.n) < 0.5, -1.0, 1.0)
    gradient = None if problem.gradient is None else problem.gradient * signs
    model = {} if problem.rows is None else {"rows": problem.rows * signs}
    model |= {} if problem.hessian is None else {"hessian": problem.hessian * signs * signs[:, None]}
    return replace(problem, weights=problem.weights * signs, gradient=gradient, **model)


def allowances(problem: BlockProblem, unit: float) -> list[float]:
    """Whatever is taken off for rounding, in units of the loss; `unit` is that of the loss."""
    norms, given = column_norms(problem), Fixing.by_count(problem)
    keep, prune = np.arange(problem.n) < 2, np.arange(problem.n) == 2
    pruned = np.where(keep, problem.weights, 0.0)
    found = [bounded_value(problem, pruned)[1]]
    found += [float(np.abs(problem.weights) @ bounded_product(problem, pruned, norms).error)]
    certificates = [
        PerspectiveCertificate(point=0.7 * problem.weights, split=0.3 * problem.hessian_diagonal()),
        CappedSimplexCertificate(
            point=np.linspace(0.1, 1.0, problem.n),
            shift=0.3 * problem.hessian_diagonal() * problem.weights**2,
        ),
    ]
    for certificate in certificates:
        line = certificate.underestimate(problem, given, norms)
        found += [line.lost, float(line.error.sum())]
    for program, form in (("joint", joint_form(problem)), ("selection", selection_form(problem))):
        found.append(form.rounding.allowance(2.0 * unit / form.scale) * form.scale)
        fixing = Fixing(keep=keep, prune=prune, cutoff=2.0 * unit)
        found.append(reduced_block(problem, program, fixing).allowance)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_allowances_keep_to_units_and_know_no_signs(seed):
    """Units are powers of two, so that nothing is rounded by changing them."""
    problem = cancelling(seed)
    problem = replace(
        problem, damping=max(problem.damping, 1e-5 * float(problem.hessian_diagonal().max())), n_prune=2
    )
    unit = float(problem.weights @ problem.hessian_product(problem.weights))
    plain = allowances(problem, unit)
    assert all(entry > 0.0 for entry in plain)
    for weight, curvature in ((2.0**-5, 1.0), (1.0, 2.0**7), (2.0**9, 2.0**-4)):
        factor = (weight * curvature) ** 2
        other = allowances(units(problem, weight, curvature), factor * unit)
        np.testing.assert_allclose(other, np.array(plain) * factor, rtol=1e-6)
    np.testing.assert_allclose(allowances(mirrored(problem, seed), unit), plain, rtol=1e-6)


def test_error_factor_is_that_of_a_chain_of_roundings():
    for count in (1, 10, 1000):
        exact_factor = (
            Fraction(count) * Fraction(UNIT_ROUNDOFF) / (1 - Fraction(count) * Fraction(UNIT_ROUNDOFF))
        )
        assert float(exact_factor) == pytest.approx(error_factor(count), rel=1e-12, abs=0.0)
    assert UNIT_ROUNDOFF == 2.0**-53


def test_the_largest_entries_are_added_up():
    values_of = np.array([3.0, -1.0, 7.0, 2.0, 7.0])
    for count in range(-1, 7):
        expected = sum(sorted(values_of, reverse=True)[: max(count, 0)])
        assert largest_sum(values_of, count) == expected


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bound_above_what_the_set_is_worth_is_wrong_by_the_rounding_of_its_value(program):
    for seed in range(6):
        problem = cancelling(seed)
        problem = replace(
            problem, damping=max(problem.damping, 1e-2 * float(problem.hessian_diagonal().mean()))
        )
        solution = enumerate_optimum(problem, program)
        value, error = bounded_value(problem, solution.weights)
        above = math.nextafter(value + 1.5 * error, math.inf)
        assert verify(problem, replace(solution, bound=above)).wrong
        assert not verify(problem, replace(solution, bound=value - error)).wrong


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_certificate_that_proves_more_than_the_set_is_worth_is_wrong(program):
    """A set of another block: its certified bound lies above the value that the weights have here."""
    problem = cancelling(4)
    problem = replace(problem, gradient=None, damping=1.0 + float(problem.hessian_diagonal().mean()))
    certified = lower_bound(problem, program)
    best = enumerate_optimum(problem, program)

    class Boastful(type(certified.certificate)):
        def lower_bound(self, problem):
            return 2.0 * abs(best.objective) + 1.0

    boastful = Boastful(**{name: getattr(certified.certificate, name) for name in _fields(certified)})
    found = verify(problem, replace(best, certificate=boastful))
    assert found.wrong
    assert any("certified bound" in note for note in found.notes)
    assert verify(problem, certified).verdict is Verdict.OK


def _fields(solution):
    return [name for name in vars(solution.certificate) if not name.startswith("_")]
