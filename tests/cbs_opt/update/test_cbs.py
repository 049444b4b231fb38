"""CBS-U and the independent update against dense formulas and `formulations.loss`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cbs_opt.update import cbs as updates
from formulations import loss
from formulations.errors import NotPositiveDefiniteError
from tests.cbs_opt.fisher import KINDS, data_of, dense_hessian, fisher_block, random_set, with_rows

close = torch.testing.assert_close
DAMPED = [kind for kind in KINDS if kind != "undamped"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", DAMPED)
@pytest.mark.parametrize("n_keep", [0, 1, 8, 9, 25, 40])
def test_cbs_update_is_that_of_formulations(kind: str, n_keep: int, dtype: torch.dtype) -> None:
    # m = 8: both sides of the switch to Woodbury
    block = fisher_block(kind, 40, 8, dtype=dtype)
    pruned = random_set(40, 40 - n_keep)
    found = updates.cbs_update(block, ~pruned)
    expected = loss.update(block.to_problem(40 - n_keep), (~pruned).numpy())
    close(found, torch.from_numpy(expected), rtol=1e-8, atol=1e-10)
    assert found.dtype == torch.float64
    assert bool((found[pruned] == 0.0).all())


@pytest.mark.parametrize("kind", DAMPED)
def test_cbs_update_is_stationary_and_no_step_is_better(kind: str) -> None:
    block = fisher_block(kind, 40, 8)
    pruned = random_set(40, 25)
    step = updates.cbs_update(block, ~pruned) - block.weights
    gradient = 0.0 if block.gradient is None else block.gradient
    slope = dense_hessian(block) @ step + gradient
    close(slope[~pruned], torch.zeros(15, dtype=torch.float64), rtol=0.0, atol=1e-10)
    for seed in range(5):
        other = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        nudged = step + torch.where(pruned, 0.0, 1e-2 * other)
        assert block.step_loss(nudged) >= block.step_loss(step)


def test_small_damping_does_not_cost_accuracy() -> None:
    block = fisher_block("decaying", 60, 12)
    small = replace(block, damping=1e-9)
    pruned = random_set(60, 30)
    step = updates.cbs_update(small, ~pruned) - small.weights
    rows, kept = data_of(small), ~pruned
    # the same minimum through the singular values of the kept columns, free of cancellation
    left, values, right = torch.linalg.svd(rows[:, kept], full_matrices=False)
    target = rows[:, pruned] @ small.weights[pruned]
    expected = right.T @ (values / (values**2 + 1e-9) * (left.T @ target))
    close(step[kept], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["flat", "hessian", "decaying"])
@pytest.mark.parametrize("m", [8, 60])
def test_independent_update_adds_up_single_steps(kind: str, m: int) -> None:
    block = fisher_block(kind, 30, m)
    pruned = random_set(30, 12)
    inverse = torch.linalg.inv(dense_hessian(block))
    expected = block.weights.clone()
    for index in pruned.nonzero().squeeze(1):
        expected -= block.weights[index] / inverse[index, index] * inverse[:, index]
    expected[pruned] = 0.0
    close(updates.independent_update(block, ~pruned), expected, rtol=1e-8, atol=1e-10)


def test_the_two_updates_agree_on_one_weight() -> None:
    block = fisher_block("flat", 30, 8)
    pruned = random_set(30, 1)
    close(
        updates.independent_update(block, ~pruned), updates.cbs_update(block, ~pruned), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("m", [4, 30])
def test_a_singular_kept_block_is_named(m: int) -> None:
    block = fisher_block("undamped", 20, m)
    rows = data_of(block)
    rows[:, 1] = rows[:, 0]
    pruned = torch.zeros(20, dtype=torch.bool)
    pruned[10:] = True
    with pytest.raises(NotPositiveDefiniteError) as caught:
        updates.cbs_update(block, ~pruned)
    assert caught.value.argument == "damping"


def test_no_damping_is_enough_where_the_kept_block_is_regular() -> None:
    block = fisher_block("undamped", 20, 12)
    pruned = random_set(20, 15)
    found = updates.cbs_update(block, ~pruned)
    expected = loss.update(block.to_problem(15), (~pruned).numpy())
    close(found, torch.from_numpy(expected), rtol=1e-8, atol=1e-10)


def test_no_rows_leave_the_damping_alone() -> None:
    block = fisher_block("gradient", 20, 1)
    assert block.gradient is not None
    flat = with_rows(block, data_of(block)[:0], damping=0.5)
    pruned = random_set(20, 10)
    expected = torch.where(pruned, 0.0, block.weights - block.gradient / 0.5)
    close(updates.cbs_update(flat, ~pruned), expected)
