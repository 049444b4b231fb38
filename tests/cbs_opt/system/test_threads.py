"""Threads are held where they were asked for, and where more of them would only wait."""

import numba
import pytest
import torch
from threadpoolctl import threadpool_info

from cbs_opt.solving import solve
from cbs_opt.system.threads import SMALL_WORK, fitting_limit, thread_limit
from tests.formulations.blocks import block


def in_use():
    return {torch.get_num_threads(), numba.get_num_threads(), *(i["num_threads"] for i in threadpool_info())}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_solve_keeps_to_its_threads_whatever_the_environment_says(monkeypatch):
    from formulations import incumbents

    seen, engine = [], incumbents.greedy

    def greedy(*arguments, **options):
        seen.append(in_use())
        return engine(*arguments, **options)

    monkeypatch.setattr(incumbents, "greedy", greedy)
    solve(block("random", 8, 4, seed=1), "greedy_obs", program="selection", threads=1)
    assert seen == [{1}]
    assert torch.get_num_threads() == 2


def test_a_limit_within_the_same_limit_changes_nothing():
    with thread_limit(1):
        with thread_limit(1):
            assert in_use() == {1}
        assert in_use() == {1}
        with thread_limit(2):
            assert torch.get_num_threads() == 2
        assert in_use() == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("size", "threads"), [(SMALL_WORK, 1), (SMALL_WORK + 1, 2)])
def test_small_work_is_done_by_one_thread(size, threads):
    with fitting_limit(size):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2
