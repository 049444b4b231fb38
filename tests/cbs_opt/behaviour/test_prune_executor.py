"""`prune` over an executor gives the network that it gives without one."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from joblib.externals import loky

from cbs_opt import PruneReport, prune
from cbs_opt.errors import ExecutorError
from cbs_opt.execution.workers import Workers
from formulations.errors import ArgumentError, UnsupportedProblemError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

OPTIONS: dict[str, Any] = {
    "sparsity": 0.5,
    "program": "joint",
    "method": "branch_and_bound",
    "partition": "row",
    "samples": 30,
    "damping": [1e-2, 1e-1],
    "progress": False,
}


def pruned(**options: Any) -> tuple[torch.nn.Module, PruneReport]:
    model = network()
    return model, prune(model, data(), **(OPTIONS | options))


@pytest.mark.parametrize(
    ("method", "program"),
    [("branch_and_bound", "joint"), ("outer_approximation", "joint"), ("lower_bound", "selection")],
)
@pytest.mark.parametrize("stages", [1, 2])
def test_threads_give_the_same_network(method, program, stages):
    with ThreadPoolExecutor(2) as executor:
        options = {"method": method, "program": program, "stages": stages, "damping": 1e-2}
        if stages == 2:
            options["program"] = "joint"
        model, report = pruned(**options)
        other, spread = pruned(executor=executor, **options)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [b.status for b in report.blocks] == [b.status for b in spread.blocks]
    assert report.settings == spread.settings
    assert "executor" not in report.settings


@pytest.mark.slow
@pytest.mark.parametrize("executor", [2, Workers(executor=2), lambda: loky.ProcessPoolExecutor(2)])
def test_processes_give_the_same_network(executor):
    model, _ = pruned()
    other, _ = pruned(executor=executor)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_methods_that_take_all_blocks_at_once_refuse_an_executor():
    with pytest.raises(ArgumentError, match="executor: given for swap_search"):
        pruned(method="swap_search", program="selection", executor=2)
    with pytest.raises(ExecutorError, match="executor"):
        pruned(executor="cluster")


class Broken(Executor):
    """Takes no call, or is interrupted at the third."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self._threads = ThreadPoolExecutor(1)
        self._calls = 0

    def submit(self, fn, /, *args, **kwargs):
        self._calls += 1
        if self._calls == 3:
            raise self._error
        return self._threads.submit(fn, *args, **kwargs)


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("closed"), ExecutorError)]
)
def test_a_broken_or_interrupted_executor_leaves_the_network_alone(error, expected):
    model = network()
    before = snapshot(model)
    with pytest.raises(expected):
        prune(model, data(), **(OPTIONS | {"executor": Broken(error)}))
    assert_untouched(model, before)


def test_blocks_too_large_for_dense_methods_are_named(monkeypatch):
    monkeypatch.setattr("cbs_opt.select.blockwise.DENSE_BLOCK", 4)
    with pytest.raises(UnsupportedProblemError, match="partition"), ThreadPoolExecutor(1) as executor:
        pruned(executor=executor)
