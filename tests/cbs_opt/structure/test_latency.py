"""Tables of milliseconds: what they hold, whom they are refused for, and what is chosen by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cbs_opt as cbs
from cbs_opt.structure import latency
from cbs_opt.structure.latency import _axes, _input, _narrow, measure_latency, within_sets
from cbs_opt.structure.widths import Cost, choose_widths, enumerated_widths
from formulations.errors import ArgumentError
from tests.cbs_opt.structure.networks import built

NAMES = ["residual", "depthwise", "grouped", "transposed", "packed", "mlp"]


@pytest.mark.parametrize("name", NAMES)
def test_layers_run_at_every_width_and_give_what_the_first_groups_give(name: str) -> None:
    model, example = built(name)
    structure = cbs.groups(model, example)
    uses = latency._uses(model, example)
    for layer, shapes in uses.items():
        axes = _axes(structure, layer)
        whole = {part: structure[part].n_groups for part, _, _ in axes}
        for widths in (whole, dict.fromkeys(whole, 1)):
            narrow = _narrow(model.get_submodule(layer), structure, axes, widths)
            assert narrow(_input(narrow, shapes[0])).isfinite().all()
            own = sum(entry.numel() for entry in narrow.parameters())
            assert own == sum(p.numel() for p in model.get_submodule(layer).parameters()) or widths != whole


def test_a_table_has_every_layer_at_its_widths_and_adds_up(tmp_path: Path) -> None:
    model, example = built("residual")
    file = tmp_path / "latency.json"
    table = measure_latency(model, example, choices=3, passes=1, cache=file)
    assert {name: widths.tolist() for name, widths in table.offered.items()} == {
        "stem": [2, 4, 6],
        "first.conv1": [2, 4, 6],
        "second.conv1": [4, 7, 10],
        "second.conv2": [4, 7, 10],
    }
    assert all(entry.table.shape == (3,) * len(entry.sets) for entry in table.costs)
    assert all((entry.table > 0.0).all() for entry in table.costs)
    assert table.total >= sum(entry.table.reshape(-1)[-1] for entry in table.costs)
    again = measure_latency(model, example, choices=3, passes=1, cache=file)
    assert again.to_json() == table.to_json()


def test_a_file_of_another_machine_network_or_form_is_refused(tmp_path: Path) -> None:
    model, example = built("mlp")
    file = tmp_path / "latency.json"
    table = measure_latency(model, example, choices=2, passes=1, cache=file)
    with pytest.raises(ArgumentError, match=r"cache: .*another number of widths"):
        measure_latency(model, example, choices=3, cache=file)
    file.write_text(replace(table, machine="cpu: Elbrus, 9 threads, torch 1").to_json())
    with pytest.raises(ArgumentError, match=r"cache: a table of cpu: Elbrus, .* and this is cpu: "):
        measure_latency(model, example, choices=2, cache=file)
    file.write_text("{}")
    with pytest.raises(ArgumentError, match="is no latency table"):
        measure_latency(model, example, choices=2, cache=file)
    other, inputs = built("residual")
    x, y = torch.cat([inputs] * 10), torch.zeros(20, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="latency: a table of another network: 0, 2, first"):
        cbs.prune_groups(other, (x, y), milliseconds=1.0, latency=table)


def made(model: Any, example: Any) -> cbs.LatencyTable:
    """A table of the network whose costs are proportional to products of widths."""
    table = measure_latency(model, example, choices=3, passes=1)
    costs = [
        Cost(
            sets=entry.sets,
            table=np.prod(np.meshgrid(*(table.offered[n] for n in entry.sets), indexing="ij"), 0) / 10.0,
        )
        for entry in table.costs
    ]
    return replace(table, costs=tuple(costs), fixed=2.0)


def test_widths_for_milliseconds_are_those_of_enumeration() -> None:
    model, example = built("residual")
    table = made(model, example)
    x, y = torch.randn(40, 3, 10, 10), torch.randint(0, 4, (40,))
    recipe = cbs.GroupRecipe(samples=40, steps=0)
    budget = 0.6 * table.total
    small, report = cbs.prune_groups(model, (x, y), milliseconds=budget, latency=table, recipe=recipe)
    assert report.widths is not None
    assert report.widths.cost <= budget
    assert report.widths.gap < 1e-9
    assert small(x).isfinite().all()
    with pytest.raises(ArgumentError, match=r"milliseconds: 2, and the cheapest choice costs"):
        cbs.prune_groups(model, (x, y), milliseconds=2.0, latency=table, recipe=recipe)
    errors = {name: 1.0 / widths for name, widths in table.offered.items()}
    fixed, costs = within_sets(table, list(errors))
    wanted = enumerated_widths(errors, costs, budget, fixed=fixed)
    found = choose_widths(errors, costs, budget, fixed=fixed)
    assert wanted is not None
    assert found.error == pytest.approx(wanted.error)
    assert found.bound <= wanted.error


def test_sets_that_stay_whole_cost_what_they_cost_whole() -> None:
    model, example = built("residual")
    table = made(model, example)
    fixed, costs = within_sets(table, ["second.conv1"])
    assert {entry.sets for entry in costs} == {("second.conv1",)}
    assert fixed + sum(float(entry.table[-1]) for entry in costs) == pytest.approx(table.total)
