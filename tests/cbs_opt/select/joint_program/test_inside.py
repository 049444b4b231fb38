"""Searches of the joint program where n of every m weights stay: sets inside, ends 1-swap optimal."""

from __future__ import annotations

import pytest
import torch

from cbs_opt.select.joint_program.channel_program import joint_program
from cbs_opt.select.joint_program.inside import cheapest_inside, paired_inside
from cbs_opt.select.joint_program.program import JointProgram
from cbs_opt.select.joint_program.search import joint_search
from cbs_opt.select.joint_program.selectors import (
    by_iterative_hard_threshold,
    by_joint_greedy_obs,
    by_joint_swap_search,
)
from cbs_opt.select.joint_program.starts import greedy_obs_set, hard_threshold_set, relaxed_set
from cbs_opt.select.saliency import magnitude, without_lowest
from cbs_opt.select.scores import by_magnitude, by_randomized_magnitude
from cbs_opt.select.selection_program.selectors import by_swap_search
from formulations import Groups, Limits, NofM, loss
from formulations.enumeration import enumerate_optimum
from formulations.errors import UnsupportedProblemError
from tests.cbs_opt.channels import channel_block
from tests.cbs_opt.fisher import KINDS, fisher_block

SUPPORTS = (NofM(2, 4), NofM(1, 4), NofM(4, 8))


def allowed(keep: torch.Tensor, support: NofM) -> bool:
    return bool((keep.reshape(-1, support.m).sum(dim=1) == support.n).all())


def best_change(block, keep, support) -> float:
    """Least relative change of the objective by one exchange within a cell, each solved on its own."""
    problem = block.to_problem(support)
    value = loss.joint_loss(problem, keep.numpy())
    least = float("inf")
    for out, into in support.swaps(keep.numpy()):
        moved = keep.numpy().copy()
        moved[out], moved[into] = False, True
        least = min(least, loss.joint_loss(problem, moved) - value)
    return least / max(abs(value), 1e-12)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "undamped"])
def test_a_search_by_rows_ends_at_a_1_swap_optimum_inside(kind, support) -> None:
    block = fisher_block(kind, 48, 20)
    start = without_lowest(magnitude(block), support)
    assert allowed(start, support)
    found = joint_search(JointProgram(block, support), start)
    assert found.locally_optimal
    assert allowed(found.keep, support)
    assert found.value <= found.initial_value
    assert found.value == pytest.approx(
        loss.joint_loss(block.to_problem(support), found.keep.numpy()), rel=1e-7, abs=1e-10
    )
    assert best_change(block, found.keep, support) > -1e-7


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_starts_are_sets_of_the_support(support) -> None:
    program = JointProgram(fisher_block("flat", 48, 20))
    for drops in (1, 3, 12):
        assert allowed(greedy_obs_set(program, support, drops=drops), support)
    assert allowed(hard_threshold_set(program, support), support)
    assert allowed(relaxed_set(program, support), support)


def test_greedy_drops_take_what_costs_least_of_what_cells_can_spare() -> None:
    costs = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0], dtype=torch.float64)
    index = torch.arange(8)
    assert cheapest_inside(costs, index, 8, NofM(2, 4)).tolist() == [0, 1, 7, 6]
    assert cheapest_inside(costs, index, 3, NofM(2, 4)).tolist() == [0, 1, 7]
    # Of the first cell two are left already, of the second three.
    left = torch.tensor([0, 3, 4, 5, 7])
    assert cheapest_inside(costs[left], left, 5, NofM(2, 4)).tolist() == [7]


def test_a_batch_has_one_pair_a_cell_and_the_best_first() -> None:
    costs = torch.tensor([1.0, 3.0, torch.inf, torch.inf, 2.0, 5.0, torch.inf, torch.inf])
    gains = torch.tensor([-1.0, -1.0, 2.0, 1.5, -1.0, -1.0, 9.0, 1.0])
    leaving, entering = paired_inside(costs, gains, 8, NofM(2, 4))
    assert (leaving.tolist(), entering.tolist()) == ([4, 0], [6, 2])
    assert paired_inside(costs, gains, 1, NofM(2, 4))[0].tolist() == [4]
    assert len(paired_inside(costs, gains - 10.0, 8, NofM(2, 4))[0]) == 0


@pytest.mark.parametrize("dense_limit", [0, 1024])
def test_selectors_take_a_support_in_place_of_a_count(dense_limit) -> None:
    blocks = [fisher_block(KINDS[0], n, 12, seed=n) for n in (16, 24)]
    supports = [NofM(2, 4), NofM(1, 4)]
    limits = Limits(seed=1)
    for select in (by_joint_swap_search, by_joint_greedy_obs):
        choices = select(blocks, supports, limits=limits, dense_limit=dense_limit)
        for block, support, choice in zip(blocks, supports, choices, strict=True):
            assert allowed(choice.keep, support)
            problem = block.to_problem(support)
            least = enumerate_optimum(problem, "joint").objective
            assert loss.joint_loss(problem, choice.keep.numpy()) >= least * (1.0 - 1e-9)
    for select in (by_iterative_hard_threshold, by_magnitude):
        for support, choice in zip(supports, select(blocks, supports, limits=limits), strict=True):
            assert allowed(choice.keep, support)


def test_beside_a_channel_term_sets_stay_inside() -> None:
    block = channel_block()
    support = NofM(1, 2) if block.n % 4 else NofM(2, 4)
    program = joint_program(block, support)
    keep = greedy_obs_set(program, support)
    assert allowed(keep, support)
    found = joint_search(program, without_lowest(magnitude(block), support))
    assert allowed(found.keep, support)
    assert found.value <= found.initial_value


def test_what_cannot_keep_to_a_support_refuses_it_by_name() -> None:
    block = fisher_block(KINDS[0], 16, 12)
    groups = Groups(torch.arange(16).numpy() // 4, 2)
    limits = Limits()
    dense = by_joint_swap_search([block], [groups], limits=limits)[0].keep
    assert groups.contains(dense.numpy())
    assert NofM(2, 4).contains(by_swap_search([block], [NofM(2, 4)], limits=limits)[0].keep.numpy())
    for select, support, options in (
        (by_randomized_magnitude, NofM(2, 4), {}),
        (by_joint_swap_search, groups, {"dense_limit": 0}),
        (by_joint_greedy_obs, groups, {"dense_limit": 0}),
    ):
        with pytest.raises(UnsupportedProblemError) as caught:
            select([block], [support], limits=limits, **options)
        assert caught.value.argument == "support"
    with pytest.raises(UnsupportedProblemError, match="restarts"):
        joint_search(JointProgram(block, NofM(2, 4)), dense, restarts=2)
