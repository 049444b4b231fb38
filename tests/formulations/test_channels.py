"""Blocks with a term over channels: products, files, exact updates, and bounds made channel by channel."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formulations import BlockProblem, Groups, NofM, verify
from formulations.channels import ChannelTerm
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.incumbents import IncumbentPool
from formulations.instances import read_instance, read_solution, write_instance, write_solution
from formulations.loss import objective, update
from formulations.relaxations import channel_splits, lower_bound
from formulations.relaxations.channel_relaxation import relax_by_channels
from formulations.relaxations.channel_system import ShiftedChannels
from formulations.relaxations.first_order import StopRule
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.solution import Limit, Limits
from tests.stress.check_blocks import KINDS, METHODS, by_channels

PROGRAMS = ("joint", "selection")


def term(seed: int, widths: tuple[int, ...] = (4, 4, 3, 5), *, rank: int = 9) -> ChannelTerm:
    """Channels of two moments, one of which has lost an input."""
    rng = np.random.default_rng(seed)
    moments = []
    for size in (4, 5):
        inputs = rng.normal(size=(rank, size))
        moments.append(inputs.T @ inputs / rank)
    lines = {3: [0, 2, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4]}
    return ChannelTerm(
        moments=tuple(0.5 * (matrix + matrix.T) for matrix in moments),
        start=np.cumsum([0, *widths]),
        moment=[0 if width < 5 else 1 for width in widths],
        scale=rng.uniform(0.3, 3.0, size=len(widths)),
        inputs=np.concatenate([lines[width] for width in widths]),
    )


def block(seed: int, *, height: int = 3, damping: float = 0.05, **options: Any) -> BlockProblem:
    channels = options.pop("channels", None) or term(seed)
    rng = np.random.default_rng(seed + 1)
    options = {"n_prune": channels.n // 2} | options
    return BlockProblem(
        weights=rng.normal(size=channels.n),
        rows=0.5 * rng.normal(size=(height, channels.n)),
        gradient=0.05 * rng.normal(size=channels.n),
        damping=damping,
        channels=channels,
        **options,
    )


def formed(problem: BlockProblem) -> BlockProblem:
    """Return the same block with its Hessian as one matrix."""
    assert problem.channels is not None
    assert problem.rows is not None
    hessian = problem.rows.T @ problem.rows + problem.channels.dense()
    return replace(problem, rows=None, channels=None, hessian=hessian)


def bounded(problem: BlockProblem, program: str, limits: Limits | None = None, **options: Any) -> Any:
    limits = limits or Limits()
    pool = IncumbentPool(problem, program, None)
    stop = StopRule(limits, 0.0, math.inf)
    certificate, keep = relax_by_channels(problem, pool, stop, **options)
    return certificate, keep, stop


def test_a_term_is_its_matrix() -> None:
    channels = term(0)
    dense = channels.dense()
    x = np.random.default_rng(1).normal(size=(channels.n, 3))
    np.testing.assert_allclose(channels.product(x), dense @ x)
    np.testing.assert_allclose(channels.product(x[:, 0]), dense @ x[:, 0])
    np.testing.assert_array_equal(channels.diagonal(), np.diagonal(dense))
    index = np.array([0, 3, 4, 9, 15])
    np.testing.assert_array_equal(channels.columns(index), dense[:, index])
    np.testing.assert_array_equal(channels.restricted(index).dense(), dense[np.ix_(index, index)])
    assert np.linalg.eigvalsh(dense)[0] > 0.0
    assert np.count_nonzero(dense) == 4**2 + 4**2 + 3**2 + 5**2


def test_a_block_with_channels_is_the_one_that_is_formed() -> None:
    problem = block(2)
    whole = formed(problem)
    x = np.random.default_rng(0).normal(size=problem.n)
    np.testing.assert_allclose(problem.dense_hessian(), whole.dense_hessian())
    np.testing.assert_allclose(problem.hessian_product(x), whole.hessian_product(x))
    np.testing.assert_allclose(problem.hessian_diagonal(), whole.hessian_diagonal())
    np.testing.assert_allclose(problem.hessian_columns([1, 7]), whole.hessian_columns([1, 7]))
    for kept in (2, 8, 16):
        keep = np.arange(problem.n) < kept
        np.testing.assert_allclose(update(problem, keep), update(whole, keep), rtol=1e-9, atol=1e-12)
        for program in PROGRAMS:
            assert objective(problem, keep, program) == pytest.approx(objective(whole, keep, program))
    shapes = fisher_shape(problem), fisher_shape(whole)
    assert shapes[0].rho == pytest.approx(shapes[1].rho)
    assert shapes[0].effective_rank == pytest.approx(shapes[1].effective_rank)
    for program in PROGRAMS:
        optima = [enumerate_optimum(each, program).objective for each in (problem, whole)]
        assert optima[0] == pytest.approx(optima[1])


def test_an_update_needs_no_definite_channels() -> None:
    """Rows make up for inputs that are linearly dependent; nothing makes up for both."""
    channels = term(0, rank=2)
    few = block(0, channels=channels, damping=0.0, height=20)
    keep = np.arange(few.n) % 3 > 0
    np.testing.assert_allclose(update(few, keep), update(formed(few), keep), rtol=1e-6, atol=1e-9)
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        update(block(0, channels=replace(channels, scale=0.0 * channels.scale), damping=0.0), keep)


def test_files_and_copies_hold_the_term(tmp_path: Path) -> None:
    problem = block(3)
    write_instance(tmp_path / "a.npz", problem)
    read, _ = read_instance(tmp_path / "a.npz")
    copied = pickle.loads(pickle.dumps(problem))  # noqa: S301
    for other in (read, copied):
        assert other.fingerprint() == problem.fingerprint()
        np.testing.assert_array_equal(other.dense_hessian(), problem.dense_hessian())
        assert not other.channels.scale.flags.writeable
    scaled = replace(term(3), scale=2.0 * term(3).scale)
    assert replace(problem, channels=scaled).fingerprint() != problem.fingerprint()
    assert replace(problem, channels=None).fingerprint() != problem.fingerprint()
    solved = lower_bound(problem, "joint")
    write_solution(tmp_path / "s.npz", problem, solved)
    assert verify(read, read_solution(tmp_path / "s.npz", read)).ok


@pytest.mark.parametrize(
    ("name", "value", "argument"),
    [
        ("start", [0, 4, 4, 11, 16], "channels.start"),
        ("start", [0, 4, 8, 16], "channels.start"),
        ("moment", [0, 0, 0, 2], "channels.moment"),
        ("scale", [1.0, -1.0, 1.0, 1.0], "channels.scale"),
        ("scale", [1.0, math.nan, 1.0, 1.0], "channels.scale"),
        ("inputs", np.tile([0, 1, 2, 3], 4), "channels.inputs"),
        ("inputs", np.arange(16), "channels.inputs"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name: str, value: Any, argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        replace(term(0), **{name: value})
    assert caught.value.argument == argument


def test_terms_that_are_no_part_of_a_hessian_are_refused() -> None:
    channels = term(0)
    for moment in (-channels.moments[0], channels.moments[0] + np.triu(np.ones((4, 4)), 1)):
        bad = replace(channels, moments=(moment, channels.moments[1]))
        with pytest.raises(NotPositiveDefiniteError, match="moments"):
            block(0, channels=bad)
    with pytest.raises(ArgumentError, match="17"):
        BlockProblem(weights=np.ones(17), rows=np.ones((1, 17)), channels=channels, n_prune=3)
    with pytest.raises(ArgumentError, match="hessian"):
        BlockProblem(weights=np.ones(16), hessian=np.eye(16), channels=channels, n_prune=3)


@pytest.mark.parametrize(("height", "factor"), [(0, 1.0), (3, 1.0), (30, 1.0), (3, 1e5)])
def test_shifted_solves_are_those_of_the_matrix(height: int, factor: float) -> None:
    problem = block(5, height=height)
    problem = replace(problem, rows=factor * problem.rows)
    assert problem.channels is not None
    system = ShiftedChannels(problem, 0.2)
    right = np.random.default_rng(0).normal(size=problem.n)
    matrix = problem.dense_hessian() + 0.2 * np.diag(problem.channels.diagonal())
    np.testing.assert_allclose(matrix @ system.solve(right), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [300.0, 3e4])
def test_rows_far_above_the_damping_cost_no_digits(factor: float) -> None:
    """Of a network their largest eigenvalue is 10^6 times the damping: the search must see what is proved."""
    problem = block(5, height=3)
    problem = replace(problem, rows=factor * problem.rows, gradient=None)
    best = enumerate_optimum(problem, "joint").objective
    assert 0.8 * best < bounded(problem, "joint")[0].lower_bound(problem) <= best


SUPPORTS = {
    "count": {"n_prune": 8},
    "few": {"n_prune": 14},
    "n_of_m": {"n_prune": None, "support": NofM(2, 4)},
    "groups": {"n_prune": None, "support": Groups(np.repeat(np.arange(6), [2, 3, 3, 4, 2, 2]), 3)},
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", SUPPORTS)
def test_bounds_by_channels_are_proved_and_below_the_optimum(kind: str, program: str) -> None:
    for seed in range(6):
        damping = (0.05, 1e-3)[seed % 2]
        problem = block(seed, damping=damping, height=seed, **SUPPORTS[kind])
        best = enumerate_optimum(problem, program).objective
        plain = bounded(problem, program, improve_split=False)[0].lower_bound(problem)
        certificate, keep, _ = bounded(problem, program)
        bound = certificate.lower_bound(problem)
        assert problem.allows(keep)
        assert plain - 1e-6 * abs(best) <= bound <= best
        assert certificate.proves_bound(problem, bound)
        assert certificate.lower_bound(formed(problem)) == pytest.approx(bound, rel=1e-6, abs=1e-9)


def test_a_split_that_is_too_large_proves_nothing() -> None:
    problem = block(1)
    certificate = bounded(problem, "joint")[0]
    assert math.isfinite(certificate.lower_bound(problem))
    larger = replace(certificate, split=certificate.split + 0.5 * problem.hessian_diagonal())
    assert larger.lower_bound(problem) == -math.inf


def test_channels_that_differ_by_a_factor_can_share_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = block(4, channels=term(4, (4, 4, 4, 5, 5)), height=2)
    own = bounded(problem, "joint")[0].lower_bound(problem)
    monkeypatch.setattr(channel_splits, "MOST_WORK", 0.0)
    shared = bounded(problem, "joint")[0].lower_bound(problem)
    plain = bounded(problem, "joint", improve_split=False)[0].lower_bound(problem)
    assert plain < shared <= own + 1e-3 * abs(own)


def test_without_damping_definite_channels_are_the_split() -> None:
    problem = block(2, damping=0.0)
    bound = bounded(problem, "joint")[0].lower_bound(problem)
    assert 0.0 < bound <= enumerate_optimum(problem, "joint").objective
    singular = block(2, damping=0.0, channels=term(2, rank=2))
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        bounded(singular, "joint")
    flat = bounded(singular, "selection")[0].lower_bound(singular)
    assert flat <= enumerate_optimum(singular, "selection").objective


def test_limits_end_the_search_with_a_bound() -> None:
    problem = block(6)
    certificate, _, stop = bounded(problem, "joint", Limits(iteration_limit=3))
    assert (stop.steps, stop.limit) == (3, Limit.ITERATION)
    assert math.isfinite(certificate.lower_bound(problem))
    certificate, _, stop = bounded(problem, "joint", Limits(time_limit=0.0))
    assert stop.limit is Limit.TIME
    assert math.isfinite(certificate.lower_bound(problem))


@pytest.mark.parametrize("program", PROGRAMS)
def test_large_blocks_go_by_channels(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lower_bound` makes the split channel by channel, and no Hessian."""
    problem = block(0, channels=term(0, (4, 5) * 80), height=5, n_prune=500)
    monkeypatch.setattr(BlockProblem, "dense_hessian", lambda self: pytest.fail("formed"))
    found = lower_bound(problem, program, fix=True)
    assert found.bound is not None
    assert found.objective is not None
    assert found.bound <= found.objective
    assert verify(problem, found).ok
    plain = lower_bound(problem, program, diagonal_split=False).bound
    assert plain is not None
    assert plain < found.bound


@pytest.mark.parametrize("count", [0, 16])
def test_one_set_is_bounded_by_its_value(count: int) -> None:
    for program in PROGRAMS:
        found = lower_bound(block(0, n_prune=count), program)
        assert found.bound == pytest.approx(found.objective, rel=1e-6, abs=1e-9)
        assert found.termination.value == "optimal"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", [628, 700, 752])
def test_rows_that_rounding_makes_indefinite_beside_channels_are_no_error(seed: int, program: str) -> None:
    problem = BlockProblem(**KINDS["channels"](seed))
    found = by_channels(problem, program)
    assert found.bound is None or found.bound <= METHODS["swap_search"](problem, program).objective
    assert verify(problem, found).ok


def test_a_set_whose_matrix_is_singular_to_working_precision_is_refused_by_name() -> None:
    problem = BlockProblem(**KINDS["channels"](311))
    with pytest.raises(NotPositiveDefiniteError):
        METHODS["branch_and_bound"](problem, "joint")
