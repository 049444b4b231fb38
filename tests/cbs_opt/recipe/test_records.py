"""Records of a run: every field is checked, contradictions are refused, recipes that share a set share it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from cbs_opt import oneshot
from cbs_opt.curvature.kinds import (
    FISHERS,
    EmpiricalFisher,
    ExactFisher,
    MonteCarloFisher,
    SketchedFisher,
)
from cbs_opt.pruning import prune
from cbs_opt.recipe.named import NAMES, Named
from cbs_opt.recipe.records import (
    Absolute,
    Certify,
    Recipe,
    Request,
    Stages,
    Update,
    Weights,
    absolute,
    in_units,
)
from cbs_opt.recipe.select import OBS, Exact, GreedyOBS, Magnitude, RandomizedMagnitude, SwapSearch
from cbs_opt.report.record import PruneReport
from cbs_opt.system.resources import Resources
from formulations.errors import ArgumentError
from tests.cbs_opt.recipe.strategies import requests
from tests.cbs_opt.small_network import data, network

NAN = math.nan
BAD: list[tuple[Callable[..., Any], str, str, tuple[Any, ...]]] = [
    (Absolute, "value", "damping", (-1.0, NAN, math.inf, "1", None, True)),
    (Recipe, "curvature", "curvature", ("hessian", None, 3, EmpiricalFisher)),
    (Recipe, "layer_inputs", "layer_inputs", (-1.0, NAN, "1", True, ())),
    (Recipe, "damping", "damping", (-1.0, NAN, "1", None, True, (0.1,))),
    (Recipe, "selection_damping", "selection_damping", (-1.0, NAN, "1", True)),
    (Recipe, "gradient", "gradient", (None, 1, "yes")),
    (Recipe, "weights", "weights", (None, "layer", {})),
    (Recipe, "select", "select", (3, ["obs"], OBS)),
    (Recipe, "update", "update", (True, False, 1.0, "newton", {})),
    (Recipe, "choice_samples", "choice_samples", (0, -1, 2.0, True)),
    (Update, "kind", "update.kind", (None, True, "newton")),
    (Update, "scale", "update.scale", (0.0, -1.0, NAN, "1", None, True)),
    (Weights, "target", "weights.target", (3, [3], {})),
    (Weights, "ignore", "weights.ignore", (3, [None])),
    (Weights, "blocks", "weights.blocks", ("column", 0, -1, 2.5, True, [4])),
    (Weights, "budget", "weights.budget", ("half", None, 0.5, ["global"])),
    (Weights, "budget", "weights.budget['a']", ({"a": 1.0}, {"a": "0.5"}, {"a": True})),
    (Weights, "budget_score", "weights.budget_score", (3, ["obs"])),
    (Stages, "count", "stages.count", (0, -1, 2.0, True, None)),
    (Stages, "schedule", "stages.schedule", ("steps", 0.5, None, (0.5, "x"), (0.5, 1.0))),
    (Stages, "start", "stages.start", (1.0, -0.1, "0")),
    (Stages, "updates", "stages.updates", (0, 1.0, None)),
    (Stages, "final_updates", "stages.final_updates", (-1, 1.0, None)),
    (Stages, "gradient_samples", "stages.gradient_samples", (0, 1.0, True)),
    (Stages, "on_stage", "stages.on_stage", (3, "print")),
    (Certify, "time_limit", "certify.time_limit", (-1.0, NAN, "1", True)),
    (Certify, "block_dir", "certify.block_dir", (3, b"x")),
    (Resources, "workers", "resources.workers", (0, -1, 2.0, True)),
    (Resources, "row_memory", "resources.row_memory", (0, 1e9, "2GB")),
    (Resources, "row_dir", "resources.row_dir", (3, b"x")),
    (Resources, "chunk_memory", "resources.chunk_memory", (0, None, 1e9)),
    *((record, "samples", "curvature.samples", (0, 2.5, True, None)) for record in FISHERS.values()),
    *(
        (record, "per_row", "curvature.per_row", (0, 2.5, True, None))
        for record in (EmpiricalFisher, MonteCarloFisher, SketchedFisher)
    ),
]


@pytest.mark.parametrize(
    ("record", "field", "argument", "value"),
    [(record, field, argument, value) for record, field, argument, values in BAD for value in values],
    ids=str,
)
def test_what_a_field_may_not_be_is_refused(
    record: Callable[..., Any], field: str, argument: str, value: Any
) -> None:
    with pytest.raises(ArgumentError) as caught:
        record(**{field: value})
    assert caught.value.argument == argument
    assert caught.value.found
    assert caught.value.remedy


def test_numbers_of_numpy_are_numbers() -> None:
    recipe = Recipe(
        curvature=EmpiricalFisher(samples=np.int64(50), per_row=np.int32(5)),
        layer_inputs=np.float32(0.5),
        damping=np.float64(0.25),
        selection_damping=absolute(np.float32(0.5)),
        weights=Weights(blocks=np.int64(7), budget={"a": np.float64(0.5)}),
        update=Update(scale=np.float32(0.5)),
        choice_samples=np.int64(9),
    )
    plain = Recipe(
        curvature=EmpiricalFisher(samples=50, per_row=5),
        layer_inputs=0.5,
        damping=0.25,
        selection_damping=absolute(0.5),
        weights=Weights(blocks=7, budget={"a": 0.5}),
        update=Update(scale=0.5),
        choice_samples=9,
    )
    assert recipe == plain
    assert repr(recipe) == repr(plain)
    stages = Stages(count=np.int64(2), schedule=np.array([0.25, 0.5]), updates=np.int64(1))
    assert stages == Stages(count=2, schedule=(0.25, 0.5), updates=1)
    assert repr(Resources(workers=np.int64(2))) == repr(Resources(workers=2))
    assert Request(sparsity=np.float32(0.5), seed=np.int64(3)) == Request(sparsity=0.5, seed=3)


def test_names_stand_for_records() -> None:
    assert Recipe(curvature="sketched_fisher") == Recipe(curvature=SketchedFisher())
    assert Recipe(select="obs") == Recipe(select=OBS())
    assert Recipe(select="branch_and_bound") == Recipe(select=Exact())
    assert Recipe(update="independent") == Recipe(update=Update(kind="independent"))
    assert Weights(target="a", ignore=["b", "c"]) == Weights(target=("a",), ignore=("b", "c"))
    assert Request(sparsity=0.5, stages=3) == Request(sparsity=0.5, stages=Stages(count=3))
    assert Request(sparsity=0.5, certify=True) == Request(sparsity=0.5, certify=Certify())
    assert Request(sparsity=0.5, certify=False) == Request(sparsity=0.5)
    assert Request(sparsity=0.5, recipes=Recipe()) == Request(sparsity=0.5, recipes=[Recipe()])
    with pytest.raises(ArgumentError, match="recipe") as caught:
        Named(name="quick")
    assert all(name in caught.value.remedy for name in NAMES)


def test_dampings_are_relative_unless_said_otherwise() -> None:
    assert in_units(0.5, 4.0) == 2.0
    assert in_units(absolute(0.5), 4.0) == 0.5


def test_records_do_not_change() -> None:
    for record, name in (
        (Recipe(), "damping"),
        (Weights(), "blocks"),
        (Update(), "scale"),
        (Stages(), "count"),
        (Resources(), "workers"),
        (ExactFisher(), "samples"),
        (Request(sparsity=0.5), "seed"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, 3)


@given(requests())
def test_requests_can_be_copied_and_sent_to_other_processes(request: Request) -> None:
    assert copy.deepcopy(request) == request
    assert pickle.loads(pickle.dumps(request)) == request  # noqa: S301
    assert request.candidates == sum(
        recipe.select.tries if recipe.select else 1 for recipe in request.recipes
    )


def test_a_grid_has_every_combination_the_last_field_fastest() -> None:
    base = Recipe(select=OBS(), curvature=SketchedFisher())
    grid = Recipe.grid(base, damping=[0.03, 0.1], update=[Update(scale=s) for s in (0.5, 1.0)])
    assert [(recipe.damping, recipe.update.scale) for recipe in grid if recipe.update] == [
        (0.03, 0.5),
        (0.03, 1.0),
        (0.1, 0.5),
        (0.1, 1.0),
    ]
    assert all(replace(recipe, damping=0.1, update=Update()) == base for recipe in grid)
    assert Recipe.grid() == [Recipe()]
    assert Recipe.grid(damping=iter([0.1, 0.2]))[1].damping == 0.2
    assert Recipe.grid(damping=[]) == []


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"dampings": [0.1]}, "fields"),
        ({"damping": 0.1}, "damping"),
        ({"select": "obs"}, "select"),
        ({"damping": [0.1, -1.0]}, "damping"),
    ],
)
def test_what_makes_no_grid_is_named(fields: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Recipe.grid(**fields)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": None}, "sparsity"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**62}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"recipes": ()}, "recipe"),
        ({"recipes": [None]}, "recipe"),
        ({"recipes": "fast"}, "recipe"),
        ({"stages": 0}, "stages"),
        ({"stages": 2.0}, "stages"),
        ({"certify": 1}, "certify"),
        ({"recipes": Recipe.grid(gradient=[False, True])}, "recipe[1].gradient"),
        ({"recipes": Recipe.grid(choice_samples=[None, 5])}, "recipe[1].choice_samples"),
        ({"recipes": Recipe.grid(weights=[Weights(), Weights(blocks="row")])}, "recipe[1].weights"),
        ({"recipes": Recipe.grid(curvature=["exact_fisher", ExactFisher(samples=9)])}, "recipe[1].curvature"),
        ({"stages": Stages(start=0.6)}, "stages.start"),
        ({"stages": Stages(count=2, schedule=(0.4,))}, "stages.schedule"),
        ({"stages": 2, "certify": True}, "certify"),
        ({"stages": 2, "recipes": Recipe.grid(damping=[0.1, absolute(0.1)])}, "recipe.damping"),
        ({"stages": 2, "recipes": Recipe.grid(layer_inputs=[0.0, 1.0])}, "recipe.layer_inputs"),
        ({"stages": 2, "recipes": Recipe(update="independent")}, "recipe.update"),
        ({"stages": 2, "recipes": Recipe(update=None)}, "recipe.update"),
        ({"stages": Stages(updates=1), "recipes": Recipe(update=None)}, "recipe.update"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(fields: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Request(**{"sparsity": 0.5} | fields)
    assert caught.value.argument == argument
    assert caught.value.remedy


def test_stages_say_how_many_updates_each_has() -> None:
    assert Stages(count=2, updates=3, final_updates=0).steps == (3, 3)
    assert Stages(count=2, updates=3, final_updates=5).steps == (3, 3, 5)
    assert Stages(count=2).sparsities(0.75) == (0.5, 0.75)


# --- what recipes share -----------------------------------------------------------------------------


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that sets were selected for, in order."""
    seen: list[Recipe] = []
    choose = oneshot.choose

    def counted(recipe: Recipe, *args: Any, **options: Any) -> Any:
        seen.append(recipe)
        return choose(recipe, *args, **options)

    monkeypatch.setattr(oneshot, "choose", counted)
    return seen


