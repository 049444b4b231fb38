"""Structure, side by side: budgets are met alike, and filters chosen as each method says."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cbs_opt.structure.groups import groups
from experiments import structured
from experiments.ledger import Ledger, settings_key
from experiments.structured import (
    BUDGETS,
    CONTENDERS,
    EVEN,
    PROVED,
    RIVALS,
    Bench,
    cells,
    estimate_statistics,
    even_keep,
    magnitude_masks,
    main,
    section,
)
from tests.experiments.comparators.tiny import images, tiny_network

ROOT = Path(__file__).parents[2]


def cell(contender: str, budget: str = "flops", share: float = 0.5) -> dict[str, Any]:
    return {
        "network": "tiny",
        "budget": budget,
        "share": share,
        "contender": contender,
        "samples": 60,
        "steps": [1, 100],
        "seed": 0,
        "version": 3,
    }


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(network=tiny_network(), data=images())


@pytest.mark.parametrize("contender", [*CONTENDERS, *(name + EVEN for name in RIVALS)])
def test_every_contender_is_within_the_budget(bench: Bench, contender: str) -> None:
    before = copy.deepcopy(bench.network.model.state_dict())
    found = bench.measure(cell(contender))
    assert found["flops"][1] <= 0.5 * found["flops"][0]
    assert found["parameters"][1] < found["parameters"][0]
    assert 0.0 <= found["accuracy"] <= 100.0
    assert min(found["milliseconds"]) > 0.0
    assert json.loads(json.dumps(found)) == found
    assert all(value.equal(before[key]) for key, value in bench.network.model.state_dict().items())


def test_at_a_share_of_every_set_all_have_the_same_widths(bench: Bench) -> None:
    found = {name: bench.measure(cell(name, "keep")) for name in CONTENDERS}
    assert len({entry["flops"][1] for entry in found.values()}) == 1
    proofs = {name: entry["proofs"] for name, entry in found.items()}
    assert all(bound <= loss <= bound * (1.0 + 1e-6) for *_, loss, bound in proofs.pop(PROVED))
    assert not any(proofs.values())
    shown = section([{**cell(PROVED, "keep"), **found[PROVED], "commit": ""}])
    assert "Exact search, of seed 0 alone, as its row: conv, 3 of 6 kept" in shown


def test_all_keep_to_a_share_of_the_milliseconds_as_a_table_has_them(bench: Bench) -> None:
    own = Bench(network=bench.network, data=bench.data)
    table = own.latency
    costs = tuple(replace(cost, table=np.indices(cost.table.shape).sum(0) + 1.0) for cost in table.costs)
    own.latency = replace(table, costs=costs, fixed=0.0)
    found = [own.measure(cell(name, "milliseconds")) for name in ("ours_fitted", "magnitude")]
    assert len({entry["flops"][1] for entry in found}) == 1
    (choice,) = own.chosen.values()
    assert choice[1].widths is not None
    assert choice[1].widths.cost <= choice[1].widths.budget == 0.5 * own.latency.total


def test_magnitude_keeps_the_filters_of_largest_norm() -> None:
    model = tiny_network().model
    structure = groups(model, images().train_x[:2])
    with torch.no_grad():
        model.conv.weight.mul_(torch.tensor([1.0, 9.0, 2.0, 8.0, 7.0, 0.5])[:, None, None, None])
        norms = model.conv.weight.flatten(1).norm(dim=1)
    masks = magnitude_masks(model, structure.sets, {"conv": 3, "fc1": 8})
    assert norms[torch.from_numpy(masks["conv"])].min() > norms[torch.from_numpy(~masks["conv"])].max()
    assert masks["fc1"].all()


def test_statistics_are_those_of_the_images() -> None:
    model = tiny_network().model
    x = images().train_x[:100]
    estimate_statistics(model, x)
    with torch.no_grad():
        made = model.conv(x)
    assert torch.allclose(model.norm.running_mean, made.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model.norm.running_var, made.var((0, 2, 3)), rtol=1e-4)
    assert model.norm.momentum == nn.BatchNorm2d(6).momentum
    assert not any(module.training for module in model.modules())


def test_the_largest_equal_share_within_a_budget() -> None:
    structure = groups(tiny_network().model, images().train_x[:2])
    share = even_keep(structure, 0.5)

    def operations(keep: float) -> float:
        sizes = {part.name: part.n_groups for part in structure.sets}
        counts = {name: max(1, round(keep * size)) for name, size in sizes.items()}
        masks = {name: np.arange(size) < counts[name] for name, size in sizes.items()}
        return structure.flops_of(masks) / structure.flops

    assert operations(share) <= 0.5 < operations(share + 1 / 64)


def written(folder: Path) -> Ledger:
    ledger = Ledger(folder / "structured.jsonl")
    for number, entry in enumerate(cells("resnet20_cifar10")[:-1]):
        says = {"accuracy": 80.0 + number, "loss": 0.5, "dense_accuracy": 91.43, "commit": "abc"}
        sizes = {"parameters": [100, 50], "flops": [100, 40], "milliseconds": [9.0, 6.0]}
        found = {**says, **sizes, "processor_seconds": 7.0, "proofs": []}
        ledger.add(settings_key(entry), {**entry, **found})
    return ledger


def test_the_page_has_a_table_for_each_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section(written(tmp_path).results())
    assert text.count("## resnet20_cifar10") == len(BUDGETS["resnet20_cifar10"])
    row = "| greedy reconstruction, equal shares | 85.00 | 0.5000 | 0.500 | 0.400 | 9.00 | 6.00 | 1.50 | 7 |"
    assert row in text
    page = tmp_path / "structure.md"
    page.write_text((ROOT / "docs/results/structure.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(structured, "PAGE", page)
    assert main(["--page", "--out", str(tmp_path)]) == 0
    assert row in page.read_text(encoding="utf-8")


def test_a_page_without_a_ledger_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(structured, "PAGE", tmp_path / "structure.md")
    assert main(["--page", "--out", str(tmp_path)]) == 1
    assert "python -m experiments.structured makes it" in capsys.readouterr().err
