"""The shipped blocks are built by our own code and their records verify."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import build_library as build
from formulations import objective
from formulations.enumeration import enumerate_optimum
from formulations.instances import read_instance
from tests.formulations.blocks import slack


def test_index_and_files_agree_with_brute_force(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SPARSITIES", (0.5,))
    index = build.build_library(tmp_path, (12,), time_limit=10.0)
    assert index == json.loads((tmp_path / "index.json").read_text())
    (entry,) = index.values()
    problem, origin = read_instance(tmp_path / entry["file"])
    assert origin["seed"] == 0
    assert problem.rows.shape[0] <= problem.n
    posed = type(problem)(
        weights=problem.weights, rows=problem.rows, damping=problem.damping, n_prune=entry["n_prune"]
    )
    for program in ("selection", "joint"):
        optimum = enumerate_optimum(posed, program)
        assert entry[program]["objective"] == pytest.approx(optimum.objective, rel=1e-6)
        assert entry[program]["bound"] <= objective(posed, optimum.keep, program) + slack(posed)


def test_reduced_rows_have_the_hessian_of_the_block():
    problem = build.digits_problem(16)
    whole = build.layer_block(16).to_problem(0)
    assert problem.rows.shape == (16, 16)
    assert whole.rows.shape[0] > 16
    np.testing.assert_array_equal(problem.rows, np.triu(problem.rows))
    expected = whole.dense_hessian()
    np.testing.assert_allclose(problem.dense_hessian(), expected, atol=1e-12 * np.abs(expected).max())
