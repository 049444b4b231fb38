"""Greedy OBS and exchanges with a channel term against dense methods and brute force."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelHessian, ChannelSystem
from cbs_opt.select.joint_program.channel_program import ChannelProgram, ChannelSet, joint_saliency
from cbs_opt.select.joint_program.search import joint_search
from cbs_opt.select.joint_program.selectors import (
    by_iterative_hard_threshold,
    by_joint_greedy_obs,
    by_joint_swap_search,
)
from cbs_opt.select.joint_program.starts import greedy_obs_set, kept_after
from cbs_opt.select.saliency import magnitude, without_lowest
from formulations import incumbents
from formulations.errors import UnsupportedProblemError
from formulations.loss import joint_loss
from formulations.solution import Limit, Limits
from tests.cbs_opt.channels import N, channel_block, some


def objective(block: FisherBlock, keep: Tensor) -> float:
    problem = block.to_problem(int((~keep).sum()))
    return joint_loss(problem, keep.numpy())


@pytest.mark.parametrize("m", [0, 8, 80])
def test_value_slope_and_single_moves_are_exact(m: int) -> None:
    block = channel_block(m)
    program = ChannelProgram(block)
    pruned = some(0.4)
    kept = program.at(~pruned)
    assert kept.value == pytest.approx(objective(block, ~pruned), rel=1e-9)
    for index, gain in zip(pruned.nonzero().squeeze(1), program.gains(kept), strict=True):
        more = pruned.clone()
        more[index] = False
        assert kept.value - program.at(~more).value == pytest.approx(0.5 * float(gain), rel=1e-6, abs=1e-12)
    for index, cost in zip((~pruned).nonzero().squeeze(1), program.costs(kept), strict=True):
        more = pruned.clone()
        more[index] = True
        assert program.at(~more).value - kept.value == pytest.approx(0.5 * float(cost), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("drops", [1, 3, 12])
@pytest.mark.parametrize("count", [0, 20, 900, 1_000])
def test_drops_take_a_smaller_share_of_what_is_left_each_time(drops: int, count: int) -> None:
    n = 1_000
    kept = [kept_after(drop, drops, n, count) for drop in range(drops + 1)]
    assert (kept[0], kept[-1]) == (n, n - count)
    assert kept == sorted(kept, reverse=True)
    if 0 < count < n:
        shares = [(before - after) / before for before, after in itertools.pairwise(kept)]
        slack = 2.0 / kept[-1]
        assert all(later <= earlier + slack for earlier, later in itertools.pairwise(shares))


def test_greedy_with_one_weight_a_drop_is_the_dense_method() -> None:
    block = channel_block(gradient=False)
    dense = incumbents.greedy(block.to_problem(20), "joint", limits=Limits())
    assert dense.keep is not None
    assert greedy_obs_set(ChannelProgram(block), 20, drops=10_000).tolist() == dense.keep.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_not_scored_would_not_have_been_the_cheapest(dtype: torch.dtype) -> None:
    block = channel_block(3, dtype=dtype)
    program = ChannelProgram(block)
    kept = program.at(torch.ones(N, dtype=torch.bool))
    while int(kept.keep.sum()) > 5:
        costs, index = program.costs(kept), kept.keep.nonzero().squeeze(1)
        cheapest = program.cheapest(kept, 4)
        assert cheapest.tolist() == index[costs.argsort()[:4]].tolist()
        ceiling, known = kept.ceiling[index], 1.0 / costs * kept.weights[index].square()
        assert bool((ceiling >= known * (1.0 - 1e-4)).all())
        kept = program.dropped(kept, cheapest.sort().values)


def test_scores_of_a_few_weights_are_computed_for_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    block = channel_block(3)
    program, scored = ChannelProgram(block), []
    kept = program.at(torch.ones(N, dtype=torch.bool))
    inverse_diagonal = ChannelSystem.inverse_diagonal

    def counted(system: ChannelSystem, places: Tensor | None = None) -> Tensor:
        assert places is not None
        scored.extend(places.tolist())
        expected = inverse_diagonal(system)[places]
        torch.testing.assert_close(inverse_diagonal(system, places), expected)
        return expected

    monkeypatch.setattr(ChannelSystem, "inverse_diagonal", counted)
    program.cheapest(kept, 3)
    assert 3 <= len(set(scored)) == len(scored) < N


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_moved_from_drop_to_drop_stay_those_of_the_minimiser(dtype: torch.dtype) -> None:
    block = channel_block(3, dtype=dtype)
    program = ChannelProgram(block)
    kept = program.at(torch.ones(N, dtype=torch.bool))
    close = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    for _ in range(8):
        kept = program.dropped(kept, program.cheapest(kept, 4).sort().values)
        exact = program.at(kept.keep)
        torch.testing.assert_close(kept.weights, exact.weights, **close)
        assert kept.value == pytest.approx(
            objective(block, kept.keep), rel=1e-9 if close["rtol"] < 1e-8 else 1e-4
        )
        assert not kept.weights[~kept.keep].any()


@pytest.mark.parametrize("seed", range(4))
def test_exchanges_lower_the_objective_and_keep_the_count(seed: int) -> None:
    block = channel_block(seed=seed)
    start = without_lowest(magnitude(block), 22)
    found = joint_search(ChannelProgram(block), start)
    assert int((~found.keep).sum()) == 22
    assert found.initial_value == pytest.approx(objective(block, start), rel=1e-9)
    assert found.value == pytest.approx(objective(block, found.keep), rel=1e-9)
    assert found.value < found.initial_value
    assert not found.locally_optimal
    falls = [found.initial_value, *(point.objective for point in found.trace)]
    assert falls == sorted(falls, reverse=True)
    again = joint_search(ChannelProgram(block), found.keep)
    assert again.value <= found.value


def test_exchanges_end_with_the_first_round_that_brings_less_than_asked_for() -> None:
    block = channel_block(seed=2)
    start = without_lowest(magnitude(block), 22)
    everything, once = (joint_search(ChannelProgram(block), start, tolerance=t) for t in (0.0, 0.99))
    assert len(once.trace) == 1 < len(everything.trace)
    assert everything.value < once.value < once.initial_value
    values = [everything.initial_value, *(point.objective for point in everything.trace)]
    falls = [(before - after) / abs(before) for before, after in itertools.pairwise(values)]
    asked = 0.5 * (min(falls) + max(falls))
    some_of_them = joint_search(ChannelProgram(block), start, tolerance=asked)
    rounds = next(number for number, fall in enumerate(falls, 1) if fall <= asked)
    assert len(some_of_them.trace) == rounds


def test_limits_are_kept_and_named() -> None:
    block, start = channel_block(), without_lowest(magnitude(channel_block()), 22)
    program = ChannelProgram(block)
    none = joint_search(program, start, max_swaps=0)
    assert (none.swaps, none.limit) == (0, Limit.ITERATION)
    assert torch.equal(none.keep, start)
    assert joint_search(program, start, max_swaps=1).swaps <= 1
    late = joint_search(program, start, deadline=time.monotonic())
    assert late.limit is Limit.TIME
    assert torch.equal(late.keep, start)


def test_time_that_runs_out_while_batches_are_tried_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cbs_opt.select.joint_program.search.time.monotonic", lambda: now[0])
    evaluate = ChannelProgram.at

    def slow(program: ChannelProgram, keep: Tensor) -> ChannelSet:
        now[0] += 1.0
        return evaluate(program, keep)

    monkeypatch.setattr(ChannelProgram, "at", slow)
    block = channel_block()
    start = without_lowest(magnitude(block), 22)
    found = joint_search(ChannelProgram(block), start, deadline=1.5)
    assert found.limit is Limit.TIME
    assert found.value <= found.initial_value


@pytest.mark.parametrize("count", [0, N])
def test_no_choice(count: int) -> None:
    block = channel_block()
    start = without_lowest(magnitude(block), count)
    found = joint_search(ChannelProgram(block), start)
    assert torch.equal(found.keep, start)
    assert found.locally_optimal
    assert int((~greedy_obs_set(ChannelProgram(block), count, drops=3)).sum()) == count


def test_large_blocks_with_the_term_are_searched_without_their_hessian(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ChannelHessian, "dense", lambda _: pytest.fail("formed"))
    block = channel_block()
    limits = Limits(seed=1)
    greedy = by_joint_greedy_obs([block], [22], dense_limit=0, limits=limits)[0]
    swapped = by_joint_swap_search([block], [22], dense_limit=0, limits=limits)[0]
    best = by_joint_swap_search(
        [block], [22], dense_limit=0, limits=limits, start=["greedy_obs", "magnitude", "obs"]
    )[0]
    warm = by_joint_swap_search([block], [22], dense_limit=0, limits=limits, warm=[greedy.keep])[0]
    assert not swapped.locally_optimal
    assert swapped.status == "no batch of swaps improves"
    monkeypatch.undo()
    values = [objective(block, choice.keep) for choice in (greedy, swapped, best, warm)]
    assert values[1] <= values[0] + 1e-12
    assert values[2] <= values[1] + 1e-12
    assert values[3] == pytest.approx(values[1], rel=1e-12)


def test_methods_that_need_the_rows_alone_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbs_opt.hessian.channel_system.DENSE_LIMIT", 10)
    block = channel_block()
    with pytest.raises(UnsupportedProblemError, match="relaxation"):
        by_joint_swap_search([block], [22], dense_limit=0, limits=Limits(), start="relaxation")
    with pytest.raises(UnsupportedProblemError, match="layer-input term"):
        by_iterative_hard_threshold([block], [22], limits=Limits())


def test_joint_saliency_is_the_cost_of_single_removals() -> None:
    block = channel_block()
    program = ChannelProgram(block)
    whole = program.at(torch.ones(N, dtype=torch.bool))
    scores = joint_saliency(block)
    for index in (0, 13, N - 1):
        keep = torch.ones(N, dtype=torch.bool)
        keep[index] = False
        assert program.at(keep).value - whole.value == pytest.approx(float(scores[index]), rel=1e-8)
    without = replace(block, gradient=None)
    assert not torch.allclose(joint_saliency(without), scores)
