"""Recipes by name: concrete for the network at hand, within budgets, refused or smaller in words."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cbs_opt as cbs
import cbs_opt.pruning
from cbs_opt import resolution
from cbs_opt.recipe.files import request_from_plain, request_to_plain
from cbs_opt.recipe.named import NAMES, Named
from cbs_opt.recipe.records import Recipe, Stages
from cbs_opt.recipe.select import OBS, GreedyOBS
from cbs_opt.resolution import TIERS, UNKNOWN, Facts
from cbs_opt.stages.state import StageResult
from formulations.errors import ArgumentError, CbsError
from tests.cbs_opt.small_network import assert_untouched, data, network, scene, snapshot


def prune(model: nn.Module, train: Any = None, **options: Any) -> cbs.PruneReport:
    options = {"sparsity": 0.6, "progress": False} | options
    return cbs.prune(model, data(300) if train is None else train, **options)


Finished = Callable[[str], tuple[nn.Module, cbs.PruneReport]]


@pytest.fixture(scope="module")
def finished() -> Finished:
    """Prune a network by a recipe's name, once for all tests, which only read it."""

    @functools.cache
    def run(name: str) -> tuple[nn.Module, cbs.PruneReport]:
        model = network()
        return model, prune(model, recipe=name)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_name_meets_the_count_and_says_what_it_chose(name: str, finished: Finished) -> None:
    model, report = finished(name)
    assert report.n_prune == round(0.6 * report.n)
    assert report.curvature == "sketched_fisher"
    assert f"# recipe {name}" in report.recipe
    assert "# loss: softmax" in report.recipe
    assert "[recipe.curvature]" in report.recipe
    assert report.request is not None
    # The concrete recipe runs again to the same bits.
    again = network()
    request = request_from_plain(request_to_plain(report.request))
    repeated = prune(again, recipe=request.recipes, stages=request.stages)
    assert repeated.choices == ()
    assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_default_is_balanced_and_better_than_fast(finished: Finished) -> None:
    default = network()
    report = prune(default)
    balanced, same = finished("balanced")
    assert same.choices == report.choices
    assert default.state_dict()["0.weight"].equal(balanced.state_dict()["0.weight"])
    _, cheap = finished("fast")
    assert report.train_after is not None
    assert cheap.train_after is not None
    assert report.train_after.loss < cheap.train_after.loss


@pytest.mark.parametrize(
    ("loss", "targets", "kind"),
    [
        (nn.CrossEntropyLoss(), lambda x: (x[:, 0] > 0).long(), "sketched_fisher"),
        (nn.MSELoss(), lambda x: x[:, :3], "sketched_fisher"),
        (nn.BCEWithLogitsLoss(), lambda x: (x[:, :3] > 0).float(), "sketched_fisher"),
        (nn.L1Loss(), lambda x: x[:, :3], "empirical_fisher"),
    ],
    ids=["cross_entropy", "mse", "bce", "l1"],
)
def test_the_loss_decides_the_curvature(loss: nn.Module, targets: Any, kind: str) -> None:
    x, _ = data(120)
    report = prune(network(), (x, targets(x)), loss_fn=loss, recipe="fast")
    assert report.curvature == kind


def test_budgets_are_kept() -> None:
    for samples in (100, 1_000, 5_000):
        report = prune(network(), recipe=cbs.balanced(samples=samples))
        # Rows are of a whole number of samples, and a run has at least one.
        assert report.samples <= samples + 2
        assert any("poor model" in choice for choice in report.choices) == (samples < 1_000)
    assert prune(network(), recipe=cbs.balanced(seconds=0.5)).n_prune
    assert any("gradients" in choice for choice in prune(network(), recipe=cbs.best(seconds=0.01)).choices)


