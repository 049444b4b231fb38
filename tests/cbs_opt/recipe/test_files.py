"""Recipe files: equal records come back, what is wrong is named with its line, and a report runs again."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt.curvature.fisher import gradient_rows
from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, SketchedFisher
from cbs_opt.errors import RecipeFileError
from cbs_opt.network.partition import Partition
from cbs_opt.pruning import prune
from cbs_opt.recipe.files import (
    FORMAT,
    load_recipe,
    load_request,
    request_from_plain,
    request_to_plain,
    save_recipe,
    save_request,
    to_toml,
    with_fields,
)
from cbs_opt.recipe.records import Absolute, Certify, Recipe, Request, Stages, Update, Weights, absolute
from cbs_opt.recipe.select import OBS, Exact, GreedyOBS, RandomizedMagnitude, SwapSearch
from formulations.errors import ArgumentError
from tests.cbs_opt.recipe.strategies import plain, requests, text
from tests.cbs_opt.small_network import data, network

HEAD = f"format = {FORMAT}\nsparsity = 0.5\n"


@given(asked=requests())
def test_requests_come_back_from_their_file_equal(
    asked: Request, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "request.toml"
    save_request(asked, path)
    again = load_request(path)
    assert again == asked
    # Of globs that match the first counts.
    first, second = ([list(entry.weights.budget) for entry in r.recipes] for r in (asked, again))
    assert first == second
    assert with_fields(asked, []) == asked


@given(st.dictionaries(text, plain, max_size=4))
def test_documents_come_back_from_toml(document: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(document)) == document


def test_recipes_come_back_alone(tmp_path: Path) -> None:
    recipes = Recipe.grid(damping=[0.1, absolute(0.2)], update=[None, Update(scale=0.5)])
    save_recipe(recipes, tmp_path / "several.toml", sparsity=0.5)
    assert load_recipe(tmp_path / "several.toml") == recipes
    save_recipe(recipes[1], tmp_path / "one.toml", sparsity=0.5)
    assert load_recipe(tmp_path / "one.toml") == [recipes[1]]


def test_the_sparsity_of_a_file_can_be_replaced(tmp_path: Path) -> None:
    save_request(Request(sparsity=0.5, seed=3), tmp_path / "a.toml")
    assert load_request(tmp_path / "a.toml", sparsity=0.7) == Request(sparsity=0.7, seed=3)


def test_a_file_written_by_hand_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text(HEAD)
    assert load_request(path) == Request(sparsity=0.5)
    path.write_text(
        HEAD + "stages = 2\n[recipe]\nselect = 'obs'\ncurvature = 'exact_fisher'\n"
        "damping = { absolute = 0.5 }\nupdate = false\n[recipe.weights]\nignore = 'head.*'\n"
    )
    with pytest.raises(RecipeFileError, match="update"):
        load_request(path)
    path.write_text(path.read_text().replace("stages = 2\n", "certify = true\n"))
    recipe = Recipe(
        select=OBS(),
        curvature=ExactFisher(),
        damping=Absolute(0.5),
        update=None,
        weights=Weights(ignore="head.*"),
    )
    assert load_request(path) == Request(sparsity=0.5, recipes=(recipe,), certify=Certify())


@pytest.mark.parametrize(
    ("written", "argument", "line"),
    [
        ("sparsity = 0.5\n", "format", None),
        ("format = 9\nsparsity = 0.5\n", "format", 1),
        (f"format = {FORMAT}\n", "sparsity", None),
        (f"format = {FORMAT}\nsparsity = 1.5\n", "sparsity", 2),
        (HEAD + "seeds = 3\n", "seeds", 3),
        (HEAD + "seed = -3\n", "seed", 3),
        (HEAD + "recipe = 3\n", "recipe", 3),
        (HEAD + "[recipes]\n", "recipes", 3),
        (HEAD + "[recipe]\ndampings = 0.1\n", "recipe.dampings", 4),
        (HEAD + "[recipe]\n\ndamping = -0.1\n", "damping", 5),
        (HEAD + "[recipe]\ndamping = { absolut = 1.0 }\n", "damping.absolut", 4),
        (HEAD + "[recipe]\ndamping = 0.1\n[recipe.curvature]\nsamples = 0\n", "curvature.samples", 6),
        (HEAD + "[recipe]\ncurvature = { samples = 0 }\n", "curvature.samples", 4),
        (HEAD + "[recipe.curvature]\nkind = 'hessian'\n", "curvature.kind", 4),
        (HEAD + "[recipe.curvature]\nkind = 'given'\n", "curvature.kind", 4),
        (HEAD + "[recipe.curvature]\nkind = 'exact_fisher'\nper_row = 2\n", "curvature.per_row", 5),
        (HEAD + "[recipe.select]\nmethod = 'obs'\nmax_swaps = 2\n", "select.max_swaps", 5),
        (HEAD + "[recipe.select]\nprogram = 'both'\n", "select.program", 4),
        (HEAD + "[recipe]\nselect = 3\n", "select", 4),
        (HEAD + "[recipe.select]\nprogram = 'selection'\nrestarts = 2\n", "select.restarts", 5),
        (HEAD + "[recipe.weights]\nblocks = 'column'\n", "weights.blocks", 4),
        (HEAD + "[recipe.update]\nscale = 0\n", "update.scale", 4),
        (HEAD + "[stages]\nfinal = 3\n", "stages.final", 4),
        (HEAD + "[stages]\ncount = 2\nschedule = [0.6, 0.5]\n", "stages.schedule", 5),
        (HEAD + "[stages]\ncount = 2\n[certify]\n", "certify", 5),
        (HEAD + "[certify]\ntime_limit = -1\n", "certify.time_limit", 4),
        (HEAD + "[[recipe]]\ndamping = 0.1\n[[recipe]]\ndamping = -1.0\n", "recipe[1].damping", 6),
        (HEAD + "[[recipe]]\ndamping = 0.1\n[[recipe]]\ndampings = 1.0\n", "recipe[1].dampings", 6),
        (HEAD + "[[recipe]]\ngradient = true\n[[recipe]]\ngradient = false\n", "recipe[1].gradient", 6),
        (
            HEAD + "[[recipe]]\n[recipe.select]\nmethod = 'obs'\n[[recipe]]\n[recipe.select]\ndrops = 0\n",
            "recipe[1].select.drops",
            8,
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    written: str, argument: str, line: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(written)
    with pytest.raises(RecipeFileError) as caught:
        load_request(path)
    assert caught.value.argument == argument
    assert str(path) in caught.value.found
    assert (f"(line {line} of {path})" in caught.value.found) == (line is not None)
    assert ("line" in caught.value.found.replace(str(path), "")) == (line is not None)
    assert caught.value.remedy


def test_what_is_no_toml_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + "[recipe\n")
    with pytest.raises(RecipeFileError, match="line 3"):
        load_request(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeFileError, match="cannot be read"):
        load_request(path)
    with pytest.raises(RecipeFileError, match="cannot be read"):
        load_request(tmp_path / "absent.toml")
    with pytest.raises(RecipeFileError, match="cannot be read"):
        load_request(tmp_path)


def test_rows_that_were_computed_before_are_not_in_the_file() -> None:
    model = network()
    partition = Partition.from_model(model, blocks="global")
    rows = gradient_rows(
        model,
        data(),
        torch.nn.functional.cross_entropy,
        partition,
        curvature=EmpiricalFisher(samples=20),
        progress=False,
    )
    document = request_to_plain(Request(sparsity=0.5, recipes=(Recipe(curvature=rows),)))
    assert document["recipe"][0]["curvature"] == {"kind": "given"}
    with pytest.raises(RecipeFileError, match="not in the file"):
        request_from_plain(document)


@pytest.mark.parametrize(
    ("assignments", "fields"),
    [
        (["damping=0.5"], {"damping": 0.5}),
        (["damping=1e-3"], {"damping": 1e-3}),
        (["damping.absolute=0.5"], {"damping": absolute(0.5)}),
        (["curvature.samples=8000"], {"curvature": EmpiricalFisher(samples=8000)}),
        (["curvature.kind=sketched_fisher"], {"curvature": SketchedFisher()}),
        (["curvature.kind=exact_fisher"], {"curvature": ExactFisher()}),
        (["gradient=true"], {"gradient": True}),
        (["update=none"], {"update": None}),
        (["update=false"], {"update": None}),
        (["update.scale=0.5"], {"update": Update(scale=0.5)}),
        (["select=obs"], {"select": OBS()}),
        (["select.max_swaps=3"], {"select": SwapSearch(max_swaps=3)}),
        (["select.max_swaps=3", "select.max_swaps=none"], {"select": SwapSearch()}),
        (["select.max_swaps=3", "select.method=greedy_obs"], {"select": GreedyOBS()}),
        (["select.method=randomized_magnitude", "select.repeats=2"],
         {"select": RandomizedMagnitude(repeats=2)}),
        (["select.method=enumeration", "select.program=selection"],
         {"select": Exact(method="enumeration", program="selection")}),
        (["select.program=joint"], {"select": None}),
        (["select.program=selection"], {"select": SwapSearch(program="selection")}),
        (["weights.blocks=row"], {"weights": Weights(blocks="row")}),
        (["weights.blocks=7"], {"weights": Weights(blocks=7)}),
        (["weights.budget={'a.*' = 0.5}"], {"weights": Weights(budget={"a.*": 0.5})}),
        (["weights.ignore=['a', 'b']"], {"weights": Weights(ignore=("a", "b"))}),
        (["weights.target=head.*"], {"weights": Weights(target="head.*")}),
        (["choice_samples = 9"], {"choice_samples": 9}),
        (["layer_inputs=0", "layer_inputs=none"], {}),
    ],
)  # fmt: skip
def test_fields_are_set(assignments: list[str], fields: dict[str, Any]) -> None:
    request = with_fields(Request(sparsity=0.5), assignments)
    assert request == Request(sparsity=0.5, recipes=(Recipe(**fields),))


def test_fields_of_the_request_and_of_several_recipes_are_set() -> None:
    several = Request(sparsity=0.5, recipes=Recipe.grid(damping=[0.1, 0.2]))
    found = with_fields(
        several, ["sparsity=0.7", "seed=3", "stages.count=2", "stages.updates=1", "update.scale=0.5"]
    )
    assert found == Request(
        sparsity=0.7,
        seed=3,
        stages=Stages(count=2, updates=1),
        recipes=Recipe.grid(damping=[0.1, 0.2], update=[Update(scale=0.5)]),
    )
    assert with_fields(several, ["certify=true"]).certify == Certify()
    assert with_fields(several, ["certify.time_limit=5"]).certify == Certify(time_limit=5.0)


def test_what_has_no_place_in_a_file_stays_when_fields_are_set(tmp_path: Path) -> None:
    stages = Stages(count=2, on_stage=lambda result: None)
    again = with_fields(Request(sparsity=0.5, stages=stages), ["stages.updates=1"]).stages
    assert again is not None
    assert again.on_stage is stages.on_stage
    certify = with_fields(Request(sparsity=0.5, certify=Certify(block_dir=tmp_path)), ["seed=1"]).certify
    assert certify is not None
    assert certify.block_dir == tmp_path


@pytest.mark.parametrize(
    ("assignment", "argument"),
    [
        ("damping", "set"),
        ("=3", "set"),
        ("dampings=3", "recipe.dampings"),
        ("damping=-3", "damping"),
        ("damping=much", "damping"),
        ("curvature.sample=3", "curvature.sample"),
        ("curvature.samples=0", "curvature.samples"),
        ("select.loud=1", "select.loud"),
        ("stages.counts=3", "stages.counts"),
        ("stages=0", "stages"),
        ("sparsity=1", "sparsity"),
        ("update.scale=0", "update.scale"),
        ("weights.blocks=column", "weights.blocks"),
    ],
)
def test_what_cannot_be_set_is_named(assignment: str, argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        with_fields(Request(sparsity=0.5), [assignment])
    assert caught.value.argument == argument
    assert caught.value.remedy


REPEATED: dict[str, dict[str, Any]] = {
    "by default": {},
    "several recipes": {
        "recipe": Recipe.grid(
            Recipe(curvature=SketchedFisher(samples=40, per_row=4), weights=Weights(blocks="layer")),
            damping=[0.1, absolute(0.05)],
            select=[SwapSearch(start=("obs", "magnitude"), repeats=2), GreedyOBS(drops=4)],
        )
    },
    "exact, certified": {
        "recipe": Recipe(
            curvature=EmpiricalFisher(samples=30),
            weights=Weights(blocks="row", budget={"0.*": 0.375, "3.*": 0.75}),
            select=Exact(options={"swaps": False, "search": "best"}),
        ),
        "certify": True,
    },
    "stages": {
        "recipe": Recipe.grid(Recipe(curvature=EmpiricalFisher(samples=30)), damping=[0.1, 1.0]),
        "stages": Stages(count=2, schedule=(0.25, 0.5), final_updates=1),
    },
}


@pytest.mark.parametrize("name", REPEATED)
def test_the_recipe_of_a_report_runs_again_to_the_same_bits(name: str, tmp_path: Path) -> None:
    first, second = network(), network()
    report = prune(first, data(), sparsity=0.5, seed=3, progress=False, **REPEATED[name])
    assert report.request is not None
    save_request(report.request, tmp_path / "recipe.toml")
    request = load_request(tmp_path / "recipe.toml")
    assert request == report.request
    again = prune(
        second,
        data(),
        sparsity=request.sparsity,
        recipe=request.recipes,
        stages=request.stages,
        certify=request.certify or False,
        seed=request.seed,
        progress=False,
    )
    assert again.request == report.request
    for key, tensor in first.state_dict().items():
        assert tensor.equal(second.state_dict()[key]), key
    assert [block.bound for block in again.blocks] == [block.bound for block in report.blocks]
