"""What a block refuses, and what it shares and keeps."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from formulations.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError
from formulations.problem import BlockProblem

WEIGHTS = np.arange(1.0, 5.0)
ROWS = np.random.default_rng(0).normal(size=(6, 4))


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("n_prune", "x", ArgumentError),
        ("n_prune", True, ArgumentError),
        ("n_prune", 1.5, ArgumentError),
        ("n_prune", float("nan"), ArgumentError),
        ("n_prune", -1, ArgumentError),
        ("n_prune", 5, ArgumentError),
        ("damping", "x", ArgumentError),
        ("damping", None, ArgumentError),
        ("damping", -1e-3, ArgumentError),
        ("damping", 5e-324, ArgumentError),
        ("damping", float("nan"), ArgumentError),
        ("damping", float("inf"), ArgumentError),
        ("weights", WEIGHTS * np.nan, NonFiniteError),
        ("weights", ["a"] * 4, ArgumentError),
        ("rows", ROWS[:, :3], ShapeError),
        ("rows", ROWS[0], ShapeError),
        ("gradient", np.zeros(3), ShapeError),
    ],
)
def test_unusable_arguments_are_named(argument: str, value: Any, error: type[Exception]) -> None:
    arguments = {"weights": WEIGHTS, "rows": ROWS, "n_prune": 2, "damping": 0.1, argument: value}
    with pytest.raises(error, match=argument):
        BlockProblem(**arguments)


def test_a_hessian_must_be_symmetric_and_semidefinite() -> None:
    for hessian in (np.diag([1.0, 1.0, 1.0, -1.0]), np.triu(np.ones((4, 4)))):
        with pytest.raises(NotPositiveDefiniteError, match="hessian"):
            BlockProblem(weights=WEIGHTS, hessian=hessian, n_prune=2)


def test_rows_and_hessian_exclude_one_another() -> None:
    for data in ({}, {"rows": ROWS, "hessian": np.eye(4)}):
        with pytest.raises(ArgumentError, match="rows, hessian"):
            BlockProblem(weights=WEIGHTS, n_prune=2, **data)


def test_arrays_are_read_only_also_after_pickling() -> None:
    problem = BlockProblem(weights=WEIGHTS, rows=ROWS, n_prune=np.int64(2), damping=np.float32(0.5))
    again = pickle.loads(pickle.dumps(problem))  # noqa: S301
    assert again.fingerprint() == problem.fingerprint()
    for array in (problem.weights, problem.rows, again.weights, again.rows):
        assert not array.flags.writeable
    assert WEIGHTS.flags.writeable


@pytest.mark.parametrize("weights", [[1.0 + 2.0j], [1.0 + 0.0j], [[1.0], [2.0, 3.0]], ["a"], [None, {}]])
def test_weights_that_are_no_real_numbers_are_refused(weights):
    with pytest.raises(ArgumentError, match="weights"):
        BlockProblem(weights=weights, rows=np.ones((1, len(weights))), n_prune=0)