def test_a_budget_goes_to_fine_tuning_as_without_one() -> None:
    given = scene(network(), data(600), 0.5)
    free = resolution.resolved(Named(name="best"), given)
    assert free.stages is not None
    assert free.stages.fine_tuning is not None
    # Rows as large as the work allows would leave next to nothing, and then one sharp stage.
    spent = (
        sum(free.stages.fine_tuning.shares(free.stages.count)) + free.recipes[0].samples * free.stages.count
    )
    bound = resolution.resolved(cbs.best(samples=spent), given)
    assert bound.stages is not None
    assert bound.stages.count == free.stages.count
    assert bound.recipes[0].update is None


@pytest.mark.parametrize(
    ("samples", "recalibrate", "stages"), [(30_000, True, 1), (30_000, False, 9), (60_000, True, 15)]
)
def test_one_stage_in_which_the_set_narrows_takes_the_place_of_several_short_ones(
    samples: int, recalibrate: bool, stages: int
) -> None:
    """Five passes over the data, with batch-norm statistics and without, and ten."""
    recipe = Named(name="best", samples=samples, recalibrate=recalibrate)
    found = resolution.resolved(recipe, scene(network(), data(6_000), 0.9))
    assert found.stages is not None
    assert found.stages.count == stages


def stage_counts(samples: int) -> dict[str, int]:
    counts = {}
    for name in NAMES:
        found = resolution.resolved(Named(name=name), scene(network(), data(samples), 0.5))
        counts[name] = 1 if found.stages is None else found.stages.count
        gradual = counts[name] > 1
        assert (found.recipes[0].update is None) == gradual
    return counts


def test_stages_are_many_where_samples_are_and_one_where_they_are_few() -> None:
    assert stage_counts(120) == {"fast": 1, "balanced": 1, "best": 1}
    assert stage_counts(600) == {"fast": 1, "balanced": 2, "best": math.ceil(math.log(0.5) / math.log(0.85))}


def test_stages_and_certificates_go_over_a_name() -> None:
    request = prune(network(), stages=3).request
    assert request is not None
    assert request.stages is not None
    assert request.stages.count == 3
    given = Stages(count=2, updates=1, final_updates=0)
    request = prune(network(), stages=given).request
    assert request is not None
    assert request.stages == given
    report = prune(network(), certify=True)
    assert report.certified is not None
    assert report.certified.bound is not None
    assert report.stages == ()
    assert any("one stage" in choice for choice in report.choices)


def test_changes_are_made_to_what_a_name_stands_for() -> None:
    changes = ("select.method=obs", "weights.ignore=3.*", "recalibrate=false")
    report = prune(network(), recipe=Named(changes=changes))
    assert report.request is not None
    recipe = report.request.recipes[0]
    assert recipe.select == OBS()
    assert recipe.weights.ignore == ("3.*",)
    assert not recipe.recalibrate
    assert set(report.masks) == {"0.weight"}


def test_dampings_of_the_update_are_tried_and_what_a_caller_sets_is_tried_once() -> None:
    report = prune(network(), recipe="fast")
    assert report.request is not None
    tried = {recipe.damping for recipe in report.request.recipes}
    assert len(tried) == len(resolution.UPDATE_DAMPINGS)
    assert any("dampings of the update" in choice for choice in report.choices)
    report = prune(network(), recipe=Named(name="fast", changes=("damping=0.5",)))
    assert report.request is not None
    assert [recipe.damping for recipe in report.request.recipes] == [0.5] * len(resolution.SCALES)


def test_sparsities_by_layer_are_met() -> None:
    report = prune(network(), sparsity={"0.*": 0.5, "3.*": 0.25}, recipe="fast")
    pruned = {name: int((~keep).sum()) for name, keep in report.masks.items()}
    assert pruned == {"0.weight": 24, "3.weight": 6}


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_few_samples_make_a_smaller_recipe_in_words(samples: int) -> None:
    report = prune(network(), data(samples))
    assert any(f"all {samples} samples" in choice for choice in report.choices)


