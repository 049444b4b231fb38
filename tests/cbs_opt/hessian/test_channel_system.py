"""Solves and updates with a channel term against dense linear algebra."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cbs_opt.hessian import channel_system as channel_solve
from cbs_opt.hessian.channel_system import ChannelHessian
from cbs_opt.hessian.dense import DenseHessian
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.select.saliency import obd, obs
from cbs_opt.update.cbs import cbs_update, cbs_updates, independent_update
from formulations.errors import NotPositiveDefiniteError
from tests.cbs_opt.channels import N, changed, channel_block, dense, some, term_of
from tests.cbs_opt.fisher import data_of

ROWS = (0, 1, 8, 30, 80)
"""Fewer rows than kept weights, more than those, more than weights."""
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_solves_for_several_dampings(m: int, share: float) -> None:
    block = channel_block(m)
    keep = ~some(share)
    right = torch.linspace(-1.0, 2.0, int(keep.sum()), dtype=torch.float64)
    removed = torch.where(keep, 0.0, torch.linspace(0.0, 1.0, N, dtype=torch.float64))
    dampings = (0.003, 0.1, 5.0)
    for damping, factor in zip(dampings, block.hessian.factored(dampings, keep), strict=True):
        hessian = dense(block, damping)
        expected = torch.linalg.solve(hessian[keep][:, keep], right + (hessian @ removed)[keep])
        torch.testing.assert_close(factor.solve(right, removed), expected, **CLOSE)


@pytest.mark.parametrize("m", ROWS)
def test_diagonals_of_the_inverse_and_of_the_schur_complement(m: int) -> None:
    block, pruned = channel_block(m), some(0.4)
    keep = ~pruned
    hessian = dense(block)
    system = block.hessian.system(block.damping, keep)
    inverse = torch.linalg.inv(hessian[keep][:, keep])
    torch.testing.assert_close(system.inverse_diagonal(), inverse.diagonal(), **CLOSE)
    schur = hessian[pruned][:, pruned] - hessian[pruned][:, keep] @ inverse @ hessian[keep][:, pruned]
    torch.testing.assert_close(system.schur_diagonal(), schur.diagonal(), **CLOSE)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_leave_one_after_the_other(m: int, dtype: torch.dtype) -> None:
    block = channel_block(m, dtype=dtype)
    assert isinstance(block.hessian, ChannelHessian)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(m))
    system, keep = block.hessian.system(block.damping), torch.ones(N, dtype=torch.bool)
    right, hessian = torch.linspace(-1.0, 2.0, N, dtype=torch.float64), dense(block)
    close = CLOSE if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-6}
    for leaving in torch.split(order[:-1], 3):
        system = system.without(leaving.sort().values)
        keep[leaving] = False
        assert system.kept.equal(keep.nonzero().squeeze(1))
        inverse = torch.linalg.inv(hessian[keep][:, keep])
        torch.testing.assert_close(system.solve(right[keep]), inverse @ right[keep], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(system.inverse_diagonal(), inverse.diagonal(), **close)


def test_nothing_outside_has_an_empty_schur_complement() -> None:
    block = channel_block()
    assert block.hessian.system(block.damping).schur_diagonal().shape == (0,)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("gradient", [False, True])
def test_update_is_the_dense_minimiser(m: int, gradient: bool) -> None:
    block, pruned = channel_block(m, gradient=gradient), some(0.5)
    hessian, keep = dense(block), ~pruned
    slope = torch.zeros(N, dtype=torch.float64) if block.gradient is None else block.gradient
    pull = hessian[keep][:, pruned] @ block.weights[pruned] - slope[keep]
    expected = block.weights.clone()
    expected[pruned] = 0.0
    expected[keep] += torch.linalg.solve(hessian[keep][:, keep], pull)
    moved = cbs_update(block, ~pruned)
    torch.testing.assert_close(moved, expected, **CLOSE)
    step = moved - block.weights
    predicted = float(slope @ step + 0.5 * step @ hessian @ step)
    assert block.step_loss(step) == pytest.approx(predicted, rel=1e-9)


def test_everything_and_nothing_pruned() -> None:
    block = channel_block(gradient=False)
    torch.testing.assert_close(cbs_update(block, torch.ones(N, dtype=torch.bool)), block.weights)
    assert not cbs_update(block, torch.zeros(N, dtype=torch.bool)).any()


@pytest.mark.parametrize("m", ROWS)
def test_saliencies(m: int) -> None:
    block = channel_block(m)
    hessian, squares = dense(block), block.weights.square()
    inverse = torch.linalg.inv(hessian)
    torch.testing.assert_close(obd(block), 0.5 * hessian.diagonal() * squares, **CLOSE)
    torch.testing.assert_close(obs(block), 0.5 * squares / inverse.diagonal(), **CLOSE)
    pruned = some(0.3)
    pull = torch.where(pruned, block.weights / inverse.diagonal(), 0.0)
    expected = torch.where(pruned, 0.0, block.weights - inverse @ pull)
    torch.testing.assert_close(independent_update(block, ~pruned), expected, **CLOSE)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_single_precision_rows_cost_no_accuracy_of_solutions(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_solve, "SINGLE_LIMIT", limit)
    block, pruned = channel_block(dtype=torch.float32, damping=1e-3), some(0.3)
    exact = changed(block, data_of(block).double(), weights=block.weights.double())
    system = block.hessian.system(1e-3, ~pruned)
    assert system.precision == (torch.float64 if limit == 0.0 else torch.float32)
    torch.testing.assert_close(cbs_update(block, ~pruned), cbs_update(exact, ~pruned), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(block.inverse_diagonal(), exact.inverse_diagonal(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("scale", "damping", "single"), [(1.0, 1.0, True), (1.0, 1e-7, False), (1e-30, 1.0, False)]
)
def test_inverses_of_channels_are_single_where_that_holds_them(
    scale: float, damping: float, single: bool
) -> None:
    block = channel_block(dtype=torch.float32)
    hessian = ChannelHessian(RowsHessian(data_of(block) * scale**0.5), term_of(block).scaled(scale))
    system = hessian.system(scale * damping, ~some(0.3))
    assert {part.inverse.dtype for part in system.parts} == {torch.float32 if single else torch.float64}
    part = system.parts[0]
    matrix = system.channels.channels[0].matrix() + scale * damping * torch.eye(
        len(part.kept), dtype=torch.float64
    )
    product = part.inverse.double() @ matrix
    torch.testing.assert_close(product, torch.eye(len(part.kept), dtype=torch.float64), rtol=0, atol=1e-3)


def test_refinement_repairs_an_inverse_that_is_only_nearly_right() -> None:
    block = channel_block(dtype=torch.float32)
    system = block.hessian.system(block.damping)
    system.inner = 1.1 * system.inner
    right = torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(system.solve(right), torch.linalg.solve(dense(block), right), **CLOSE)


def test_a_preconditioner_that_fails_is_computed_anew_in_double_precision() -> None:
    block = channel_block(dtype=torch.float32)
    system = block.hessian.system(block.damping)
    system.inner = 1e-3 * system.inner  # no longer definite
    right = torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(system.solve(right), torch.linalg.solve(dense(block), right), **CLOSE)
    assert system.precision == torch.float64


def test_a_term_beside_a_hessian() -> None:
    block = channel_block(30)
    rows, pruned = data_of(block), some(0.4)
    other = replace(block, hessian=ChannelHessian(DenseHessian(rows.T @ rows), term_of(block)))
    torch.testing.assert_close(cbs_update(other, ~pruned), cbs_update(block, ~pruned), **CLOSE)
    torch.testing.assert_close(obs(other), obs(block), **CLOSE)


def test_scaling_the_model_changes_no_update() -> None:
    block, pruned = channel_block(), some(0.5)
    assert block.gradient is not None
    scaled = changed(
        block,
        2.0 * data_of(block),
        term_of(block).scaled(4.0),
        gradient=4.0 * block.gradient,
        damping=4.0 * block.damping,
    )
    torch.testing.assert_close(cbs_update(scaled, ~pruned), cbs_update(block, ~pruned), **CLOSE)


def test_a_singular_system_is_named() -> None:
    block = channel_block(1, damping=0.0)
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        cbs_updates(block, ~some(0.2), [0.0])
