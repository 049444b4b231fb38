"""Records of methods: their names, their options, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from cbs_opt.recipe.select import COMMON, SELECTS, Exact, GreedyOBS, Select, SwapSearch, select_by_name
from cbs_opt.select.methods import available_methods, find_method
from formulations.errors import ArgumentError
from formulations.problem import PROGRAMS
from tests.cbs_opt.recipe.strategies import selects


def test_every_method_of_the_package_has_a_record() -> None:
    for method in available_methods():
        record = select_by_name(method.name)
        assert record.method == method.name
        assert isinstance(record, Exact) == (method.kind in ("exact", "bound", "solver"))
    assert isinstance(select_by_name("highs:selection_qp"), Exact)


@pytest.mark.parametrize("name", SELECTS)
def test_the_fields_of_a_record_are_the_options_of_its_method(name: str) -> None:
    fields = set(SELECTS[name].__dataclass_fields__) - set(COMMON)
    method = find_method(name, "joint")
    assert fields == set(method.options) - {"warm"}
    assert ("repeats" in SELECTS[name].__dataclass_fields__) == method.randomized


@pytest.mark.parametrize("name", SELECTS)
def test_by_default_no_option_is_given(name: str) -> None:
    record = SELECTS[name]()
    assert record.method_options == {}
    assert record.tries == 1
    for program in find_method(name, "joint").programs:
        find_method(name, program).check_options(record.method_options, program)


def test_options_are_those_that_were_given() -> None:
    record = SwapSearch(start=["obs", "magnitude"], max_swaps=np.int64(3), repeats=np.int32(2), time_limit=1)
    assert record.method_options == {"start": ("obs", "magnitude"), "max_swaps": 3}
    assert (record.tries, record.time_limit) == (2, 1.0)
    assert type(record.max_swaps) is int
    assert Exact(options={"swaps": np.int64(3), "search": None}).method_options == {"swaps": 3}


@pytest.mark.parametrize(
    ("record", "fields", "argument"),
    [
        *((record, {"program": "both"}, "select.program") for record in (*SELECTS.values(), Exact)),
        *((record, {"program": None}, "select.program") for record in (*SELECTS.values(), Exact)),
        *((record, {"time_limit": -1.0}, "select.time_limit") for record in (*SELECTS.values(), Exact)),
        *((record, {"time_limit": "1"}, "select.time_limit") for record in (*SELECTS.values(), Exact)),
        *((SwapSearch, {"repeats": value}, "select.repeats") for value in (0, True, 1.0, None)),
        *((SwapSearch, {"max_swaps": value}, "select.max_swaps") for value in (-1, 2.5, False)),
        *((SwapSearch, {"restarts": value}, "select.restarts") for value in (-1, "3")),
        *((SwapSearch, {"drops": value}, "select.drops") for value in (0, np.float64(3.0))),
        *((SwapSearch, {"start": value}, "select.start") for value in (3, ["obs", 3], [])),
        *((SwapSearch, {"spread": value}, "select.spread") for value in (-0.1, float("nan"))),
        *((SwapSearch, {"tolerance": value}, "select.tolerance") for value in (-0.1, True)),
        (SwapSearch, {"restarts": 2, "program": "selection"}, "select.restarts"),
        (SwapSearch, {"drops": 2, "program": "selection"}, "select.drops"),
        (SELECTS["randomized_magnitude"], {"repeats": 0}, "select.repeats"),
        (SELECTS["randomized_magnitude"], {"spread": "wide"}, "select.spread"),
        (GreedyOBS, {"drops": 0}, "select.drops"),
        (SELECTS["iterative_hard_threshold"], {"steps": -1}, "select.steps"),
        (Exact, {"method": 3}, "select.method"),
        (Exact, {"method": "greedy_obs"}, "select.method"),
        (Exact, {"options": [3]}, "select.options"),
        (Exact, {"options": {"a": object()}}, "select.options.a"),
        (Exact, {"options": {3: 1}}, "select.options"),
        (Exact, {"repeats": 0}, "select.repeats"),
    ],
)
def test_what_a_field_may_not_be_is_refused(
    record: type[Select], fields: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        record(**fields)
    assert caught.value.argument == argument
    assert caught.value.found
    assert caught.value.remedy


@given(selects)
def test_records_can_be_copied_and_sent_to_other_processes(record: Select) -> None:
    assert copy.deepcopy(record) == record
    assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301
    assert record.program in PROGRAMS