def test_one_class_alone_and_loaders_of_unknown_length() -> None:
    x, y = data(100)
    assert prune(network(), (x, torch.zeros_like(y)), recipe="fast").n_prune
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    assert any("100 samples" in choice for choice in prune(network(), loader, recipe="fast").choices)
    # Seven batches, of which the first has 16.
    assert any("112 samples" in choice for choice in prune(network(), list(loader), recipe="fast").choices)

    class Endless:
        def __iter__(self) -> Iterator[Any]:
            return iter(loader)

    report = prune(network(), Endless())
    assert any("unknown" in choice for choice in report.choices)
    assert report.samples <= 4 * 1_000 + UNKNOWN * TIERS["balanced"].passes


def test_plans_are_those_of_the_run(finished: Finished) -> None:
    size = cbs.plan(network(), data(300), sparsity=0.6)
    assert size.rows == finished("balanced")[1].rows


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    model = network()
    before = snapshot(model)
    cases: list[tuple[Any, str]] = [
        (lambda: prune(model, recipe="quick"), "recipe"),
        (lambda: cbs.best(samples=0), "recipe.samples"),
        (lambda: cbs.best(epochs=3), "recipe.epochs"),
        (lambda: cbs.balanced(name="best"), "recipe.name"),
        (lambda: cbs.best(seconds=-1.0), "recipe.seconds"),
        (lambda: cbs.best(samples=10, seconds=1.0), "recipe.seconds"),
        (lambda: cbs.balanced(weights="layer"), "recipe.weights"),  # type: ignore[arg-type]
        (lambda: prune(model, recipe=cbs.best(seconds=1.0), run_dir=tmp_path / "run"), "recipe.seconds"),
        (lambda: prune(model, recipe=Named(changes=("damping=-1",))), "damping"),
        (lambda: prune(model, certify=True, stages=2), "certify"),
    ]
    for call, argument in cases:
        with pytest.raises(CbsError) as caught:
            call()
        assert isinstance(caught.value, ArgumentError)
        assert caught.value.argument == argument
    assert_untouched(model, before)


def test_runs_by_name_are_resumed(tmp_path: Path) -> None:
    one, same = network(), network()
    report = prune(one, run_dir=tmp_path / "run")
    again = prune(same, run_dir=tmp_path / "run")
    assert again.choices == report.choices
    assert all(value.equal(same.state_dict()[key]) for key, value in one.state_dict().items())


def test_statistics_are_taken_only_where_they_lower_the_loss() -> None:
    train = data(300)
    for sparsity in (0.0, 0.5, 0.8, 0.9):
        left, model = network(), network()
        recipe = Recipe(curvature=cbs.SketchedFisher(samples=100), select=GreedyOBS())
        stays = prune(left, train, sparsity=sparsity, recipe=recipe)
        assert left.get_buffer("1.running_mean").equal(network().get_buffer("1.running_mean"))
        anew = cbs.Recipe(curvature=recipe.curvature, select=recipe.select, recalibrate=True)
        report = prune(model, train, sparsity=sparsity, recipe=anew)
        assert report.train_after is not None
        assert stays.train_after is not None
        assert report.train_after.loss <= stays.train_after.loss
        moved = not model.get_buffer("1.running_mean").equal(left.get_buffer("1.running_mean"))
        assert report.recalibrated == moved
        assert any(note.endswith("taken") for note in report.notes) == moved
        assert model.get_parameter("0.weight").equal(left.get_parameter("0.weight"))


