"""The benchmark of joint search on a small block: every method, measured against the certified bound."""

from __future__ import annotations

import pytest

from cbs_opt.select.joint_program.program import JointProgram
from experiments.benchmarks.joint_search import RIVAL, STARTS, certified, measure, plain_hard_threshold
from formulations import loss
from tests.cbs_opt.fisher import fisher_block

COUNT = 40


@pytest.mark.parametrize("name", [*STARTS, RIVAL])
def test_a_row_follows_the_objective_down_to_the_bound(name: str) -> None:
    block = fisher_block("flat", 60, 20)
    bound, seconds = certified(block, COUNT)
    assert bound > 0.0
    assert seconds > 0.0
    row = measure(JointProgram(block), COUNT, bound, name, 60.0, 0)
    gaps = [gap for _, gap in row["trace"]]
    assert gaps == sorted(gaps, reverse=True)
    assert row["above_bound_start"] >= row["above_bound"] >= 0.0
    assert row["objective"] == pytest.approx(bound * (1.0 + row["above_bound"] / 100.0), rel=1e-5)
    for level, reached in row["seconds_to"].items():
        assert (reached is None) == (row["above_bound"] > float(level))
    assert row.get("locally_optimal", True)


def test_the_rival_descends_from_the_smallest_weights() -> None:
    block = fisher_block("flat", 60, 20)
    keep = plain_hard_threshold(JointProgram(block), COUNT)
    assert int((~keep).sum()) == COUNT
    bound, _ = certified(block, COUNT)
    assert loss.joint_loss(block.to_problem(COUNT), keep.numpy()) >= bound
