"""Joint selection on lists of blocks: small and large engines, starts, limits, and the product around it."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import cbs_opt
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.dense import DenseHessian
from cbs_opt.select.choice import Choice, SearchInterruptedError, Selector
from cbs_opt.select.joint_program import search as joint_search
from cbs_opt.select.joint_program import selectors as module
from cbs_opt.select.joint_program.selectors import (
    JOINT_STARTS,
    by_iterative_hard_threshold,
    by_joint_greedy_obs,
    by_joint_swap_search,
)
from formulations import BlockProblem
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, NotPositiveDefiniteError, UnknownOptionError
from formulations.solution import Limit, Limits
from tests.cbs_opt.fisher import data_of, fisher_block, random_set, with_rows
from tests.cbs_opt.select.joint_program.test_search import best_swap, value_of

BLOCKS = [
    fisher_block(kind, n, m) for kind, n, m in (("gradient", 40, 12), ("zeros", 70, 30), ("hessian", 30, 9))
]
COUNTS = [20, 0, 27]
ENGINES = ("dense", "rows")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> dict[str, int]:
    """Both engines on blocks of one size."""
    return {"dense_limit": 0} if request.param == "rows" else {}


def options(method: Selector, engine: dict[str, int]) -> dict[str, int]:
    """Those that decide the engine, of a method that has two."""
    return {} if method is by_iterative_hard_threshold else engine


def values(choices: list[Choice], blocks: list[FisherBlock] = BLOCKS) -> list[float]:
    return [value_of(block, choice.keep) for block, choice in zip(blocks, choices, strict=True)]


def test_every_block_ends_at_a_1_swap_optimum(engine: dict[str, int]) -> None:
    choices = by_joint_swap_search(BLOCKS, COUNTS, limits=Limits(), **engine)
    for block, count, choice in zip(BLOCKS, COUNTS, choices, strict=True):
        assert int((~choice.keep).sum()) == count
        assert choice.locally_optimal
        assert choice.status == "1-swap optimal"
        assert choice.limit is None
        assert choice.bound is None
        if count:
            assert best_swap(block, choice.keep) > -1e-7


@pytest.mark.parametrize("start", JOINT_STARTS)
def test_every_start_leads_to_an_optimum(engine: dict[str, int], start: str) -> None:
    block = fisher_block("gradient", 30, 12)
    (choice,) = by_joint_swap_search([block], [20], limits=Limits(), start=start, **engine)
    assert choice.locally_optimal
    optimum = by_joint_swap_search([block], [20], limits=Limits(), restarts=20, **engine)[0]
    assert value_of(block, choice.keep) >= value_of(block, optimum.keep) - 1e-9


def test_of_several_starts_the_lowest_end_is_kept(engine: dict[str, int]) -> None:
    blocks = [fisher_block("flat", 60, 12, seed=seed) for seed in range(3)]
    counts = [45] * 3
    names = ("magnitude", "obd", "iterative_hard_threshold")
    singles = [
        values(by_joint_swap_search(blocks, counts, limits=Limits(), start=name, **engine), blocks)
        for name in names
    ]
    together = values(by_joint_swap_search(blocks, counts, limits=Limits(), start=names, **engine), blocks)
    assert together == pytest.approx(np.min(singles, axis=0), rel=1e-9)


def test_small_blocks_come_to_the_optimum(engine: dict[str, int]) -> None:
    blocks = [fisher_block("flat", 12, 6, seed=seed) for seed in range(10)]
    found = values(by_joint_swap_search(blocks, [8] * 10, limits=Limits(), restarts=10, **engine), blocks)
    optima = [enumerate_optimum(block.to_problem(8), "joint").objective for block in blocks]
    assert all(value >= optimum * (1 - 1e-9) for value, optimum in zip(found, optima, strict=True))
    assert sum(np.isclose(found, optima, rtol=1e-6)) >= 8


def test_a_warm_start_is_never_made_worse(engine: dict[str, int]) -> None:
    for share in (0.3, 0.9):
        for seed in range(5):
            block = fisher_block("duplicates", 50, 20, seed=seed)
            warm = ~random_set(50, round(50 * share), seed)
            limits = Limits(iteration_limit=seed)
            (choice,) = by_joint_swap_search([block], [int((~warm).sum())], limits=limits, warm=[warm])
            assert value_of(block, choice.keep) <= value_of(block, warm) * (1 + 1e-12)
            assert choice.limit is Limit.ITERATION or choice.locally_optimal


def test_no_swaps_leave_the_warm_start(engine: dict[str, int]) -> None:
    warm = ~random_set(40, 20)
    (choice,) = by_joint_swap_search(BLOCKS[:1], [20], limits=Limits(), warm=[warm], max_swaps=0, **engine)
    assert choice.keep.equal(warm)
    assert choice.status == "stopped: iteration limit"
    assert choice.locally_optimal is False


def test_no_time_gives_sets_of_the_right_size_and_says_so(engine: dict[str, int]) -> None:
    for method in (by_joint_swap_search, by_joint_greedy_obs, by_iterative_hard_threshold):
        choices = method(BLOCKS, COUNTS, limits=Limits(time_limit=0.0), **options(method, engine))
        for count, choice in zip(COUNTS, choices, strict=True):
            assert int((~choice.keep).sum()) == count
            if count > 0:
                assert choice.limit is Limit.TIME
                assert "time limit" in choice.status


@pytest.mark.parametrize("method", [by_joint_swap_search, by_joint_greedy_obs, by_iterative_hard_threshold])
def test_an_eigendecomposition_in_which_the_limit_passes_is_named(
    method: Selector, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, decompose = dense_block(), torch.linalg.eigh

    def slow(matrix: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.2)
        return decompose(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", slow)
    size = {} if method is by_iterative_hard_threshold else {"dense_limit": 0}
    for limit in (0.1, 30.0):
        (choice,) = method([block], [10], limits=Limits(time_limit=limit), **size)
        assert int((~choice.keep).sum()) == 10
        named = re.search(r"an eigendecomposition took (\d+[.]\d\d) s, within which", choice.status)
        assert (named is not None) == (limit == 0.1)
        assert named is None or float(named[1]) >= 0.2


def dense_block() -> FisherBlock:
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 20)))
    return FisherBlock(
        name="dense", weights=torch.linspace(-1.0, 1.0, 20), hessian=DenseHessian(rows.T @ rows), damping=0.1
    )


def test_the_other_methods_are_no_better_than_the_search(engine: dict[str, int]) -> None:
    searched = values(
        by_joint_swap_search(
            BLOCKS, COUNTS, limits=Limits(), start=("greedy_obs", "iterative_hard_threshold"), **engine
        )
    )
    for method in (by_joint_greedy_obs, by_iterative_hard_threshold):
        choices = method(BLOCKS, COUNTS, limits=Limits(), **options(method, engine))
        assert [int((~choice.keep).sum()) for choice in choices] == COUNTS
        assert all(choice.locally_optimal is None for choice in choices)
        for value, least in zip(values(choices), searched, strict=True):
            assert value >= least - 1e-9 * abs(least)


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"start": "nowhere"}, "start"), ({"start": []}, "start"), ({"restarts": -1}, "restarts")],
)
def test_wrong_options_are_named(options: dict[str, object], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        by_joint_swap_search(BLOCKS, COUNTS, limits=Limits(), **options)  # type: ignore[arg-type]
    assert caught.value.argument == argument


def test_wrong_numbers_of_steps_are_named() -> None:
    with pytest.raises(ArgumentError, match="drops"):
        by_joint_greedy_obs(BLOCKS, COUNTS, limits=Limits(), drops=0)
    with pytest.raises(ArgumentError, match="steps"):
        by_iterative_hard_threshold(BLOCKS, COUNTS, limits=Limits(), steps=-1)


def test_an_interrupt_brings_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(joint_search, "improving_pairs", interrupt)
    with pytest.raises(SearchInterruptedError) as caught:
        by_joint_swap_search(BLOCKS, COUNTS, limits=Limits(), start="magnitude", dense_limit=0)
    assert caught.value.choice.limit is Limit.INTERRUPTED
    assert int((~caught.value.choice.keep).sum()) == COUNTS[0]
    monkeypatch.setattr(module, "relaxed_set", interrupt)
    solution = cbs_opt.solve(
        BLOCKS[0].to_problem(20), "swap_search", program="joint", start="relaxation", dense_limit=0
    )
    assert solution.limit is Limit.INTERRUPTED
    assert solution.keep is not None
    assert int((~solution.keep).sum()) == 20


def large_problem(n: int = 1_200, m: int = 60, n_prune: int = 1_000) -> BlockProblem:
    block = fisher_block("gradient", n, m)
    return replace(block, damping=0.5).to_problem(n_prune)


def test_solve_searches_large_blocks_from_a_warm_start() -> None:
    problem = large_problem()
    cold = cbs_opt.solve(problem, "swap_search", program="joint")
    assert cold.objective is not None
    assert cold.stats.message == "1-swap optimal"
    assert not cbs_opt.verify(problem, cold).wrong
    rough = cbs_opt.solve(problem, "magnitude", program="joint")
    warm = cbs_opt.solve(problem, "swap_search", program="joint", incumbent=rough)
    again = cbs_opt.solve(problem, "swap_search", program="joint", incumbent=warm)
    assert rough.objective is not None
    assert warm.objective is not None
    assert warm.objective < rough.objective
    assert again.objective == warm.objective
    assert again.stats.iterations == 0
    bound = cbs_opt.lower_bound(problem, program="joint").bound
    assert bound is not None
    assert bound <= min(cold.objective, warm.objective)


def test_compare_judges_the_methods_of_a_large_block() -> None:
    names = ["magnitude", "obs", "greedy_obs", "iterative_hard_threshold", "swap_search"]
    table = cbs_opt.compare(large_problem(), program="joint", methods=names).set_index("method")
    assert set(table["status"]) == {"feasible"}
    assert table["excess"].idxmin() == "swap_search"


def test_both_engines_agree_on_the_options() -> None:
    problem = large_problem(n_prune=600)
    limited = cbs_opt.solve(problem, "swap_search", program="joint", iteration_limit=2, start="magnitude")
    assert limited.limit is Limit.ITERATION
    with pytest.raises(UnknownOptionError, match="restarts"):
        cbs_opt.solve(problem, "swap_search", program="joint", nonsense=1)
    singular = BlockProblem(weights=np.ones(800), n_prune=400, rows=np.ones((3, 800)))
    with pytest.raises(NotPositiveDefiniteError):
        cbs_opt.solve(singular, "swap_search", program="joint")


def test_rows_of_single_precision_end_where_doubles_do() -> None:
    block = replace(fisher_block("flat", 900, 40), damping=0.2)
    single = with_rows(block, data_of(block).float())
    double = with_rows(block, data_of(block).float().double())

    def search(given: FisherBlock) -> Tensor:
        (choice,) = by_joint_swap_search([given], [700], limits=Limits())
        assert choice.locally_optimal
        return choice.keep

    assert value_of(double, search(single)) == pytest.approx(value_of(double, search(double)), rel=1e-3)
    assert best_swap(double, search(single)) > -1e-7
