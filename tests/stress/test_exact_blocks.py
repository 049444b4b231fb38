"""A small share of the checks that are run by hand: no fault on blocks of any regime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stress.check_blocks import faults
from tests.stress.exact import ExactBlock
from tests.stress.regimes import draw


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_no_method_claims_what_is_not_so(start: int) -> None:
    with np.errstate(all="ignore"):
        found = {seed: faults(seed)[0] for seed in range(start, start + 50)}
    assert not {seed: wrong for seed, wrong in found.items() if wrong}


@pytest.mark.parametrize("kind", ["supports", "channels"])
def test_no_method_claims_what_is_not_so_of_other_blocks(kind: str) -> None:
    with np.errstate(all="ignore"):
        found = {seed: faults(seed, kind=kind)[0] for seed in range(24)}
    assert not {seed: wrong for seed, wrong in found.items() if wrong}


def test_the_exact_optimum_is_the_least_value_of_all_sets() -> None:
    from fractions import Fraction
    from itertools import combinations

    from formulations import BlockProblem, update

    problem = BlockProblem(**(draw(3) | {"damping": 1.0}))
    exact = ExactBlock(problem)
    for program in ("selection", "joint"):
        least = None
        for pruned in combinations(range(problem.n), problem.n_prune):
            keep = np.ones(problem.n, dtype=bool)
            keep[list(pruned)] = False
            new = np.where(keep, problem.weights, 0.0) if program == "selection" else update(problem, keep)
            value = exact.loss(new.tolist())
            least = value if least is None else min(least, value)
        assert least is not None
        optimum = exact.optimum(program)
        assert optimum is not None
        assert optimum <= least <= optimum + abs(optimum) * Fraction(1e-12) + Fraction(1e-30)
