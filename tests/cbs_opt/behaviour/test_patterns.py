"""`sparsity="2:4"`: n of every m consecutive inputs of each output, whatever the layer and the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cbs_opt import (
    Certify,
    EmpiricalFisher,
    GreedyOBS,
    Magnitude,
    Recipe,
    Stages,
    SwapSearch,
    Update,
    gradient_rows,
    prune,
)
from cbs_opt.budget.remaining import pattern_left
from cbs_opt.budget.schedule import pattern_schedule
from cbs_opt.curvature.layer_inputs import input_moments
from cbs_opt.errors import NoEligibleWeightsError
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.files import load_request, save_request
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import FineTuning, Request, Weights
from cbs_opt.recipe.select import Exact, HardThreshold
from cbs_opt.report.files import load_report, save_report
from cbs_opt.report.verification import check_certificates
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.support import NofM
from formulations.verification import Verdict

pytestmark = pytest.mark.usefixtures("without_pictures")

SMALL = {"samples": 24}


def mixed() -> nn.Module:
    """A network with every kind of layer whose inputs lie along another axis; the first one has 3 inputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Tanh(),
        nn.Conv2d(4, 8, 2),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 16, 8),
        nn.Tanh(),
        Conv1D(3, 8),
    ).eval()


def images(samples: int = 40) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 3, 6, 6), torch.arange(samples) % 3


def linear() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def vectors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(40, 8), torch.arange(40) % 3


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"curvature": EmpiricalFisher(**SMALL), **fields})


def kept_of_cells(model: nn.Module, masks: Mapping[str, Tensor], m: int) -> set[int]:
    """How many weights the cells of all masks keep: an oracle that looks at the layers themselves."""
    found: set[int] = set()
    for name, mask in masks.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        axis = 0 if isinstance(layer, Conv1D | nn.ConvTranspose2d) else 1
        found |= set(mask.movedim(axis, -1).reshape(-1, m).sum(1).tolist())
    return found


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
@pytest.mark.parametrize(
    "select", [Magnitude(), GreedyOBS(drops=3), SwapSearch()], ids=lambda entry: entry.method
)
def test_every_cell_keeps_its_number_in_every_kind_of_layer(pattern: str, select: Any) -> None:
    model = mixed()
    report = prune(model, images(), sparsity=pattern, recipe=recipe(select=select))
    assert kept_of_cells(model, report.masks, 4) == {int(pattern[0])}
    for name, mask in report.masks.items():
        assert not bool(model.get_parameter(name)[~mask].any())
    assert (report.pattern, report.sparsity) == (pattern, 1.0 - int(pattern[0]) / 4)
    assert f"pattern {pattern}" in report.summary()


def test_layers_whose_inputs_m_does_not_divide_are_named_with_the_remainder() -> None:
    report = prune(mixed(), None, sparsity="2:4", recipe=Recipe(select=Magnitude(), update=None))
    reasons = {entry.name: (entry.reason, entry.remedy) for entry in report.left_out}
    reason, remedy = reasons["0.weight"]
    assert reason == "inputs that m does not divide: 3 = 0 x 4 + 3"
    assert "choose a pattern" in remedy
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    with pytest.raises(NoEligibleWeightsError, match=r"6 = 1 x 4 \+ 2.*choose a pattern"):
        prune(model, None, sparsity="2:4", recipe=Recipe(select=Magnitude(), update=None))
    named = Recipe(select=Magnitude(), update=None, weights=Weights(target=("0.weight", "2.weight")))
    with pytest.raises(NoEligibleWeightsError, match=r"0.weight: inputs that m does not divide"):
        prune(mixed(), None, sparsity="2:4", recipe=named)
    grouped = nn.Sequential(nn.Linear(8, 8), nn.ConvTranspose1d(8, 8, 1, groups=2)).eval()
    left = Partition.from_model(grouped, pattern=NofM(2, 4)).left_out
    assert {entry.name: entry.reason for entry in left}["1.weight"] == "transposed in groups"


def test_magnitude_keeps_the_largest_of_every_cell() -> None:
    before = mixed()
    model = mixed()
    report = prune(model, None, sparsity="2:4", recipe=Recipe(select=Magnitude(), update=None))
    weight = before.get_parameter("2.weight").detach()
    cells = weight.abs().movedim(1, -1).reshape(-1, 4)
    largest = torch.zeros_like(cells, dtype=torch.bool).scatter_(1, cells.topk(2).indices, True)
    mask = report.masks["2.weight"].movedim(1, -1).reshape(-1, 4)
    assert mask.equal(largest)


