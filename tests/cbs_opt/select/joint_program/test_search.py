"""Joint search by rows: every end is a 1-swap optimum, whatever the block; limits are honest."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.joint_program import search as module
from cbs_opt.select.joint_program.program import JointProgram
from cbs_opt.select.joint_program.search import joint_search
from cbs_opt.select.joint_program.starts import greedy_obs_set, hard_threshold_set, relaxed_set
from cbs_opt.select.saliency import magnitude, without_lowest
from formulations import loss
from formulations.dense_forms import dense_form
from formulations.incumbents import joint_tableau
from formulations.solution import Limit
from tests.cbs_opt.fisher import KINDS, data_of, fisher_block, random_set, with_rows

SHAPES = [(kind, n, m) for kind in KINDS for n, m in ((70, 25), (40, 90)) if kind != "undamped" or m > n]


def value_of(block: FisherBlock, keep: Tensor) -> float:
    return loss.joint_loss(block.to_problem(int((~keep).sum())), keep.numpy())


def best_swap(block: FisherBlock, kept: Tensor) -> float:
    """Change by the best swap relative to the objective, from the dense swept tableau."""
    problem = block.to_problem(int((~kept).sum()))
    form = dense_form(problem, "joint")
    keep = kept.numpy()
    table, state = joint_tableau(form.matrix, form.linear, keep)
    inverse, cross = -table[keep][:, keep].diagonal(), table[keep][:, ~keep]
    step = state[keep] / inverse
    moved = state[~keep] + cross * step[:, None]
    gain = moved**2 / (table[~keep][:, ~keep].diagonal() + cross**2 / inverse[:, None])
    change = 0.5 * ((state[keep] * step)[:, None] - gain) * form.scale
    return float(change.min()) / abs(value_of(block, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_prune_share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("kind", "n", "m"), SHAPES)
def test_it_ends_at_a_proved_1_swap_optimum(
    kind: str, n: int, m: int, n_prune_share: float, dtype: torch.dtype
) -> None:
    block = fisher_block(kind, n, m, dtype=dtype)
    start = ~random_set(n, round(n_prune_share * n))
    found = joint_search(JointProgram(block), start)
    assert found.locally_optimal
    assert found.limit is None
    assert int(found.keep.sum()) == int(start.sum())
    assert found.value == pytest.approx(value_of(block, found.keep), rel=1e-7, abs=1e-10)
    assert found.initial_value == pytest.approx(value_of(block, start), rel=1e-7, abs=1e-10)
    assert best_swap(block, found.keep) > -1e-7
    objectives = [point.objective for point in found.trace]
    assert objectives == sorted(objectives, reverse=True)


def test_the_dense_oracle_sees_an_improving_swap() -> None:
    block = fisher_block("flat", 40, 15)
    assert best_swap(block, ~random_set(40, 20)) < -1e-3


@pytest.mark.parametrize("n_prune", [0, 30])
def test_nothing_and_everything_are_optimal(n_prune: int) -> None:
    found = joint_search(JointProgram(fisher_block("gradient", 30, 10)), ~random_set(30, n_prune))
    assert found.locally_optimal
    assert found.swaps == 0
    assert int((~found.keep).sum()) == n_prune


def test_the_order_of_the_weights_does_not_matter() -> None:
    block = fisher_block("gradient", 60, 20)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert block.gradient is not None
    shuffled = with_rows(
        block, data_of(block)[:, order], weights=block.weights[order], gradient=block.gradient[order]
    )
    start = without_lowest(magnitude(block), 40)
    one = joint_search(JointProgram(block), start)
    other = joint_search(JointProgram(shuffled), start[order])
    assert other.value == pytest.approx(one.value, rel=1e-9)
    assert other.keep.equal(one.keep[order])


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_units_of_the_loss_and_the_weights_do_not_matter(scale: float) -> None:
    block = fisher_block("gradient", 60, 20)
    assert block.gradient is not None
    start = without_lowest(magnitude(block), 40)
    one = joint_search(JointProgram(block), start)
    louder = with_rows(
        block, data_of(block) * scale, gradient=block.gradient * scale**2, damping=block.damping * scale**2
    )
    larger = replace(block, weights=block.weights * scale, gradient=block.gradient * scale)
    for changed in (louder, larger):
        other = joint_search(JointProgram(changed), start)
        assert other.keep.equal(one.keep)
        assert other.value == pytest.approx(one.value * scale**2, rel=1e-8)


def test_restarts_never_lose_and_end_at_an_optimum() -> None:
    block = fisher_block("decaying", 200, 40)
    program = JointProgram(block)
    start = ~random_set(200, 150)
    plain = joint_search(program, start)
    again = joint_search(program, start, restarts=5, seed=3)
    assert again.value <= plain.value
    assert again.locally_optimal
    assert best_swap(block, again.keep) > -1e-7
    assert again.keep.equal(joint_search(program, start, restarts=5, seed=3).keep)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_swaps_than_allowed(most: int) -> None:
    block = fisher_block("flat", 80, 20)
    start = ~random_set(80, 50)
    found = joint_search(JointProgram(block), start, max_swaps=most, restarts=2)
    assert found.swaps == most
    assert int((~found.keep & start).sum()) <= most
    assert found.limit is Limit.ITERATION
    assert not found.locally_optimal
    assert value_of(block, found.keep) <= value_of(block, start)


def test_time_over_leaves_the_start() -> None:
    start = ~random_set(80, 50)
    found = joint_search(JointProgram(fisher_block("flat", 80, 20)), start, deadline=time.monotonic())
    assert found.keep.equal(start)
    assert found.limit is Limit.TIME
    assert not found.locally_optimal


def test_an_interrupt_leaves_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    block = fisher_block("flat", 80, 20)
    start = ~random_set(80, 50)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "improving_pairs", interrupt)
    found = joint_search(JointProgram(block), start)
    assert found.limit is Limit.INTERRUPTED
    assert not found.locally_optimal
    assert found.swaps > 0
    assert value_of(block, found.keep) < value_of(block, start)


@pytest.mark.parametrize(("kind", "n", "m"), SHAPES)
def test_starts_have_the_right_size_and_are_no_worse_than_the_smallest_weights(
    kind: str, n: int, m: int
) -> None:
    block = fisher_block(kind, n, m)
    program = JointProgram(block)
    count = n // 2
    magnitudes = value_of(block, without_lowest(magnitude(block), count))
    for start in (
        greedy_obs_set(program, count),
        hard_threshold_set(program, count),
        relaxed_set(program, count),
    ):
        assert int((~start).sum()) == count
        assert value_of(block, start) <= magnitudes + 1e-9 * abs(magnitudes)


def test_more_drops_are_no_worse_here_and_hurry_keeps_the_count() -> None:
    block = fisher_block("flat", 200, 60)
    program = JointProgram(block)
    values = [value_of(block, greedy_obs_set(program, 150, drops=drops)) for drops in (1, 5, 40)]
    assert values[0] > values[1] > values[2]
    hurried = greedy_obs_set(program, 150, drops=40, deadline=time.monotonic())
    assert hurried.equal(greedy_obs_set(program, 150, drops=1))
    assert int(hard_threshold_set(program, 150, deadline=time.monotonic()).sum()) == 50


def test_hard_thresholding_improves_on_its_start() -> None:
    block = fisher_block("flat", 200, 60)
    program = JointProgram(block)
    assert value_of(block, hard_threshold_set(program, 150)) < value_of(
        block, without_lowest(magnitude(block), 150)
    )
