"""The semidefinite programs of pairs: exact for two weights, ordered, and between bound and optimum."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import pair_relaxation
from experiments.benchmarks.pair_relaxation import PairProgram, chosen_pairs, first_inputs, main
from formulations import BlockProblem
from formulations.dense_forms import joint_form
from formulations.problem import IntArray
from formulations.relaxations import lower_bound
from tests.formulations.blocks import block, brute_force

ACCURACY = 1e-6
"""Of the solver, relative to the loss of pruning everything."""


def value(problem: BlockProblem, pairs: IntArray) -> float:
    """Value of the program of some pairs, in units of the loss."""
    form = joint_form(problem)
    return form.scale * PairProgram(form, problem.n_keep, pairs).solve().value


def accuracy(problem: BlockProblem) -> float:
    form = joint_form(problem)
    return ACCURACY * form.scale * form.constant


def every(n: int) -> IntArray:
    return np.stack(np.triu_indices(n, 1), axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_two_weights_are_solved_exactly(seed: int) -> None:
    problem = block("random", 2, 1, seed)
    optimum = brute_force(problem, "joint")
    assert value(problem, every(2)) == pytest.approx(optimum, abs=accuracy(problem))


@pytest.mark.parametrize("seed", range(3))
def test_pairs_lie_between_the_best_diagonal_split_and_the_optimum(seed: int) -> None:
    problem = block("hessian", 8, 4, seed)
    form = joint_form(problem)
    none = PairProgram(form, problem.n_keep, every(8)[:0]).solve()
    some, more = (chosen_pairs(form, none, count) for count in (4, 12))
    assert {*map(tuple, some.tolist())} < {*map(tuple, more.tolist())}
    optimum = brute_force(problem, "joint")
    split = lower_bound(problem, "joint", relaxation="perspective", diagonal_split=True).bound
    rising = [split, *(value(problem, pairs) for pairs in (every(8)[:0], some, more, every(8))), optimum]
    assert all(low <= high + accuracy(problem) for low, high in pairwise(rising))


def test_cells_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pair_relaxation, "BLOCKS", pair_relaxation.BLOCKS[:1])
    arguments = ["--orders", "8", "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count("| gram_gate_64 | 8 |") == 2
    monkeypatch.setattr(pair_relaxation, "measure", None)
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_the_first_inputs_of_a_row_are_a_block_of_their_own() -> None:
    whole, part = first_inputs("gram_o_64_s50", 64, 0.5), first_inputs("gram_o_64_s50", 16, 0.25)
    assert (part.n, part.n_prune, part.damping) == (16, 4, whole.damping)
    assert np.array_equal(part.hessian, whole.hessian[:16, :16])
