"""The answer to one block, as it is printed."""

from __future__ import annotations

import numpy as np

from formulations.solution import BlockSolution, Limit, Termination


def test_a_solution_prints_on_one_line_whatever_its_size() -> None:
    keep = np.arange(100_000) % 4 == 0
    solution = BlockSolution(
        keep=keep,
        weights=keep * 1.0,
        objective=0.25,
        limit=Limit.TIME,
        program="selection",
        method="swap_search",
    )
    shown = repr(solution)
    assert len(shown) < 200
    for word in ("selection", "swap_search", "feasible", "time", "25000 of 100000", "0.25", "None"):
        assert word in shown


def test_no_solution_prints_too() -> None:
    nothing = BlockSolution(
        keep=None,
        weights=None,
        objective=None,
        program="joint",
        method="enumeration",
        termination=Termination.NO_SOLUTION,
    )
    assert "no_solution, no set" in repr(nothing)