def test_statistics_of_a_finished_run_come_back(tmp_path: Path) -> None:
    recipe = Recipe(curvature=cbs.SketchedFisher(samples=100), select=GreedyOBS(), recalibrate=True)
    one, same = network(), network()
    report = prune(one, sparsity=0.9, recipe=recipe, run_dir=tmp_path / "run")
    assert report.recalibrated
    again = prune(same, sparsity=0.9, recipe=recipe, run_dir=tmp_path / "run")
    assert again.recalibrated
    assert all(value.equal(same.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("recalibrate", [True, False])
def test_fine_tuning_begins_with_statistics_that_fit(recalibrate: bool) -> None:
    model = network()
    before = snapshot(model)
    seen: list[torch.Tensor] = []

    def look(result: StageResult) -> None:
        assert_untouched(model, before)
        pruned = result.network.model
        assert isinstance(pruned, nn.Module)
        seen.append(pruned.get_buffer("1.running_mean").clone())

    tuning = cbs.FineTuning(samples=64, batch_size=16, momentum_rates=(1e-6,), rest=True)
    recipe = Recipe(
        curvature=cbs.SketchedFisher(samples=100), select=GreedyOBS(), update=None, recalibrate=recalibrate
    )
    stages = Stages(count=2, updates=1, final_updates=0, fine_tuning=tuning, on_stage=look)
    report = prune(model, sparsity=0.9, recipe=recipe, stages=stages)
    moved = [not value.equal(before["1.running_mean"]) for value in seen]
    assert moved == [recalibrate] * 2
    assert recalibrate == (not model.get_buffer("1.running_mean").equal(before["1.running_mean"]))
    began = [record.loss_before for record in report.stages if record.rate_kind]
    chosen = [record.loss for record in report.stages if not record.rate_kind]
    assert all((one < other) == recalibrate for one, other in zip(began, chosen, strict=True))


def test_a_network_that_cannot_be_copied_is_pruned_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    model.lock = threading.Lock()  # type: ignore[assignment]
    assert prune(model, sparsity=0.9).n_prune
    assert "cannot be copied" in caplog.text


def test_too_little_memory_leaves_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cbs_opt.pruning, "_free", lambda _: 100 * 1024)
    size = cbs.plan(network(), data(300), sparsity=0.6)
    assert size.rows
    model, x = network(), data(300)
    monkeypatch.setattr(cbs_opt.pruning, "check_fits", lambda *_: None)
    report = prune(model, x)
    assert any("a row of 72 weights" in choice for choice in report.choices)
    assert report.stages == ()


@pytest.mark.parametrize(("sparsity", "repaired"), [(0.02, False), (0.95, True)])
def test_where_little_is_to_repair_rows_take_the_place_of_a_short_fine_tuning(
    monkeypatch: pytest.MonkeyPatch, sparsity: float, repaired: bool
) -> None:
    # A network of which a gradient is so much work that fine-tuning is short of a pass over its data.
    facts = Facts(form=None, work=1e9, samples=1_000_000)
    monkeypatch.setattr(resolution, "_facts", lambda *_, **__: facts)
    model, (x, _) = network(), data(300)
    with torch.no_grad():
        labels = model(x).argmax(1)
    found = resolution.resolved(Named(name="balanced"), scene(model, (x, labels), sparsity))
    assert (found.stages is not None) == repaired
    assert any("little to repair" in choice for choice in found.choices) != repaired
    samples = [recipe.curvature.samples for recipe in found.recipes]
    assert samples == [samples[0]] * len(found.recipes)
    assert samples[0] <= TIERS["balanced"].rows * TIERS["balanced"].most_per_row * (1 if repaired else 2)


@pytest.mark.parametrize(("name", "least", "most"), [("balanced", 1.2, 1.5), ("best", 2.5, 3.5)])
def test_the_set_of_a_residual_network_on_cifar_narrows(
    name: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ResNet20 on 50 000 images, whose labels it knows: what it narrows from is worth a point at .9.
    facts = Facts(form="softmax", work=2.45e8, samples=50_000)
    monkeypatch.setattr(resolution, "_facts", lambda *_, **__: facts)
    monkeypatch.setattr(resolution, "_learnt", lambda _: True)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)).eval()
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    found = resolution.resolved(Named(name=name), scene(model, (x, torch.arange(300) % 4), 0.9))
    assert found.stages is not None
    assert found.stages.fine_tuning is not None
    assert found.stages.fine_tuning.matching
    assert least < found.stages.fine_tuning.surplus < most


def test_the_guide_tells_what_the_names_stand_for() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "recipes.md").read_text()
    for name, tier in TIERS.items():
        (line,) = (line for line in guide.splitlines() if line.startswith(f'| `"{name}"` |'))
        work = float(line.split("|")[-2].split()[0])
        assert work == pytest.approx(tier.tuned_row_work + tier.tuning_work, rel=0.1)
