"""Blocks over joblib's workers: equal results everywhere, failing blocks, lost workers, Ctrl-C, threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import psutil
import pytest

from cbs_opt import solve, solve_blocks
from cbs_opt.errors import ExecutorError
from cbs_opt.execution.blocks import block_seed
from formulations import BlockProblem, BlockSolution, Termination
from formulations.errors import ArgumentError, UnknownMethodError, UnknownOptionError
from formulations.incumbents import greedy
from formulations.solution import Limit
from tests.cbs_opt import block_methods
from tests.formulations.blocks import block

ROOT = Path(__file__).parents[3]
SLOW = pytest.mark.slow


def blocks(count: int, n: int = 10) -> list[BlockProblem]:
    return [block("random", n, 3 + seed % 5, seed=seed) for seed in range(count)]


def same(one: list[BlockSolution], other: list[BlockSolution]) -> None:
    """Sets, weights, objectives, bounds and endings are equal, bit for bit."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.keep, right.keep)
        np.testing.assert_array_equal(left.weights, right.weights)
        fields = ("objective", "bound", "termination", "limit", "program", "method", "rel_gap")
        assert [getattr(left, name) for name in fields] == [getattr(right, name) for name in fields]


def named(problem: BlockProblem, name: str) -> BlockProblem:
    return replace(problem, name=name)


@pytest.fixture(scope="module")
def dask() -> Iterator[None]:
    distributed = pytest.importorskip("distributed", reason="extra dask not installed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0
    )
    client = distributed.Client(cluster)
    yield
    client.close()
    cluster.close()


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="extra ray not installed")
    from ray.util.joblib import register_ray

    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=environment,
        object_store_memory=10**8,
    )
    register_ray()
    yield
    ray.shutdown()


def backend_of(name: str, request: pytest.FixtureRequest) -> AbstractContextManager[object]:
    """What a user writes to send blocks to that backend."""
    if name in ("dask", "ray"):
        request.getfixturevalue(name)
    return joblib.parallel_config(backend=name, n_jobs=2)


RESTARTED = ["threading", pytest.param("loky", marks=SLOW)]
"""Of tests after which processes are started anew, which takes seconds."""