def test_the_flat_vector_of_a_pattern_is_a_reordering() -> None:
    model = mixed()
    plain, cells = Partition.from_model(model), Partition.from_model(model, pattern=NofM(2, 4))
    flat = cells.flatten(model)
    for name, values in cells.split(flat).items():
        assert values.equal(model.get_parameter(name).detach())
    moments = [input_moments(model, images(8), each) for each in (plain, cells)]
    for span in cells.parameters:
        place = span.flat(torch.arange(span.stop - span.start).view(span.shape))
        own = {entry.name: entry for entry in plain.parameters}[span.name]
        rank = torch.empty_like(place)
        rank[own.flat(torch.arange(len(place)).view(span.shape))] = torch.arange(len(place))
        order = rank[place][: span.fan_in]
        expected = moments[0][span.name][order][:, order]
        assert torch.allclose(moments[1][span.name], expected, rtol=1e-12)


@pytest.mark.parametrize("program", ["selection", "joint"])
def test_exact_methods_and_certificates_keep_to_the_pattern(tmp_path: Path, program: str) -> None:
    model, stated = linear(), Exact(method="branch_and_bound", program=program)
    chosen = recipe(select=stated, weights=Weights(blocks="row"))
    report = prune(model, vectors(), sparsity="2:4", recipe=chosen, certify=Certify(block_dir=tmp_path / "b"))
    assert kept_of_cells(model, report.masks, 4) == {2}
    assert {entry.support for entry in report.certificates} == {"2:4"}
    assert report.certified is not None
    searched = recipe(select=SwapSearch(program=program), weights=Weights(blocks="row"))
    other = prune(linear(), vectors(), sparsity="2:4", recipe=searched, certify=True)
    for exact, block in zip(report.blocks, other.blocks, strict=True):
        assert exact.objective is not None
        assert block.bound is not None
        assert block.objective is not None
        slack = 1e-9 * max(1.0, abs(exact.objective))
        assert block.bound <= exact.objective + slack
        assert exact.objective <= block.objective + slack


def test_certificates_of_a_convolution_are_checked_against_its_masks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, 2), nn.Flatten(), Conv1D(3, 8)).eval()
    torch.manual_seed(5)
    data = torch.randn(24, 4, 3, 3), torch.arange(24) % 3
    folder = tmp_path / "out"
    blocks = folder / "certificates"
    report = prune(
        model,
        data,
        sparsity="2:4",
        recipe=recipe(select=GreedyOBS(), weights=Weights(blocks="row"), layer_inputs=0.0),
        certify=Certify(block_dir=blocks),
    )
    save_report(report, folder)
    assert load_report(folder).pattern == "2:4"
    verdicts = [block.verdict for block in check_certificates(folder)]
    assert verdicts == [Verdict.OK] * len(report.blocks)
    swapped = [replace(layer, axes=(0, 0)) for layer in report.layers]
    for forged in (
        replace(report, pattern="1:4"),
        replace(report, pattern=""),
        replace(report, layers=swapped),
    ):
        save_report(forged, folder)
        assert {block.verdict for block in check_certificates(folder)} == {Verdict.WRONG}


@pytest.mark.parametrize("fields", [{}, {"layer_inputs": 0.0}], ids=["layer inputs", "rows"])
def test_stages_are_nested_looser_patterns(fields: dict[str, Any]) -> None:
    masks: list[dict[str, Tensor]] = []
    tuning = FineTuning(samples=32, batch_size=16)
    plan = Stages(
        count=2, updates=1, final_updates=1, fine_tuning=tuning, on_stage=lambda r: masks.append(r.keep)
    )
    model = mixed()
    report = prune(model, images(), sparsity="2:4", stages=plan, recipe=recipe(**fields))
    assert [kept_of_cells(model, stage, 4) for stage in masks] == [{3}, {2}, {2}]
    for name, mask in masks[1].items():
        assert bool((masks[0][name] | ~mask).all())
    assert kept_of_cells(model, report.masks, 4) == {2}


