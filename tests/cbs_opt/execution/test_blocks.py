"""Blocks over executors: equal results everywhere, lost workers, failing blocks, Ctrl-C, shared arrays."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from concurrent.futures.process import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cbs_opt.execution.array_store import SHARED_FROM, ArrayCache, ArrayStore, content_digest
from cbs_opt.execution.workers import Workers
from joblib.externals import loky

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


class Recorder(Executor):
    """Two or more threads that see only what can be pickled, and count what is in flight and sent."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)
        self._max_workers = workers
        self._lock = threading.Lock()
        self.flying = self.most = self.sent = 0

    def submit(self, fn, /, *args, **kwargs):
        pickled = pickle.dumps((fn, args))
        with self._lock:
            self.sent += len(pickled)
            self.flying += 1
            self.most = max(self.most, self.flying)
        return self._threads.submit(self._run, pickled)

    def _run(self, pickled: bytes) -> Any:
        fn, args = pickle.loads(pickled)  # noqa: S301
        try:
            return fn(*args)
        finally:
            with self._lock:
                self.flying -= 1


PROCESSES = pytest.param("processes", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    executor = loky.ProcessPoolExecutor(max_workers=2, env={"OMP_NUM_THREADS": "1"})
    yield executor
    executor.shutdown(kill_workers=True)


@pytest.fixture(params=["threads", PROCESSES])
def pool(request: pytest.FixtureRequest) -> Executor:
    """Two workers: threads behind pickling, or processes."""
    if request.param == "threads":
        return Recorder(2)
    executor: Executor = request.getfixturevalue("processes")
    return executor


@pytest.mark.parametrize("method", ["branch_and_bound", "swap_search", "randomized_magnitude"])
def test_a_pool_gives_what_one_process_gives(method, pool):
    problems = blocks(8)
    alone = solve_blocks(problems, method, program="selection", seed=5)
    same(alone, solve_blocks(problems, method, program="selection", seed=5, executor=pool))
    same(
        alone,
        [
            solve(problem, method, program="selection", seed=block_seed(5, index))
            for index, problem in enumerate(problems)
        ],
    )


def test_results_do_not_depend_on_the_order_of_completion(pool):
    problems = blocks(12)
    alone = solve_blocks(iter(problems), block_methods.drawn, program="joint", seed=1)
    finished: list[int] = []
    spread = solve_blocks(
        iter(problems),
        block_methods.drawn,
        program="joint",
        seed=1,
        executor=pool,
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


@pytest.mark.parametrize("inline", [True, False])
def test_a_failing_block_has_its_status_and_the_others_go_on(inline, pool):
    problems = [named(p, name) for p, name in zip(blocks(5), ["", "raises", "nonsense", "", ""], strict=True)]
    warm = greedy(problems[1], "joint")
    solutions = solve_blocks(
        problems,
        block_methods.failing,
        program="joint",
        executor=None if inline else pool,
        incumbents=[None, warm, None, None, None],
    )
    assert [s.termination is Termination.ERROR for s in solutions] == [False, True, True, False, False]
    assert "ZeroDivisionError: no such luck" in solutions[1].stats.message
    assert "block_methods.py" in solutions[1].stats.message
    np.testing.assert_array_equal(solutions[1].keep, warm.keep)
    assert solutions[2].keep is None
    assert "returned a int" in solutions[2].stats.message
    same(solutions[3:], [greedy(p, "joint") for p in problems[3:]])


def test_a_block_that_the_method_cannot_take_does_not_stop_the_others(pool):
    singular = BlockProblem(weights=np.ones(10), rows=np.ones((1, 10)), n_prune=3)
    solutions = solve_blocks([singular, *blocks(2)], "branch_and_bound", program="joint", executor=pool)
    assert solutions[0].termination is Termination.ERROR
    assert "NotPositiveDefiniteError: damping" in solutions[0].stats.message
    assert all(solution.proved for solution in solutions[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["number", "callable", "loky", "stdlib"])
def test_a_lost_worker_is_replaced_and_its_blocks_run_again(kind, tmp_path):
    executors: dict[str, Any] = {
        "number": lambda: 2,
        "callable": lambda: functools.partial(loky.ProcessPoolExecutor, max_workers=2),
        "loky": lambda: loky.ProcessPoolExecutor(max_workers=2),
        "stdlib": lambda: ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")),
    }
    problems = blocks(6)
    problems[2] = named(problems[2], "fatal")
    solutions = solve_blocks(
        problems,
        block_methods.fatal,
        program="joint",
        executor=executors[kind](),
        folder=str(tmp_path),
        deaths=1,
    )
    same(solutions, [greedy(problem, "joint") for problem in problems])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_block_that_kills_every_worker_fails_alone(tmp_path):
    problems = blocks(6)
    problems[1] = named(problems[1], "fatal")
    solutions = solve_blocks(
        problems, block_methods.fatal, program="joint", executor=2, folder=str(tmp_path), deaths=99
    )
    assert solutions[1].termination is Termination.ERROR
    assert "lost 3 times" in solutions[1].stats.message
    assert len(list(tmp_path.iterdir())) == 3
    rest = [0, 2, 3, 4, 5]
    same([solutions[i] for i in rest], [greedy(problems[i], "joint") for i in rest])


class Mortal(Recorder):
    """Loses the worker of a block with the given chance, and with a certain block always."""

    def __init__(self, chance: float, poison: str) -> None:
        super().__init__(3)
        self._chance = chance
        self._poison = poison
        self._generator = np.random.default_rng(0)
        self.together: list[int] = []

    def _run(self, pickled: bytes) -> Any:
        _, (_, parcel) = pickle.loads(pickled)  # noqa: S301
        lost = self._generator.random() < self._chance
        if parcel.problem.state["name"] == self._poison:
            self.together.append(self.flying)
            lost = True
        result = super()._run(pickled)
        if lost:
            raise BrokenExecutor("a worker is gone")
        return result


def test_blocks_of_lost_workers_run_again_and_a_deadly_one_ends_alone():
    problems = blocks(30)
    problems[7] = named(problems[7], "deadly")
    executor = Mortal(0.2, "deadly")
    workers = Workers(executor=executor, retries=12)
    solutions = solve_blocks(iter(problems), "greedy_obs", program="joint", executor=workers)
    assert solutions[7].termination is Termination.ERROR
    assert "lost 13 times, the last time with BrokenExecutor: a worker is gone" in solutions[7].stats.message
    assert executor.together[-1] == 1
    rest = [i for i in range(30) if i != 7]
    same([solutions[i] for i in rest], [greedy(problems[i], "joint") for i in rest])


def test_a_generator_is_read_no_further_than_the_window():
    executor = Recorder(2)
    taken = 0

    def generator():
        nonlocal taken
        for problem in blocks(20):
            taken += 1
            assert taken - done <= 5
            yield problem

    done = 0

    def count(_index, _solution):
        nonlocal done
        done += 1

    workers = Workers(executor=executor, window=4)
    same(
        solve_blocks(generator(), "greedy_obs", program="joint", executor=workers, on_solution=count),
        [greedy(problem, "joint") for problem in blocks(20)],
    )
    assert executor.most <= 4


def sharing(count: int, n: int = 400) -> list[BlockProblem]:
    """Blocks of other weights and the same Hessian of more than 1 MiB."""
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(n, n)) / np.sqrt(n)
    first = BlockProblem(weights=generator.normal(size=n), hessian=rows.T @ rows, damping=0.1, n_prune=n // 2)
    assert first.hessian is not None
    assert first.hessian.nbytes >= SHARED_FROM
    return [replace(first, weights=generator.normal(size=n), name=str(i)) for i in range(count)]


def test_a_shared_array_is_sent_once(tmp_path):
    problems = sharing(6)
    executor = Recorder(2)
    solutions = solve_blocks(
        problems,
        block_methods.drawn,
        program="selection",
        executor=Workers(executor=executor, shared_folder=tmp_path),
    )
    same(solutions, solve_blocks(problems, block_methods.drawn, program="selection"))
    assert executor.sent < problems[0].hessian.nbytes / 2
    assert not list(tmp_path.iterdir()), "the files are gone with the call"


def test_a_worker_that_sees_no_file_gets_the_array_and_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setattr("cbs_opt.execution.array_store._mapped", lambda reference: None)
    monkeypatch.setattr("cbs_opt.execution.jobs.ARRAYS", ArrayCache())
    problems = sharing(6)
    executor = Recorder(1)
    workers = Workers(executor=executor, shared_folder=tmp_path, window=1)
    solutions = solve_blocks(problems, block_methods.drawn, program="selection", executor=workers)
    same(solutions, solve_blocks(problems, block_methods.drawn, program="selection"))
    size = problems[0].hessian.nbytes
    assert size < executor.sent < 1.5 * size


def test_a_full_disk_ships_arrays_with_their_blocks(monkeypatch, tmp_path):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    problems = sharing(3)
    workers = Workers(executor=Recorder(2), shared_folder=tmp_path)
    monkeypatch.setattr("cbs_opt.execution.jobs.ARRAYS", ArrayCache())
    solutions = solve_blocks(problems, block_methods.drawn, program="selection", executor=workers)
    same(solutions, solve_blocks(problems, block_methods.drawn, program="selection"))


def test_a_damaged_file_is_not_taken(tmp_path):
    store = ArrayStore(tmp_path)
    (problem,) = sharing(1)
    packed = store.pack(problem)
    (reference,) = packed.references
    assert packed.unpack(ArrayCache(), {}).fingerprint() == problem.fingerprint()
    content = bytearray(Path(reference.path).read_bytes())
    content[-1] ^= 1
    Path(reference.path).write_bytes(content)
    assert packed.unpack(ArrayCache(), {}) is None
    assert packed.unpack(ArrayCache(), store.arrays(packed)).fingerprint() == problem.fingerprint()
    store.release(packed)
    store.close()
    assert not list(tmp_path.iterdir())


def test_idle_files_and_cached_arrays_are_bounded(monkeypatch, tmp_path):
    size = 400 * 400 * 8
    monkeypatch.setattr("cbs_opt.execution.array_store.IDLE_BYTES", 2 * size)
    monkeypatch.setattr("cbs_opt.execution.array_store.CACHE_BYTES", 2 * size)
    store, cache = ArrayStore(tmp_path), ArrayCache()
    (first,) = sharing(1)
    for damping in range(5):
        shifted = replace(first, hessian=first.hessian + damping * np.eye(400))
        packed = store.pack(shifted)
        assert packed.unpack(cache, {}).fingerprint() == shifted.fingerprint()
        store.release(packed)
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    assert len(cache._arrays) == 2
    store.close()


def test_content_names_shape_and_values():
    flat = np.arange(6.0)
    digests = {
        content_digest(a) for a in (flat, flat.reshape(2, 3), flat.reshape(3, 2), flat + 1e-300, flat + 1)
    }
    assert len(digests) == 5


@pytest.mark.parametrize("executor", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_call_with_what_is_done(executor):
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
        executor=executor,
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
    """Worker processes of loky that this process has started and that run."""
    children = psutil.Process().children()
    return {child.pid for child in children if "LokyProcess" in " ".join(child.cmdline())}


@pytest.mark.parametrize("kind", ["inline", "threads", PROCESSES])
def test_workers_keep_to_their_threads(kind, request):
    executor = {"inline": lambda: None, "threads": lambda: ThreadPoolExecutor(2)}.get(
        kind, lambda: request.getfixturevalue("processes")
    )()
    import torch

    before = torch.get_num_threads()
    solutions = solve_blocks(blocks(3), block_methods.thread_count, program="joint", executor=executor)
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
    for executor in (0, True, "four", 1.5):
        with pytest.raises(ExecutorError, match="executor"):
            solve_blocks(never(), program="joint", executor=executor)
    with pytest.raises(ExecutorError, match="made a int"):
        solve_blocks(never(), program="joint", executor=lambda: 7)
    with pytest.raises(ExecutorError, match="retries"):
        Workers(retries=-1)
    with pytest.raises(ExecutorError, match="window"):
        Workers(window=0)
    nowhere = Workers(executor=Recorder(1), shared_folder="/nowhere/at/all")
    with pytest.raises(ExecutorError, match="shared_folder"):
        solve_blocks(never(), program="joint", executor=nowhere)


def test_entries_of_the_wrong_kind_or_number_are_named():
    with pytest.raises(ArgumentError, match="problems: entry 1 is a int"):
        solve_blocks([*blocks(1), 3], "greedy_obs", program="joint")
    with pytest.raises(ArgumentError, match="incumbents: entry 0 is a str"):
        solve_blocks(blocks(1), "greedy_obs", program="joint", incumbents=["x"])
    with pytest.raises(ArgumentError, match="incumbents: 1 for more blocks"):
        solve_blocks(blocks(2), "greedy_obs", program="joint", incumbents=[None])
    assert solve_blocks([], "greedy_obs", program="joint", executor=Recorder(1)) == []


def test_an_executor_that_is_closed_is_named():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(ExecutorError, match="executor: it refused a block"):
        solve_blocks(blocks(1), "greedy_obs", program="joint", executor=executor)


def test_a_long_silence_is_logged_and_waited_through(pool, monkeypatch, caplog):
    monkeypatch.setattr("cbs_opt.execution.blocks.QUIET", 0.05)
    problems = blocks(2)
    solutions = solve_blocks(problems, block_methods.sleeping, program="joint", executor=pool, seconds=0.4)
    same(solutions, [greedy(problem, "joint") for problem in problems])
    assert "no block came back for 0.05 s; 2 are out, first block 0" in caplog.text


def test_what_the_caller_raises_gets_through(pool):
    def stop(_index: int, _solution: BlockSolution) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        solve_blocks(blocks(4), "greedy_obs", program="joint", executor=pool, on_solution=stop)
    assert all(
        s.keep is not None for s in solve_blocks(blocks(2), "greedy_obs", program="joint", executor=pool)
    )


@pytest.fixture(scope="module")
def dask_executor() -> Iterator[Executor]:
    distributed = pytest.importorskip("distributed", reason="extra dask not installed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0
    )
    client = distributed.Client(cluster)
    yield client.get_executor()
    client.close()
    cluster.close()


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    ray = pytest.importorskip("ray", reason="extra ray not installed")
    from cbs_opt.execution.ray import RayExecutor

    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=environment,
        object_store_memory=10**8,
    )
    yield RayExecutor()
    ray.shutdown()


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Executor:
    executor: Executor = request.getfixturevalue(f"{request.param}_executor")
    return executor


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["dask", "ray"], indirect=True)
def test_clusters_give_what_one_process_gives(cluster, tmp_path):
    problems = blocks(10)
    same(
        solve_blocks(problems, "branch_and_bound", program="joint", seed=5, executor=cluster),
        solve_blocks(problems, "branch_and_bound", program="joint", seed=5),
    )
    spread = solve_blocks(
        problems, block_methods.drawn, program="joint", seed=1, executor=cluster, delay=0.05
    )
    same(spread, solve_blocks(problems, block_methods.drawn, program="joint", seed=1))
    assert len({solution.stats.message for solution in spread}) == 2, "both workers took part"
    shared = sharing(4)
    same(
        solve_blocks(shared, block_methods.drawn, program="selection", executor=cluster),
        solve_blocks(shared, block_methods.drawn, program="selection"),
    )
    unseen = Workers(executor=cluster, shared_folder=tmp_path)
    assert {
        s.stats.message
        for s in solve_blocks(problems, block_methods.thread_count, program="joint", executor=unseen)
    } == {"1"}


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["dask", "ray"], indirect=True)
def test_clusters_lose_workers_and_have_failing_blocks(cluster, tmp_path):
    problems = blocks(6)
    problems[2] = named(problems[2], "fatal")
    solutions = solve_blocks(
        problems, block_methods.fatal, program="joint", executor=cluster, folder=str(tmp_path), deaths=1
    )
    same(solutions, [greedy(problem, "joint") for problem in problems])
    assert len(list(tmp_path.iterdir())) == 1
    problems[2] = named(problems[2], "raises")
    solutions = solve_blocks(problems, block_methods.failing, program="joint", executor=cluster)
    assert [s.termination is Termination.ERROR for s in solutions] == [i == 2 for i in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["dask", "ray"], indirect=True)
def test_clusters_give_up_on_a_block_that_kills_every_worker(cluster, tmp_path):
    problems = blocks(5)
    problems[1] = named(problems[1], "fatal")
    solutions = solve_blocks(
        problems,
        block_methods.fatal,
        program="joint",
        executor=Workers(executor=cluster, retries=1),
        folder=str(tmp_path),
        deaths=99,
    )
    assert solutions[1].termination is Termination.ERROR
    assert "lost 2 times" in solutions[1].stats.message
    rest = [0, 2, 3, 4]
    same([solutions[i] for i in rest], [greedy(problems[i], "joint") for i in rest])


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["dask", "ray"], indirect=True)
def test_ctrl_c_leaves_a_cluster_of_the_caller_usable(cluster):
    problems = [named(problem, "quick" if index == 0 else "") for index, problem in enumerate(blocks(3))]
    solutions = solve_blocks(
        problems,
        block_methods.sleeping,
        program="joint",
        executor=cluster,
        seconds=5.0,
        on_solution=lambda index, _: interrupt_soon() if index == 0 else None,
    )
    assert [solution.limit for solution in solutions] == [None, Limit.INTERRUPTED, Limit.INTERRUPTED]
    again = solve_blocks(problems, "greedy_obs", program="joint", executor=cluster)
    same(again, [greedy(problem, "joint") for problem in problems])


def test_ray_says_what_it_needs():
    ray = pytest.importorskip("ray", reason="extra ray not installed")
    from cbs_opt.execution.ray import RayExecutor

    if not ray.is_initialized():
        with pytest.raises(ExecutorError, match="not initialised"):
            RayExecutor()