@pytest.fixture(params=["threading", "loky"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Two workers of a backend, which the calls within a test use."""
    with backend_of(request.param, request):
        yield request.param


@pytest.mark.parametrize("method", ["branch_and_bound", "swap_search", "randomized_magnitude"])
def test_a_pool_gives_what_one_process_gives(method, backend):
    problems = blocks(8)
    alone = solve_blocks(problems, method, program="selection", seed=5, workers=1)
    same(alone, solve_blocks(problems, method, program="selection", seed=5))
    same(
        alone,
        [
            solve(problem, method, program="selection", seed=block_seed(5, index))
            for index, problem in enumerate(problems)
        ],
    )


def test_results_do_not_depend_on_the_order_of_completion(backend):
    problems = blocks(12)
    alone = solve_blocks(iter(problems), block_methods.drawn, program="joint", seed=1, workers=1)
    finished: list[int] = []
    spread = solve_blocks(
        iter(problems),
        block_methods.drawn,
        program="joint",
        seed=1,
        workers=2,
        delay=0.05,
        on_solution=lambda index, _: finished.append(index),
    )
    same(alone, spread)
    assert sorted(finished) == list(range(12))
    assert finished != sorted(finished)
    assert len({solution.stats.message for solution in spread}) == 2, "both workers took part"
    other = solve_blocks(problems, block_methods.drawn, program="joint", seed=2)
    assert any((a.keep != b.keep).any() for a, b in zip(alone, other, strict=True))


def test_seeds_differ_between_blocks_and_calls():
    seeds = {block_seed(seed, index) for seed in range(20) for index in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_block_has_its_status_and_the_others_go_on(workers, backend):
    problems = [named(p, name) for p, name in zip(blocks(5), ["", "raises", "nonsense", "", ""], strict=True)]
    warm = greedy(problems[1], "joint")
    solutions = solve_blocks(
        problems,
        block_methods.failing,
        program="joint",
        workers=workers,
        incumbents=[None, warm, None, None, None],
    )
    assert [s.termination is Termination.ERROR for s in solutions] == [False, True, True, False, False]
    assert "ZeroDivisionError: no such luck" in solutions[1].stats.message
    assert "block_methods.py" in solutions[1].stats.message
    np.testing.assert_array_equal(solutions[1].keep, warm.keep)
    assert solutions[2].keep is None
    assert "returned a int" in solutions[2].stats.message
    same(solutions[3:], [greedy(p, "joint") for p in problems[3:]])


def test_a_block_that_the_method_cannot_take_does_not_stop_the_others(backend):
    singular = BlockProblem(weights=np.ones(10), rows=np.ones((1, 10)), n_prune=3)
    solutions = solve_blocks([singular, *blocks(2)], "branch_and_bound", program="joint")
    assert solutions[0].termination is Termination.ERROR
    assert "NotPositiveDefiniteError: damping" in solutions[0].stats.message
    assert all(solution.proved for solution in solutions[1:])


@SLOW
def test_lost_workers_end_the_call_and_the_next_one_has_new_ones(tmp_path):
    problems = blocks(6)
    problems[2] = named(problems[2], "fatal")
    options = {"folder": str(tmp_path), "deaths": 99}
    with pytest.raises(ExecutorError, match="workers: lost"):
        solve_blocks(problems, block_methods.fatal, program="joint", workers=2, **options)
    same(
        solve_blocks(problems, "greedy_obs", program="joint", workers=2),
        [greedy(problem, "joint") for problem in problems],
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_generator_is_read_as_workers_become_free(workers):
    done = 0

    def generator():
        for number, problem in enumerate(blocks(20)):
            assert number - done <= (0 if workers == 1 else 2 * workers)
            yield problem

    def counting(problem, program, *, limits, incumbent):
        nonlocal done
        done += 1
        return greedy(problem, program, limits=limits)

    with joblib.parallel_config(backend="threading"):
        solutions = solve_blocks(generator(), counting, program="joint", workers=workers)
    same(solutions, [greedy(problem, "joint") for problem in blocks(20)])


def sharing(count: int, n: int = 400) -> list[BlockProblem]:
    """Blocks of other weights and the same Hessian of more than 1 MiB."""
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(n, n)) / np.sqrt(n)
    first = BlockProblem(weights=generator.normal(size=n), hessian=rows.T @ rows, damping=0.1, n_prune=n // 2)
    assert first.hessian is not None
    assert first.hessian.nbytes > 1 << 20
    return [replace(first, weights=generator.normal(size=n), name=str(i)) for i in range(count)]


@pytest.mark.parametrize("backend", RESTARTED, indirect=True)
@pytest.mark.parametrize("sent", [False, True])
def test_large_arrays_arrive_as_they_were_and_leave_no_file(sent, backend, tmp_path):
    options = {"max_nbytes": None} if sent and backend == "loky" else {}
    problems = sharing(6)
    with joblib.parallel_config(temp_folder=str(tmp_path), **options):
        solutions = solve_blocks(problems, block_methods.fingerprint, program="selection", workers=2)
    expected = {problem.name: problem.fingerprint() for problem in problems}
    assert {problem.name: s.stats.message for problem, s in zip(problems, solutions, strict=True)} == expected
    same(solutions, solve_blocks(problems, block_methods.fingerprint, program="selection", workers=1))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "the files are gone with the call"


@pytest.mark.parametrize("name", [None, pytest.param("loky", marks=SLOW)])
def test_ctrl_c_ends_the_call_with_what_is_done(name):
    problems = [named(problem, "quick" if index == 0 else "") for index, problem in enumerate(blocks(5))]
    warm = greedy(problems[4], "joint")
    before, interrupted = worker_processes(), []

    def on_solution(index: int, _: object) -> None:
        # The first answer means that the workers are up and the others asleep.
        if index == 0:
            interrupted.append(time.monotonic())
            interrupt_soon()

    solutions = solve_blocks(
        problems,
        block_methods.sleeping,
        program="joint",
        workers=None if name is None else 2,
        seconds=120.0,
        incumbents=[None, None, None, None, warm],
        on_solution=on_solution,
    )
    assert time.monotonic() - interrupted[0] < 60
    same(solutions[:1], [greedy(problems[0], "joint")])
    assert [solution.limit for solution in solutions] == [None, *4 * [Limit.INTERRUPTED]]
    assert {solution.termination for solution in solutions[1:4]} == {Termination.NO_SOLUTION}
    np.testing.assert_array_equal(solutions[4].keep, warm.keep)
    assert solutions[4].termination is Termination.FEASIBLE
    assert worker_processes() <= before


def interrupt_soon() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()


def worker_processes() -> set[int]:
    """Worker processes of loky that this process has started and that run a block."""
    children = psutil.Process().children()
    return {child.pid for child in children if "LokyProcess" in " ".join(child.cmdline())}


@SLOW
@pytest.mark.parametrize("name", ["dask", "ray"])
def test_clusters_give_what_one_process_gives(name, request):
    """Large arrays, a block that raises, and blocks that finish out of order, in one call."""
    problems = [*sharing(4), *blocks(6)]
    problems[5] = named(problems[5], "raises")
    finished: list[int] = []

    def call(workers: int | None) -> list[BlockSolution]:
        return solve_blocks(
            problems,
            block_methods.varied,
            program="selection",
            seed=1,
            workers=workers,
            delay=0.3,
            on_solution=lambda index, _: finished.append(index),
        )

    with backend_of(name, request):
        spread = call(None)
    assert sorted(finished) == list(range(10))
    same(spread, call(1))
    assert [s.termination is Termination.ERROR for s in spread] == [index == 5 for index in range(10)]
    good = [(p, s.stats.message.split()) for p, s in zip(problems, spread, strict=True) if p.name != "raises"]
    assert len({words[0] for _, words in good}) == 2, "both workers took part"
    assert {words[1] for _, words in good} == {"1"}, "threads"
    assert [words[2] for _, words in good] == [problem.fingerprint() for problem, _ in good]


@SLOW
@pytest.mark.parametrize("name", ["dask"])  # Ray answers in rounds, and an interrupt loses the round.
def test_ctrl_c_leaves_a_cluster_of_the_caller_usable(name, request):
    problems = [named(problem, "quick" if index == 0 else "") for index, problem in enumerate(blocks(3))]
    with backend_of(name, request):
        solutions = solve_blocks(
            problems,
            block_methods.sleeping,
            program="joint",
            seconds=5.0,
            on_solution=lambda index, _: interrupt_soon() if index == 0 else None,
        )
        assert [solution.limit for solution in solutions] == [None, Limit.INTERRUPTED, Limit.INTERRUPTED]
        again = solve_blocks(problems, "greedy_obs", program="joint")
    same(again, [greedy(problem, "joint") for problem in problems])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_keep_to_their_threads(workers, backend):
    import torch

    before = torch.get_num_threads()
    solutions = solve_blocks(blocks(3), block_methods.thread_count, program="joint", workers=workers)
    assert {solution.stats.message for solution in solutions} == {"1"}
    assert torch.get_num_threads() == before


def test_what_is_wrong_for_every_block_is_said_before_any_runs():
    def never() -> Iterator[BlockProblem]:
        raise AssertionError("read")
        yield

    with pytest.raises(UnknownMethodError):
        solve_blocks(never(), "nothing", program="joint")
    with pytest.raises(UnknownOptionError):
        solve_blocks(never(), "branch_and_bound", program="joint", nothing=1)
    with pytest.raises(ArgumentError, match="program"):
        solve_blocks(never(), block_methods.drawn, program="neither")
    with pytest.raises(ArgumentError, match="method"):
        solve_blocks(never(), 7, program="joint")
    with pytest.raises(ArgumentError, match="time_limit"):
        solve_blocks(never(), program="joint", time_limit=-1.0)
    for workers in (0, -1, True, "four", 1.5):
        with pytest.raises(ArgumentError, match=r"workers: .* pass a whole number >= 1"):
            solve_blocks(never(), program="joint", workers=workers)


@pytest.mark.parametrize("backend", RESTARTED, indirect=True)
@pytest.mark.parametrize("workers", [1, 2])
def test_entries_of_the_wrong_kind_or_number_are_named(workers, backend):
    def call(problems, **options):
        return solve_blocks(problems, "greedy_obs", program="joint", workers=workers, **options)

    with pytest.raises(ArgumentError, match="problems: entry 1 is a int"):
        call([*blocks(1), 3])
    with pytest.raises(ArgumentError, match="problems: entry 9 is a int"):
        call([*blocks(9), 3])
    with pytest.raises(ArgumentError, match="incumbents: entry 0 is a str"):
        call(blocks(1), incumbents=["x"])
    with pytest.raises(ArgumentError, match="incumbents: 1 for more blocks"):
        call(blocks(2), incumbents=[None])
    assert call([]) == []


@pytest.mark.parametrize("backend", RESTARTED, indirect=True)
def test_what_the_caller_raises_gets_through(backend):
    def stop(_index: int, _solution: BlockSolution) -> None:
        raise LookupError("enough")

    def broken() -> Iterator[BlockProblem]:
        yield from blocks(7)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="enough"):
        solve_blocks(blocks(4), "greedy_obs", program="joint", on_solution=stop)
    with pytest.raises(LookupError, match="no more"):
        solve_blocks(broken(), "greedy_obs", program="joint")
    assert all(s.keep is not None for s in solve_blocks(blocks(2), "greedy_obs", program="joint"))
