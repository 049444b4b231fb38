"""`prune` over workers gives the network that it gives without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import joblib
import pytest
import torch

from cbs_opt import PruneReport, prune
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.errors import ExecutorError
from cbs_opt.recipe.records import Recipe, Weights, absolute
from cbs_opt.recipe.select import Exact, SwapSearch
from cbs_opt.system.resources import Resources
from formulations.errors import ArgumentError, UnsupportedProblemError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

BASE = Recipe(curvature=EmpiricalFisher(samples=30), weights=Weights(blocks="row"), select=Exact())
RECIPES = Recipe.grid(BASE, damping=[absolute(1e-2), absolute(1e-1)])


def pruned(
    recipe: Recipe | list[Recipe] = RECIPES, workers: Any = None, **options: Any
) -> tuple[torch.nn.Module, PruneReport]:
    model = options.pop("model", None) or network()
    resources = Resources(workers=workers)
    return model, prune(
        model, data(), sparsity=0.5, recipe=recipe, resources=resources, progress=False, **options
    )


@pytest.mark.parametrize(
    ("method", "program"),
    [("branch_and_bound", "joint"), ("outer_approximation", "joint"), ("lower_bound", "selection")],
)
@pytest.mark.parametrize("stages", [None, 2])
def test_threads_give_the_same_network(method, program, stages):
    program = program if stages is None else "joint"
    recipe = replace(BASE, select=Exact(method=method, program=program), damping=absolute(1e-2))
    model, report = pruned(recipe, stages=stages)
    with joblib.parallel_config(backend="threading"):
        other, spread = pruned(recipe, workers=2, stages=stages)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [b.status for b in report.blocks] == [b.status for b in spread.blocks]
    assert report.request == spread.request


@pytest.mark.slow
def test_processes_give_the_same_network():
    model, _ = pruned()
    other, _ = pruned(workers=2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_methods_that_take_all_blocks_at_once_refuse_workers():
    with pytest.raises(ArgumentError, match=r"resources\.workers: given for swap_search"):
        pruned(replace(BASE, select=SwapSearch(program="selection")), workers=2)
    with pytest.raises(ArgumentError, match=r"resources\.workers"):
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
        pruned(workers=2, model=model)
    assert len(calls) == 3
    assert_untouched(model, before)


def test_blocks_too_large_for_dense_methods_are_named(monkeypatch):
    monkeypatch.setattr("cbs_opt.select.blockwise.DENSE_BLOCK", 4)
    with (
        pytest.raises(UnsupportedProblemError, match=r"weights\.blocks"),
        joblib.parallel_config("threading"),
    ):
        pruned(workers=1)
