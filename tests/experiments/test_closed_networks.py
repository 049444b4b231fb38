"""Closing a block: what is called optimal is, and what branching adds is a bound that holds."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.benchmarks.closed_networks import close
from formulations import BlockProblem, Limits
from formulations.branch_and_bound import branch_and_bound


@pytest.mark.parametrize("damping", [0.3, 30.0])
def test_closed_blocks_have_the_optimum(damping):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 40)) / np.sqrt(20)
    problem = BlockProblem(weights=rng.normal(size=40), rows=rows, damping=damping, n_prune=30)
    found = close(problem, time_limit=20.0, seed=0)
    exact = branch_and_bound(problem, "joint", limits=Limits(time_limit=60.0))
    assert found["verified"]
    assert found["gap"] <= found["gap_before_branching"]
    assert found["bound"] <= exact.objective * (1.0 + 1e-12)
    assert found["proved_optimal"]
    assert found["objective"] == pytest.approx(exact.objective, rel=1e-6)