def pruned(recipes: list[Recipe], **options: Any) -> PruneReport:
    return prune(network(), data(), sparsity=0.5, recipe=recipes, progress=False, **options)


BASE = Recipe(curvature=EmpiricalFisher(samples=40), select=OBS())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"update": [None, Update(), Update(scale=0.5), Update(kind="independent")]}, 1),
        ({"selection_damping": [1.0], "damping": [0.1, 0.2, 0.3]}, 1),
        ({"damping": [0.1, 0.2], "update": [Update(scale=s) for s in (0.5, 1.0)]}, 2),
        ({"layer_inputs": [0.0, 1.0], "update": [None, Update()]}, 2),
        ({"select": [OBS(), Magnitude(), "obs"]}, 2),
        ({"select": [RandomizedMagnitude(repeats=3)], "update": [None, Update()]}, 3),
        ({"update": [Update(), Update()]}, 1),
    ],
)
def test_recipes_that_share_a_set_share_the_selection(
    selections: list[Recipe], fields: dict[str, Any], expected: int
) -> None:
    pruned(Recipe.grid(BASE, **fields))
    assert len(selections) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"damping": [0.03, 1.0], "update": [Update(scale=0.3), None]},
        {"select": [SwapSearch(max_swaps=0), OBS(), Magnitude()], "layer_inputs": [0.0, 1.0]},
        {"selection_damping": [1.0, None], "damping": [0.1, absolute(1e-3)]},
    ],
)
def test_of_several_recipes_the_best_alone_gives_the_same(fields: dict[str, Any]) -> None:
    recipes = Recipe.grid(BASE, **fields)
    losses = []
    for recipe in recipes:
        alone = pruned([recipe])
        assert alone.train_after is not None
        losses.append(alone.train_after.loss)
    together = pruned(recipes)
    assert together.train_after is not None
    assert together.train_after.loss == pytest.approx(min(losses), rel=1e-6)
    assert together.request is not None
    assert len(together.request.recipes) == len(recipes)


def test_of_equal_losses_the_first_recipe_wins() -> None:
    report = pruned(Recipe.grid(BASE, update=[None], damping=[0.3, 0.1], select=[Magnitude()]))
    first = pruned(Recipe.grid(BASE, update=[None], damping=[0.3], select=[Magnitude()]))
    assert report.damping == first.damping


def test_a_report_has_the_request_with_its_defaults_made_concrete(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sparsity": 0.5, "recipe": Recipe(), "progress": False}
    report = prune(network(), data(), certify=Certify(block_dir=tmp_path), **options)
    request = report.request
    assert request is not None
    assert (request.sparsity, request.seed, request.stages) == (0.5, 0, None)
    (recipe,) = request.recipes
    concrete = Recipe(layer_inputs=1.0, weights=Weights(blocks="global"))
    assert recipe == replace(concrete, select=SwapSearch())
    staged = prune(network(), data(), stages=2, **options).request
    assert staged is not None
    assert staged.stages == Stages(count=2)
    assert staged.recipes[0] == replace(concrete, select=GreedyOBS(drops=3))
