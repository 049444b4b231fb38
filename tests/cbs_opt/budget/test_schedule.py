"""Sparsity schedules: they never fall and end at the target, to the bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt.budget.schedule import SCHEDULES, sparsity_schedule
from cbs_opt.stages.trials import FACTOR, DampingSearch
from formulations.errors import ArgumentError

shares = st.floats(0.0, 0.999)


@given(target=shares, stages=st.integers(1, 40), rule=st.sampled_from(SCHEDULES), start=st.none() | shares)
def test_schedules_rise_to_the_target(target: float, stages: int, rule: str, start: float | None) -> None:
    if start is not None and start > target:
        with pytest.raises(ArgumentError, match="start"):
            sparsity_schedule(target, stages=stages, schedule=rule, start=start)
        return
    found = sparsity_schedule(target, stages=stages, schedule=rule, start=start)
    assert len(found) == stages
    assert found[-1] == target
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(found))
    if start is not None and stages > 1:
        assert found[0] == pytest.approx(start, abs=1e-12)


def test_geometric_stages_keep_the_same_share_of_what_is_left() -> None:
    kept = [1.0 - share for share in (0.0, *sparsity_schedule(0.9, stages=7))]
    ratios = [later / earlier for earlier, later in pairwise(kept)]
    assert ratios == pytest.approx([0.1 ** (1 / 7)] * 7)


def test_polynomial_stages_slow_down() -> None:
    found = sparsity_schedule(0.9, stages=6, schedule="polynomial", start=0.1)
    steps = [later - earlier for earlier, later in pairwise(found)]
    assert steps == sorted(steps, reverse=True)


def test_a_given_schedule_is_taken_as_it_is() -> None:
    assert sparsity_schedule(0.9, stages=3, schedule=[0.5, 0.5, 0.9]) == (0.5, 0.5, 0.9)


def test_the_damping_follows_the_winners() -> None:
    search = DampingSearch((1.0, 100.0, 10.0))
    assert search.grid() == (1.0, 10.0, 100.0)
    search.accepted(10.0)
    assert search.grid() == (10.0 / FACTOR, 10.0, 10.0 * FACTOR)
    search.refused()
    assert min(search.grid()) >= 10.0 * FACTOR
    assert DampingSearch((1.0,), centre=search.centre).grid() == search.grid()
