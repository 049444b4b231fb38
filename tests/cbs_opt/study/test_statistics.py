"""Profiles, means, excesses and effects against values worked out by hand, and their properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt.study.statistics import (
    PROCESSOR,
    SHIFT_NODES,
    SHIFT_SECONDS,
    WALL,
    bootstrap_mean,
    charged_seconds,
    clock,
    effects,
    performance_profile,
    processor_share,
    shifted_geometric_mean,
    with_excess,
)
from tests.cbs_opt.study.made_up import heuristic, labelled, row

POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(values=POSITIVE, shift=st.floats(1e-3, 1e2))
def test_a_shifted_geometric_mean_is_a_mean_and_shifts_it_upwards(values: list[float], shift: float) -> None:
    mean = shifted_geometric_mean(values, shift)
    plain = shifted_geometric_mean(values, 0.0)
    slack = 1e-6 * max(values) + 1e-9
    assert min(values) - slack <= plain <= mean + slack
    assert mean <= np.mean(values) + slack
    assert math.isclose(shifted_geometric_mean([values[0]] * 3, shift), values[0], rel_tol=1e-6)


def test_a_profile_counts_time_outs_as_infinite_and_leaves_heuristics_out() -> None:
    table = labelled(
        [
            row("a", "x", 1.0),
            row("b", "x", 4.0),
            row("a", "y", 6.0),
            row("b", "y", 2.0),
            row("a", "z", 10.0, proved=False),
            row("b", "z", 3.0),
            row("a", "open", 10.0, proved=False),
            row("b", "open", 10.0, proved=False),
            heuristic("h", "x", 2.0),
        ]
    )
    ratios = performance_profile(table)
    assert list(ratios) == ["a", "b"]
    np.testing.assert_allclose(ratios["a"], [1.0, 3.0, np.inf, np.inf])
    np.testing.assert_allclose(ratios["b"], [1.0, 1.0, 4.0, np.inf])


def test_a_failed_run_counts_with_its_time_limit() -> None:
    crashed = row("a", "x", 0.1, proved=False, objective=None, status="crashed")
    seconds = charged_seconds(labelled([crashed, row("a", "y", 3.0), heuristic("h", "x", 1.0)]))
    assert list(seconds) == [10.0, 3.0, 0.01]


def test_excess_is_over_the_proved_optimum_of_the_block_and_program() -> None:
    table = with_excess(
        labelled(
            [
                row("exact", "x", 1.0, objective=2.0, gap=1e-4),
                heuristic("h", "x", 3.0),
                heuristic("near", "x", 2.0 * (1.0 + 5e-5)),
                row("exact", "x", 1.0, objective=4.0, program="selection"),
                heuristic("h", "x", 6.0, program="selection"),
                row("exact", "open", 9.0, objective=1.0, proved=False),
                heuristic("h", "open", 5.0),
            ]
        )
    )
    found = {(r.method, r.instance, r.program): r.excess for r in table.itertuples()}
    assert found["h", "x", "joint"] == pytest.approx(0.5)
    assert found["h", "x", "selection"] == pytest.approx(0.5)
    assert found["near", "x", "joint"] == 0.0
    assert found["exact", "x", "joint"] == 0.0
    assert math.isnan(found["h", "open", "joint"])


def test_labels_name_the_options_that_differ_from_the_first() -> None:
    rows = [
        row("a", "x", 1.0, options={"search": "best", "fixing": True}),
        row("a", "x", 1.0, options={"search": "depth", "fixing": False}),
        row("b", "x", 1.0, options={"level": 2}),
    ]
    assert list(labelled(rows)["label"]) == ["a", "a fixing=off search=depth", "b"]


def test_an_effect_compares_runs_that_differ_in_one_option_alone() -> None:
    rows = []
    for block, base in zip("wxyz", (1.0, 2.0, 3.0, 4.0), strict=True):
        rows.append(row("a", block, base, options={"cuts": "on", "depth": 1}))
        slower = 3.0 * (base + SHIFT_SECONDS) - SHIFT_SECONDS
        rows.append(row("a", block, slower, options={"cuts": "off", "depth": 1}, proved=True))
        rows.append(row("a", block, base, options={"cuts": "on", "depth": 2}, nodes=5 + 5 + SHIFT_NODES))
        rows.append(row("a", block, 0.5, options={"cuts": "off", "depth": 2}, seed=7))
    found = {(e.option, e.measure): e for e in effects(labelled(rows))}
    cuts, depth = found["cuts", "time"], found["depth", "nodes"]
    assert cuts.ratio.value == pytest.approx(3.0)
    assert cuts.ratio.low == pytest.approx(3.0)
    assert (cuts.pairs, cuts.blocks, cuts.base, cuts.value) == (4, 4, "on", "off")
    assert depth.ratio.value == pytest.approx(2.0)
    assert found["depth", "time"].ratio.value == pytest.approx(1.0)


def test_an_effect_on_a_heuristic_is_measured_by_its_objective() -> None:
    rows = []
    for block in "xy":
        rows.append(heuristic("h", block, 2.0, options={"draws": 1}))
        rows.append(heuristic("h", block, 1.0, options={"draws": 9}))
    found = {effect.measure: effect.ratio.value for effect in effects(labelled(rows))}
    assert found == {"time": pytest.approx(1.0), "objective": pytest.approx(0.5)}


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(25), 2)
    hits = 0
    for trial in range(100):
        values = generator.normal(size=25)[groups] + 0.1 * generator.normal(size=50)
        interval = bootstrap_mean(values, list(groups), seed=trial)
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= 0.0 <= interval.high
    # 95 of 100 are expected; a percentile bootstrap over 25 groups falls a little short.
    assert hits >= 84


def test_the_interval_of_one_block_is_a_point() -> None:
    interval = bootstrap_mean(np.array([1.0, 3.0]), ["x", "x"])
    assert interval.low == interval.value == interval.high == 2.0


def test_processor_time_decides_where_every_answer_of_one_thread_has_it() -> None:
    rows = [row("a", "x", 9.0, cpu_seconds=1.0), row("b", "x", 4.0, cpu_seconds=2.0)]
    timed = labelled([*rows, row("b", "y", 10.0, proved=False, objective=None, status="crashed")])
    assert clock(timed) == PROCESSOR
    assert list(charged_seconds(timed)) == [1.0, 2.0, 10.0]
    assert performance_profile(timed)["a"][0] == 1.0
    assert performance_profile(timed)["b"][0] == 2.0
    assert processor_share(timed) == pytest.approx((1.0 / 9.0 + 0.5) / 2.0)
    assert clock(labelled([*rows, row("c", "x", 1.0)])) == WALL
    assert clock(labelled([{**made, "threads": 2} for made in rows])) == WALL
    assert performance_profile(labelled([*rows, row("c", "x", 1.0)]))["b"][0] == 4.0
