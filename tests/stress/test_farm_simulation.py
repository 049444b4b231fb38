"""The forecast of a large farm obeys its limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stress.farm_simulation import WORKER_COUNTS, Costs, forecast, simulate

FREE = Costs(send=0.0, receive=0.0, transfer=0.0)


@settings(max_examples=60, deadline=None)
@given(
    durations=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=60),
    workers=st.integers(1, 12),
    send=st.floats(0, 0.5),
    receive=st.floats(0, 0.5),
    transfer=st.floats(0, 0.5),
)
def test_no_run_is_shorter_than_any_part_of_it(durations, workers, send, receive, transfer):
    found = simulate(durations, workers, Costs(send=send, receive=receive, transfer=transfer))
    assert all(share <= 1.0 + 1e-9 for share in found.busy.values())
    assert found.seconds >= max(durations)
    free = simulate(durations, workers, FREE)
    assert free.seconds <= found.seconds + 1e-9
    # List scheduling: at most the mean load and one longest block (Graham 1966).
    assert free.seconds <= sum(durations) / workers + max(durations) + 1e-9


def test_the_bottleneck_is_the_part_that_is_always_busy():
    durations = [1.0] * 2000
    one = simulate(durations, 1, FREE)
    assert one.seconds == pytest.approx(2000.0)
    assert one.bottleneck == "workers"
    assert simulate(durations, 100, Costs(send=0.1, receive=0.0, transfer=0.0)).bottleneck == "sender"
    slow_link = simulate(durations, 100, Costs(send=0.0, receive=0.0, transfer=0.1))
    assert slow_link.bottleneck == "link"
    assert slow_link.speedup == pytest.approx(10.0, rel=0.01)
    assert "too few blocks" in simulate([1.0] * 3, 2, FREE).bottleneck


def test_the_forecast_names_a_bottleneck_for_every_size():
    lines = list(forecast(n=16, gigabits=1.0, sample=4, workers=1))
    assert len(lines) == 7
    assert all("bottleneck" in line for line in lines[1:-1])
    speedups = [float(line.split("blocks:")[1].split("times")[0]) for line in lines[1:-1]]
    assert all(
        0.0 <= speedup <= workers + 0.05 for speedup, workers in zip(speedups, WORKER_COUNTS, strict=True)
    )
