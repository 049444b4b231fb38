"""Selectors on lists of blocks: exact counts, the best of several starts, honest statuses."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.on_demand import OnDemand
from cbs_opt.select.blockwise import by_solver
from cbs_opt.select.choice import Selector
from cbs_opt.select.joint_program.selectors import (
    by_iterative_hard_threshold,
    by_joint_greedy_obs,
    by_joint_swap_search,
)
from cbs_opt.select.methods import available_methods
from cbs_opt.select.saliency import SALIENCIES, obs, without_lowest
from cbs_opt.select.scores import STARTS, BySaliency, by_randomized_magnitude
from cbs_opt.select.selection_program.program import SelectionProgram
from cbs_opt.select.selection_program.selectors import by_swap_search
from cbs_opt.select.selection_program.swap_search import swap_search
from formulations import loss
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.solution import Limit, Limits
from tests.cbs_opt.fisher import data_of, dense_objective, fisher_block, random_set

BLOCKS = [fisher_block(kind, n, 8) for kind, n in (("gradient", 12), ("zeros", 30), ("hessian", 12))]
COUNTS = [5, 0, 12]
SOLVERS = [
    (method, program)
    for method in available_methods()
    for program in method.programs
    if method.blockwise and method.name not in ("outer_approximation",)
]


@pytest.mark.parametrize("name", SALIENCIES)
def test_saliencies_remove_the_lowest(name: str) -> None:
    choices = BySaliency(SALIENCIES[name])(BLOCKS, COUNTS, limits=Limits())
    for block, count, choice in zip(BLOCKS, COUNTS, choices, strict=True):
        assert choice.keep.equal(without_lowest(SALIENCIES[name](block), count))
        assert choice.locally_optimal is None
        assert choice.bound is None


def test_blocks_draw_different_sets_from_one_seed() -> None:
    block = fisher_block("flat", 60, 8)
    first, second = by_randomized_magnitude([block, block], [30, 30], limits=Limits(seed=4), spread=0.5)
    assert int(first.keep.sum()) == int(second.keep.sum()) == 30
    assert not first.keep.equal(second.keep)
    again, _ = by_randomized_magnitude([block, block], [30, 30], limits=Limits(seed=4), spread=0.5)
    assert again.keep.equal(first.keep)


def test_of_several_starts_the_best_end_is_kept_block_by_block() -> None:
    blocks = [fisher_block("gradient", 40, 8, seed=seed) for seed in range(4)]
    counts = [20] * 4
    singles = [by_swap_search(blocks, counts, limits=Limits(), start=name) for name in STARTS]
    together = by_swap_search(blocks, counts, limits=Limits(), start=STARTS)
    for number, block in enumerate(blocks):
        ends = [dense_objective(block, ~single[number].keep) for single in singles]
        assert dense_objective(block, ~together[number].keep) == pytest.approx(min(ends), rel=1e-9)
        assert together[number].status == "1-swap optimal"
        assert together[number].locally_optimal


def test_a_warm_start_replaces_the_others() -> None:
    block = fisher_block("flat", 40, 8)
    warm = ~random_set(40, 20)
    (choice,) = by_swap_search([block], [20], limits=Limits(iteration_limit=0), warm=[warm])
    assert choice.keep.equal(warm)
    assert choice.initial_value == pytest.approx(dense_objective(block, ~warm))
    assert choice.locally_optimal is False
    assert "iteration limit" in choice.status


def test_no_time_leaves_the_start_and_says_so() -> None:
    block = fisher_block("flat", 40, 8)
    (choice,) = by_swap_search([block], [20], limits=Limits(time_limit=0.0))
    assert choice.keep.equal(without_lowest(SALIENCIES["magnitude"](block), 20))
    assert "time limit" in choice.status


@pytest.mark.parametrize("start", ["nowhere", [], ["magnitude", "nowhere"]])
def test_an_unknown_start_is_named(start: str | list[str]) -> None:
    with pytest.raises(ArgumentError, match="magnitude") as caught:
        by_swap_search(BLOCKS, COUNTS, limits=Limits(), start=start)
    assert caught.value.argument == "start"


@pytest.mark.parametrize(("method", "program"), SOLVERS, ids=lambda value: getattr(value, "name", value))
def test_dense_methods_choose_sets_of_the_right_size(method, program: str) -> None:  # type: ignore[no-untyped-def]
    select = by_solver(method.engine, method.name, program)
    for block, count, choice in zip(
        BLOCKS, COUNTS, select(BLOCKS, COUNTS, limits=Limits(time_limit=20.0)), strict=True
    ):
        assert int((~choice.keep).sum()) == count
        value = loss.objective(block.to_problem(count), choice.keep.numpy(), program)
        if choice.bound is not None:
            assert choice.bound <= value + 1e-9
        if block.n == 12:
            optimum = enumerate_optimum(block.to_problem(count), program).objective
            assert optimum is not None
            assert value >= optimum - 1e-9
            if method.kind == "exact":
                assert value == pytest.approx(optimum, rel=1e-5, abs=1e-9)


def test_a_block_too_large_for_a_dense_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbs_opt.select.blockwise.DENSE_BLOCK", 20)
    select = by_solver(enumerate_optimum, "enumeration", "joint")
    with pytest.raises(UnsupportedProblemError, match="'zeros' of 30") as caught:
        select(BLOCKS, COUNTS, limits=Limits())
    assert caught.value.argument == "partition"


def test_every_ending_of_a_search_is_named() -> None:
    found = swap_search(SelectionProgram(fisher_block("flat", 40, 8)), ~random_set(40, 20))
    assert found.choice.status == "1-swap optimal"
    late = replace(found, locally_optimal=False, limit=Limit.TIME)
    assert late.choice.status == "stopped: time limit"
    settled = replace(found, locally_optimal=False, limit=None)
    assert settled.choice.status == "start kept: nothing better beyond rounding"


@pytest.mark.parametrize(
    "select",
    [
        BySaliency(obs),
        by_randomized_magnitude,
        by_joint_swap_search,
        by_joint_greedy_obs,
        by_iterative_hard_threshold,
        by_solver(enumerate_optimum, "enumeration", "joint"),
    ],
    ids=["saliency", "randomized", "joint swaps", "greedy", "thresholding", "solver"],
)
def test_blocks_made_on_demand_are_let_go(select: Selector) -> None:
    made: list[weakref.ref[Tensor]] = []

    def make(number: int) -> FisherBlock:
        # The loop that asks for a block may still hold the one before.
        assert not any(rows() is not None for rows in made[:-1])
        block = fisher_block("flat", 8, 5, seed=number)
        made.append(weakref.ref(data_of(block)))
        return block

    choices = select(OnDemand(make, 5), [3] * 5, limits=Limits())
    assert [int((~choice.keep).sum()) for choice in choices] == [3] * 5
    assert len(made) >= 5
