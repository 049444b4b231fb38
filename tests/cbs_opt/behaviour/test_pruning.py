"""`prune` end to end: exact counts, honest records, and a network that changes at the end or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cbs_opt import pruning
from cbs_opt.curvature.fisher import fisher_blocks
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.errors import (
    DataLoaderError,
    EmptyDataError,
    LabelRangeError,
    NoEligibleWeightsError,
    NonFiniteGradientError,
    TrainingModeError,
    UnmatchedPatternError,
)
from cbs_opt.network import trial as write_back
from cbs_opt.network.evaluation import evaluate
from cbs_opt.pruning import prune
from cbs_opt.recipe.records import Recipe, Update, Weights, absolute
from cbs_opt.recipe.select import (
    Exact,
    GreedyOBS,
    HardThreshold,
    Magnitude,
    RandomizedMagnitude,
    SwapSearch,
    select_by_name,
)
from cbs_opt.report.record import PruneReport
from cbs_opt.system.resources import Resources
from formulations import loss
from formulations.errors import (
    ArgumentError,
    CbsError,
    NonFiniteError,
    NotPositiveDefiniteError,
    UnknownMethodError,
    UnknownOptionError,
    UnsupportedProblemError,
)
from tests.cbs_opt.recipes import arguments
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

N = 72
SALIENCIES = ("magnitude", "randomized_magnitude", "obd", "obs", "loss_preservation", "gradient_norm")
ELIGIBLE = ("0.weight", "3.weight")


def run(model: nn.Module, train: Any = None, **options: Any) -> PruneReport:
    rows_alone = {"damping": absolute(0.01), "layer_inputs": 0.0, "curvature": EmpiricalFisher(samples=40)}
    options = {"sparsity": 0.5, "progress": False} | rows_alone | options
    if "recipe" in options:
        options = {name: value for name, value in options.items() if name not in rows_alone}
    return prune(model, data() if train is None else train, **arguments(**options))


def grid(**fields: Iterable[Any]) -> list[Recipe]:
    """Recipes on the rows alone."""
    base = Recipe(curvature=EmpiricalFisher(samples=40), layer_inputs=0.0, damping=absolute(0.01))
    return Recipe.grid(base, **fields)


def check(model: nn.Module, before: dict[str, Tensor], report: PruneReport) -> None:
    """The network, the masks and the record agree."""
    zeros = 0
    for name, tensor in model.state_dict().items():
        if name not in ELIGIBLE:
            assert tensor.equal(before[name]), name
            continue
        assert tensor.dtype == before[name].dtype
        assert bool((tensor[~report.masks[name]] == 0.0).all())
        assert bool(torch.isfinite(tensor).all())
        zeros += int((~report.masks[name]).sum())
    assert report.n == N
    assert report.n_prune == zeros == sum(layer.n_prune for layer in report.layers)
    assert report.n_prune == sum(block.n_prune for block in report.blocks)
    assert sum(block.n for block in report.blocks) == N
    if report.predicted_loss_increase is not None:
        total = sum(block.updated_loss or 0.0 for block in report.blocks)
        assert report.predicted_loss_increase == pytest.approx(total)
    assert sorted(report.masks) == sorted(ELIGIBLE)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 1 / 3, 0.9, 0.9999])
@pytest.mark.parametrize("partition", ["global", "layer", "row", 7])
def test_counts_are_exact(sparsity: float, partition: str | int) -> None:
    model = network()
    before = snapshot(model)
    report = run(model, sparsity=sparsity, weights=Weights(blocks=partition))
    check(model, before, report)
    assert report.n_prune == round(sparsity * N)
    if sparsity == 0.0:
        assert_untouched(model, before)


@pytest.mark.parametrize("method", [*SALIENCIES, "swap_search"])
def test_without_update_the_kept_weights_are_bit_identical(method: str) -> None:
    model = network()
    before = snapshot(model)
    report = run(model, select=method, update=None)
    check(model, before, report)
    for name in ELIGIBLE:
        keep = report.masks[name]
        assert model.state_dict()[name][keep].equal(before[name][keep])
    assert report.predicted_loss_increase == report.predicted_selection_loss


@pytest.mark.parametrize("method", [*SALIENCIES, "swap_search"])
def test_the_update_lowers_the_predicted_loss(method: str) -> None:
    model = network()
    before = snapshot(model)
    report = run(model, select=method)
    check(model, before, report)
    assert report.predicted_loss_increase is not None
    assert report.predicted_selection_loss is not None
    assert report.predicted_loss_increase <= report.predicted_selection_loss + 1e-12


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("partition", ["global", "layer"])
def test_predicted_losses_are_those_of_formulations(partition: str, gradient: bool) -> None:
    model = network(dtype=torch.float64)
    x, y = data(dtype=torch.float64)
    blocks = fisher_blocks(
        model,
        (x, y),
        loss_fn=cross_entropy,
        partition=partition,
        curvature=EmpiricalFisher(samples=40),
        damping=0.01,
        progress=False,
    )
    report = run(
        model,
        (x, y),
        select=SwapSearch(program="selection"),
        weights=Weights(blocks=partition),
        gradient=gradient,
    )
    keep = torch.cat([report.masks[name].flatten() for name in ELIGIBLE])
    kept_by_block = keep.split([block.n for block in blocks])
    for block, summary, kept_here in zip(blocks, report.blocks, kept_by_block, strict=True):
        bare = block if gradient else replace(block, gradient=None)
        problem, kept = bare.to_problem(summary.n_prune), kept_here.numpy()
        assert summary.selection_loss == pytest.approx(loss.selection_loss(problem, kept), rel=1e-8)
        assert summary.updated_loss == pytest.approx(loss.joint_loss(problem, kept), rel=1e-8)


def test_actual_losses_are_those_of_the_written_network() -> None:
    model = network()
    held_out = data(33)
    first = evaluate(model, held_out, cross_entropy)
    report = run(model, evaluate=held_out)
    assert report.before == first
    assert report.after == evaluate(model, held_out, cross_entropy)
    assert report.train_after is not None


@pytest.mark.parametrize("method", ["randomized_magnitude", "swap_search"])
def test_a_seed_repeats(method: str) -> None:
    weights = []
    for seed in (1, 1, 2):
        model = network()
        options = {} if method != "swap_search" else {"start": "randomized_magnitude", "max_swaps": 1}
        run(model, select=select_by_name(method, repeats=2, **options), seed=seed, update=None)
        weights.append(torch.cat([model[0].weight.flatten(), model[3].weight.flatten()]).detach())
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    before = snapshot(model)
    report = run(model, data(dtype=dtype))
    check(model, before, report)
    assert report.n_prune == 36


def test_a_loader_gives_what_tensors_give() -> None:
    x, y = data(40)
    results = []
    for source in ((x, y), DataLoader(TensorDataset(x, y), batch_size=7)):
        model = network()
        results.append((run(model, source), model[0].weight.detach()))
    (first, first_weight), (second, second_weight) = results
    assert first.masks["0.weight"].equal(second.masks["0.weight"])
    torch.testing.assert_close(first_weight, second_weight, rtol=1e-3, atol=1e-4)


def test_magnitude_needs_no_data() -> None:
    model = network()
    before = snapshot(model)
    report = prune(model, None, sparsity=0.5, recipe=Recipe(select=Magnitude(), update=None), progress=False)
    check(model, before, report)
    flat = torch.cat([before[name].flatten() for name in ELIGIBLE]).abs()
    keep = torch.cat([report.masks[name].flatten() for name in ELIGIBLE])
    assert flat[~keep].max() <= flat[keep].min()
    assert report.predicted_loss_increase is None


def test_tied_parameters_are_pruned_once_and_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)).eval()
    model[2].weight = model[0].weight
    x, y = data()
    report = run(model, (x, y))
    assert report.n == 36
    assert report.n_prune == 18 == int((model[2].weight == 0.0).sum())
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("partition", ["layer", "row", 5])
def test_budgets(partition: str | int) -> None:
    for budget in ("uniform", {"0.weight": 0.25, "3.*": 0.75}):
        model = network()
        before = snapshot(model)
        sparsity = 0.5 if budget == "uniform" else 30 / 72
        report = run(model, weights=Weights(blocks=partition, budget=budget), sparsity=sparsity)
        check(model, before, report)
        expected = (24, 12) if budget == "uniform" else (12, 18)
        if partition == "layer" or budget != "uniform":
            assert tuple(layer.n_prune for layer in report.layers) == expected
        assert report.n_prune == sum(expected)


@pytest.mark.parametrize("score", ["obd", "magnitude"])
def test_a_budget_score_decides_between_blocks(score: str) -> None:
    by_score, by_swaps = network(), network()
    first = run(by_score, select=score, weights=Weights(blocks="layer"), update=None)
    weights = Weights(blocks="layer", budget_score=score)
    second = run(by_swaps, select=SwapSearch(), weights=weights, update=None)
    assert [block.n_prune for block in first.blocks] == [block.n_prune for block in second.blocks]


def test_the_candidate_of_lowest_training_loss_wins() -> None:
    recipes = grid(damping=[absolute(1e-3), absolute(1.0)], update=[Update(scale=0.1), Update(scale=1.5)])
    losses = {}
    for recipe in recipes:
        report = run(network(), recipe=recipe)
        assert report.train_after is not None
        losses[report.damping, report.update_scale] = report.train_after.loss
    assert len(losses) == 4
    report = run(network(), recipe=recipes)
    assert (report.damping, report.update_scale) == min(losses, key=losses.__getitem__)
    assert report.train_after is not None
    assert report.train_after.loss == pytest.approx(min(losses.values()), rel=1e-6)


def test_more_restarts_are_never_worse() -> None:
    values = []
    for repeats in (1, 4):
        report = run(network(), select=RandomizedMagnitude(repeats=repeats))
        assert report.train_after is not None
        values.append(report.train_after.loss)
    assert values[1] <= values[0]


def test_alternatives_of_options_are_tried() -> None:
    best = []
    none, few = SwapSearch(max_swaps=0), SwapSearch(max_swaps=3)
    for selects in ([none], [few], [none, few]):
        report = run(network(), recipe=grid(select=selects, update=[None]))
        assert report.train_after is not None
        best.append(report.train_after.loss)
    assert best[2] == min(best[:2])


@pytest.mark.parametrize("scales", [(1e30, 0.5), (0.5, 1e30)])
def test_a_network_of_nan_loss_never_wins(scales: tuple[float, float]) -> None:
    model = network()

    def overflowing(output: Tensor, y: Tensor) -> Tensor:
        value = cross_entropy(output, y)
        return value * torch.where(model_is_wild(output), torch.nan, 1.0)

    def model_is_wild(output: Tensor) -> Tensor:
        return output.detach().abs().max() > 1e6

    report = run(model, loss_fn=overflowing, recipe=grid(update=[Update(scale=scale) for scale in scales]))
    assert report.update_scale == 0.5
    assert report.train_after is not None
    assert math.isfinite(report.train_after.loss)


def test_swap_search_never_ends_above_its_start() -> None:
    report = run(network(), select=SwapSearch(program="selection"), update=None)
    (block,) = report.blocks
    assert block.locally_optimal
    assert block.initial_loss is not None
    assert block.selection_loss is not None
    assert block.selection_loss <= block.initial_loss + 1e-12


def test_joint_selection_is_at_least_as_good_where_it_is_offered() -> None:
    plain = run(network(dtype=torch.float64), data(dtype=torch.float64), select="magnitude")
    joint = run(network(dtype=torch.float64), data(dtype=torch.float64), select=SwapSearch(program="joint"))
    assert plain.predicted_loss_increase is not None
    assert joint.predicted_loss_increase is not None
    assert joint.predicted_loss_increase <= plain.predicted_loss_increase * (1 + 1e-9)


def test_the_independent_update_is_no_better_than_the_exact_one() -> None:
    exact, independent = run(network(), select="obs"), run(network(), select="obs", update="independent")
    assert exact.masks["0.weight"].equal(independent.masks["0.weight"])
    assert exact.predicted_loss_increase is not None
    assert independent.predicted_loss_increase is not None
    assert exact.predicted_loss_increase <= independent.predicted_loss_increase


# --- nothing is written unless all is done ------------------------------------------------------


class Interrupting:
    """A callable that raises on its n-th call, a plain exception from then on."""

    def __init__(self, function: Callable[..., Any], error: BaseException, at: int) -> None:
        self.function, self.error, self.at, self.calls = function, error, at, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at or (isinstance(self.error, Exception) and self.calls > self.at > 0):
            raise self.error
        return self.function(*args, **kwargs)


ERRORS = (KeyboardInterrupt(), RuntimeError("broken"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_loss_that_raises_at_any_call_leaves_the_network(error: BaseException) -> None:
    counted = Interrupting(cross_entropy, error, -1)
    recipes = grid(curvature=[EmpiricalFisher(samples=20)], update=[Update(scale=0.5), Update(scale=1.0)])
    options = {"recipe": recipes, "evaluate": data(20)}
    run(network(), loss_fn=counted, **options)
    assert counted.calls > 6
    for at in range(1, counted.calls + 1):
        model = network()
        before = snapshot(model)
        with pytest.raises((type(error), CbsError)):
            run(model, loss_fn=Interrupting(cross_entropy, error, at), **options)
        assert_untouched(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_a_loader_that_raises_half_way_leaves_the_network(error: type[BaseException], role: str) -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        x, y = data()
        yield x[:10], y[:10]
        raise error("half way")

    model = network()
    before = snapshot(model)
    with pytest.raises((error, DataLoaderError)) as caught:
        run(model, **{role: broken()})
    if error is ValueError:
        assert isinstance(caught.value, DataLoaderError)
        assert isinstance(caught.value.__cause__, ValueError)
    assert_untouched(model, before)


def test_an_interrupt_while_writing_leaves_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_back.as_parameters

    def broken(*args: Any) -> dict[str, Tensor]:
        values = original(*args)
        values["3.weight"] = torch.zeros(2, 2)  # copying it into the parameter raises
        return values

    model = network()
    before = snapshot(model)
    monkeypatch.setattr(
        pruning,
        "write_back",
        lambda *args: (
            monkeypatch.setattr(write_back, "as_parameters", broken),
            write_back.write_back(*args),
        ),
    )
    with pytest.raises(RuntimeError):
        run(model)
    assert_untouched(model, before)


# --- bad input ----------------------------------------------------------------------------------

Given = Callable[[], dict[str, Any]]
BAD_ARGUMENTS: list[tuple[Given, type[CbsError], str]] = [
    *[(lambda v=v: {"sparsity": v}, ArgumentError, "sparsity") for v in (1.0, -0.1, 1.5, math.nan, math.inf)],
    *[(lambda v=v: {"sparsity": v}, ArgumentError, "sparsity") for v in (True, None, "half", "0.5")],
    *[
        (lambda v=v: {"damping": v}, ArgumentError, "damping")
        for v in (-1e-3, math.nan, (), (0.1, 1.0), "0.1")
    ],
    *[(lambda v=v: {"damping": absolute(v)}, ArgumentError, "damping") for v in (-1e-3, math.nan, "0.1")],
    *[
        (lambda v=v: {"update": Update(scale=v)}, ArgumentError, "update.scale")
        for v in (0.0, -1.0, math.inf, ())
    ],
    (lambda: {"selection_damping": -1.0}, ArgumentError, "selection_damping"),
    (lambda: {"recipe": "quick"}, ArgumentError, "recipe"),
    (lambda: {"recipe": []}, ArgumentError, "recipe"),
    (lambda: {"recipe": 7}, ArgumentError, "recipe"),
    (lambda: {"recipe": grid(gradient=[False, True])}, ArgumentError, "recipe[1].gradient"),
    (lambda: {"recipe": grid(choice_samples=[5, 9])}, ArgumentError, "recipe[1].choice_samples"),
    (
        lambda: {"recipe": grid(weights=[Weights(), Weights(ignore="3.*")])},
        ArgumentError,
        "recipe[1].weights",
    ),
    (
        lambda: {"recipe": grid(curvature=[EmpiricalFisher(), EmpiricalFisher(samples=9)])},
        ArgumentError,
        "recipe[1].curvature",
    ),
    (lambda: {"select": "unknown"}, UnknownMethodError, "select.method"),
    (lambda: {"select": 7}, ArgumentError, "select"),
    (lambda: {"select": Exact(options={"swops": 3})}, UnknownOptionError, "select.options.swops"),
    (lambda: {"select": Exact(options=[])}, ArgumentError, "select.options"),
    (lambda: {"select": Exact(options={"relaxation": object()})}, ArgumentError, "select.options.relaxation"),
    (lambda: {"select": Exact(method="swap_search")}, ArgumentError, "select.method"),
    (
        lambda: {"select": GreedyOBS(program="selection", drops=3)},
        UnknownOptionError,
        "select.drops",
    ),
    (
        lambda: {"select": HardThreshold(program="selection")},
        UnsupportedProblemError,
        "select.program",
    ),
    (lambda: {"select": SwapSearch(start="nowhere")}, ArgumentError, "select.start"),
    (lambda: {"select": SwapSearch(start="relaxation", program="selection")}, ArgumentError, "select.start"),
    (lambda: {"select": SwapSearch(restarts=2, program="selection")}, ArgumentError, "select.restarts"),
    (lambda: {"select": RandomizedMagnitude(spread=2.0)}, ArgumentError, "select.spread"),
    (lambda: {"select": SwapSearch(start="obs", spread=0.2)}, ArgumentError, "select.spread"),
    (lambda: {"select": SwapSearch(start="obs", drops=3)}, ArgumentError, "select.drops"),
    (
        lambda: {"select": SwapSearch(dense_limit=20, restarts=2), "layer_inputs": 1.0},
        UnsupportedProblemError,
        "select.restarts",
    ),
    (
        lambda: {"select": SwapSearch(dense_limit=20, start="relaxation"), "layer_inputs": 1.0},
        UnsupportedProblemError,
        "select.start",
    ),
    (lambda: {"select": SwapSearch(program="both")}, ArgumentError, "select.program"),
    (lambda: {"update": "sometimes"}, ArgumentError, "update"),
    (lambda: {"update": True}, ArgumentError, "update"),
    (lambda: {"update": Update(kind="sometimes")}, ArgumentError, "update.kind"),
    (lambda: {"curvature": "hessian"}, ArgumentError, "curvature"),
    (lambda: {"curvature": EmpiricalFisher(samples=0)}, ArgumentError, "curvature.samples"),
    (lambda: {"curvature": EmpiricalFisher(samples=2.5)}, ArgumentError, "curvature.samples"),
    (lambda: {"curvature": EmpiricalFisher(samples=40, per_row=50)}, ArgumentError, "curvature.per_row"),
    (lambda: {"choice_samples": 0}, ArgumentError, "choice_samples"),
    (lambda: {"choice_samples": -5}, ArgumentError, "choice_samples"),
    (lambda: {"select": SwapSearch(repeats=0)}, ArgumentError, "select.repeats"),
    (lambda: {"select": Exact(repeats=2)}, ArgumentError, "select.repeats"),
    (lambda: {"weights": Weights(blocks="column")}, ArgumentError, "weights.blocks"),
    (lambda: {"weights": Weights(blocks=0)}, ArgumentError, "weights.blocks"),
    (lambda: {"weights": Weights(budget="half")}, ArgumentError, "weights.budget"),
    (
        lambda: {"weights": Weights(budget={"5.*": 0.5}, blocks="layer")},
        UnmatchedPatternError,
        "weights.budget",
    ),
    (lambda: {"weights": Weights(budget={"3.*": 0.9})}, ArgumentError, "weights.budget"),
    (lambda: {"weights": Weights(budget={"3.*": 0.5}, blocks="global")}, ArgumentError, "weights.budget"),
    (lambda: {"weights": Weights(budget="uniform", blocks="global")}, ArgumentError, "weights.budget"),
    (
        lambda: {"weights": Weights(budget_score="obd", budget="uniform")},
        ArgumentError,
        "weights.budget_score",
    ),
    (
        lambda: {"weights": Weights(budget_score="obd", blocks="global")},
        ArgumentError,
        "weights.budget_score",
    ),
    (
        lambda: {"select": Magnitude(), "update": None, "layer_inputs": 1.0},
        ArgumentError,
        "recipe.layer_inputs",
    ),
    (lambda: {"sparsity": {"3.*": 1.5}}, ArgumentError, "sparsity['3.*']"),
    (lambda: {"sparsity": {"5.*": 0.5}}, UnmatchedPatternError, "sparsity"),
    (lambda: {"sparsity": {"3.*": 0.5}, "weights": Weights(budget="uniform")}, ArgumentError, "sparsity"),
    (lambda: {"weights": Weights(budget_score="swap_search")}, UnknownMethodError, "weights.budget_score"),
    (lambda: {"weights": Weights(budget_score="unknown")}, UnknownMethodError, "weights.budget_score"),
    (lambda: {"weights": Weights(target="nothing.*")}, UnmatchedPatternError, "weights.target"),
    (lambda: {"weights": Weights(ignore="*")}, NoEligibleWeightsError, "weights.target, ignore"),
    (lambda: {"select": SwapSearch(time_limit=-1.0)}, ArgumentError, "select.time_limit"),
    (lambda: {"seed": -1}, ArgumentError, "seed"),
    (lambda: {"seed": 2**64}, ArgumentError, "seed"),
    (lambda: {"resources": Resources(chunk_memory=0)}, ArgumentError, "resources.chunk_memory"),
    (lambda: {"resources": Resources(workers=0)}, ArgumentError, "resources.workers"),
    (lambda: {"resources": Resources(workers=2)}, ArgumentError, "resources.workers"),
    (lambda: {"resources": {"workers": 2}}, ArgumentError, "resources"),
    (lambda: {"resources": Resources(row_dir=3)}, ArgumentError, "resources.row_dir"),
    (lambda: {"damping": 0.0}, NotPositiveDefiniteError, "damping"),
    (lambda: {"damping": absolute(0.0)}, NotPositiveDefiniteError, "damping"),
]


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    BAD_ARGUMENTS,
    ids=[f"{number} {argument}" for number, (_, _, argument) in enumerate(BAD_ARGUMENTS)],
)
def test_bad_arguments(options: Given, error: type[ArgumentError], argument: str) -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        run(model, **options())
    assert caught.value.argument == argument
    assert caught.value.found
    assert caught.value.remedy
    assert_untouched(model, before)


def test_bad_networks() -> None:
    damaged = network()
    with torch.no_grad():
        damaged[3].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"3\.weight"):
        run(damaged)
    frozen = network().requires_grad_(False)
    with pytest.raises(NoEligibleWeightsError):
        run(frozen)
    with pytest.raises(NoEligibleWeightsError):
        run(nn.Sequential(nn.Tanh()))
    training = network().train()
    with pytest.raises(TrainingModeError):
        run(training)
    assert training.training


def test_bad_data() -> None:
    x, y = data()
    cases: list[tuple[Any, type[CbsError]]] = [
        ((x[:0], y[:0]), EmptyDataError),
        ([], EmptyDataError),
        ((x, y + 1), LabelRangeError),
        (((x / 0.0), y), NonFiniteGradientError),
    ]
    for bad, error in cases:
        model = network()
        before = snapshot(model)
        with pytest.raises(error):
            run(model, bad)
        assert_untouched(model, before)


@pytest.mark.parametrize(
    ("recipe", "certify", "words"),
    [
        ([Recipe()], False, "swap_search needs it"),
        ([Recipe(select="magnitude")], False, "the update needs it"),
        ([Recipe(select="magnitude", update=None)], True, "a certificate needs it"),
        (
            [Recipe(select="magnitude", update=None, weights=Weights(blocks="row", budget_score="obd"))],
            False,
            "the budget needs it",
        ),
        (Recipe.grid(select=["magnitude"], update=[None, None]), False, "2 networks are compared"),
        ([Recipe(select=RandomizedMagnitude(repeats=3), update=None)], False, "3 networks are compared"),
    ],
)
def test_what_needs_data_is_named(recipe: list[Recipe], certify: bool, words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        prune(network(), None, sparsity=0.5, recipe=recipe, certify=certify, progress=False)
    assert caught.value.argument == "data"


def test_a_damping_too_small_to_divide_by_writes_nothing() -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(CbsError) as caught:
        run(model, select=SwapSearch(program="selection"), damping=absolute(1e-320))
    assert isinstance(caught.value, ArgumentError)
    assert caught.value.argument == "damping"
    assert_untouched(model, before)


def test_dense_methods_refuse_blocks_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from cbs_opt.select import blockwise as selection

    monkeypatch.setattr(selection, "DENSE_BLOCK", 50)
    model = network()
    before = snapshot(model)
    with pytest.raises(UnsupportedProblemError) as caught:
        run(model, select=Exact())
    assert caught.value.argument == "weights.blocks"
    assert_untouched(model, before)


def test_numpy_numbers_are_numbers() -> None:
    model = network()
    report = run(
        model,
        sparsity=np.float32(0.5),
        damping=np.float32(0.01),
        update=Update(scale=np.float32(1.0)),
        curvature=EmpiricalFisher(samples=np.int64(40)),
        weights=Weights(blocks=np.int32(9)),
        seed=np.int64(1),
    )
    assert report.n_prune == 36