def test_a_killed_run_goes_on_to_the_same_sets(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(result: Any) -> None:
        raise Stopped

    options: dict[str, Any] = {"sparsity": "2:4", "recipe": recipe(), "run_dir": tmp_path}
    plain = Stages(count=2, updates=1, final_updates=0)
    whole, parts = mixed(), mixed()
    first = prune(whole, images(), **{**options, "run_dir": None}, stages=plain)
    with pytest.raises(Stopped):
        prune(parts, images(), **options, stages=Stages(count=2, updates=1, final_updates=0, on_stage=stop))
    second = prune(parts, images(), **options, stages=plain)
    assert all(first.masks[name].equal(mask) for name, mask in second.masks.items())
    again = prune(mixed(), images(), **options, stages=plain)
    assert all(first.masks[name].equal(mask) for name, mask in again.masks.items())


def test_a_request_with_a_pattern_survives_its_file(tmp_path: Path) -> None:
    request = Request(sparsity="4:8")  # type: ignore[arg-type]
    assert (request.sparsity, request.pattern) == (0.5, NofM(4, 8))
    save_request(request, tmp_path / "r.toml")
    assert 'sparsity = "4:8"' in (tmp_path / "r.toml").read_text()
    assert load_request(tmp_path / "r.toml") == request
    assert load_request(tmp_path / "r.toml", sparsity=0.5).pattern is None


@pytest.mark.parametrize("name", ["fast", "balanced", "best"])
def test_recipes_by_name_take_patterns(name: str) -> None:
    model = linear()
    report = prune(model, vectors(), sparsity="2:4", recipe=Named(name=name, samples=200))
    assert kept_of_cells(model, report.masks, 4) == {2}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": "0:4"}, ArgumentError, "sparsity.*0:4"),
        ({"sparsity": "two"}, ArgumentError, "sparsity.*two.*2:4"),
        ({"sparsity": {"0.*": "2:4"}}, UnsupportedProblemError, "weights.target"),
        (
            {"recipe": recipe(select=HardThreshold())},
            UnsupportedProblemError,
            "select.method.*iterative_hard_threshold",
        ),
        (
            {"recipe": recipe(select=SwapSearch(start="randomized_magnitude"))},
            UnsupportedProblemError,
            "select.start",
        ),
        ({"recipe": recipe(weights=Weights(budget={"*": 0.5}))}, ArgumentError, "weights.budget"),
        ({"recipe": recipe(weights=Weights(budget_score="obd"))}, ArgumentError, "weights.budget_score"),
        ({"recipe": recipe(weights=Weights(blocks=6))}, ArgumentError, "weights.blocks.*multiple of 4"),
        ({"stages": 3, "recipe": recipe()}, ArgumentError, "stages.count.*at most 2"),
        (
            {"stages": Stages(count=2, schedule=(0.3, 0.5)), "recipe": recipe()},
            ArgumentError,
            "stages.schedule.*k / 4",
        ),
    ],
)
def test_what_a_pattern_cannot_go_with_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=words):
        prune(model, vectors(), **{"sparsity": "2:4", **options})
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_rows_of_another_order_are_refused() -> None:
    model = mixed()
    rows = gradient_rows(model, images(), None, Partition.from_model(model, ignore="0.weight"))
    with pytest.raises(ArgumentError, match="another order"):
        prune(model, images(), sparsity="2:4", recipe=Recipe(curvature=rows))


@pytest.mark.parametrize("schedule", ["geometric", "linear", "polynomial"])
def test_stages_of_a_pattern_never_stand_still(schedule: str) -> None:
    for m in range(2, 9):
        for n in range(1, m):
            for count in range(1, m - n + 1):
                stages = Stages(count=count, schedule=schedule).sparsities((m - n) / m, NofM(n, m))
                kept = [m, *(round((1 - share) * m) for share in stages)]
                assert kept[-1] == n
                assert all(later < earlier for earlier, later in pairwise(kept))
    assert pattern_schedule(NofM(2, 4), (0.25, 0.5), exact=True) == (0.25, 0.5)


def test_what_is_left_of_a_cell_is_a_cell() -> None:
    keep = torch.tensor([True, True, False, True] * 3)
    assert pattern_left(keep, NofM(2, 4)) == NofM(2, 3)


def test_independent_updates_keep_to_the_pattern() -> None:
    model = linear()
    report = prune(model, vectors(), sparsity="4:8", recipe=recipe(update=Update(kind="independent")))
    assert kept_of_cells(model, report.masks, 8) == {4}
