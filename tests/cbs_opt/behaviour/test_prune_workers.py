"""`prune` over workers gives the network that it gives without them."""

from __future__ import annotations

from typing import Any

import joblib
import pytest
import torch

from cbs_opt import PruneReport, prune
from cbs_opt.errors import ExecutorError
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
    options = {"method": method, "program": program, "stages": stages, "damping": 1e-2}
    if stages == 2:
        options["program"] = "joint"
    model, report = pruned(**options)
    with joblib.parallel_config(backend="threading"):
        other, spread = pruned(workers=2, **options)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [b.status for b in report.blocks] == [b.status for b in spread.blocks]
    assert report.settings == spread.settings
    assert "workers" not in report.settings


@pytest.mark.slow
def test_processes_give_the_same_network():
    model, _ = pruned()
    other, _ = pruned(workers=2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_methods_that_take_all_blocks_at_once_refuse_workers():
    with pytest.raises(ArgumentError, match="workers: given for swap_search"):
        pruned(method="swap_search", program="selection", workers=2)
    with pytest.raises(ArgumentError, match="workers"):
        pruned(workers="cluster")


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt, KeyboardInterrupt), (RuntimeError, ExecutorError)]
)
def test_lost_or_interrupted_workers_leave_the_network_alone(error, expected, monkeypatch):
    """joblib raises when workers are lost, and while it waits for them."""
    model = network()
    before = snapshot(model)
    retrieve, calls = joblib.Parallel._retrieve, []

    def failing(self):
        for number, result in enumerate(retrieve(self)):
            calls.append(number)
            if number == 2:
                raise error("gone")
            yield result

    monkeypatch.setattr(joblib.Parallel, "_retrieve", failing)
    with pytest.raises(expected), joblib.parallel_config(backend="threading"):
        prune(model, data(), **(OPTIONS | {"workers": 2}))
    assert len(calls) == 3
    assert_untouched(model, before)


def test_blocks_too_large_for_dense_methods_are_named(monkeypatch):
    monkeypatch.setattr("cbs_opt.select.selectors.DENSE_BLOCK", 4)
    with pytest.raises(UnsupportedProblemError, match="partition"), joblib.parallel_config("threading"):
        pruned(workers=1)
