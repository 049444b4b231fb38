"""`prune` end to end: exact counts, honest records, and a network that changes at the end or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from cbs_opt.report.record import PruneReport
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
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

N = 72
SALIENCIES = ("magnitude", "randomized_magnitude", "obd", "obs", "loss_preservation", "gradient_norm")
ELIGIBLE = ("0.weight", "3.weight")


def run(model: nn.Module, train: Any = None, **options: Any) -> PruneReport:
    rows_alone = {"damping": 0.01, "layer_inputs": 0.0}
    options = {"sparsity": 0.5, "samples": 40, "progress": False} | rows_alone | options
    return prune(model, data() if train is None else train, **options)


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
    report = run(model, sparsity=sparsity, partition=partition)
    check(model, before, report)
    assert report.n_prune == round(sparsity * N)
    if sparsity == 0.0:
        assert_untouched(model, before)


@pytest.mark.parametrize("method", [*SALIENCIES, "swap_search"])
def test_without_update_the_kept_weights_are_bit_identical(method: str) -> None:
    model = network()
    before = snapshot(model)
    report = run(model, method=method, update=False)
    check(model, before, report)
    for name in ELIGIBLE:
        keep = report.masks[name]
        assert model.state_dict()[name][keep].equal(before[name][keep])
    assert report.predicted_loss_increase == report.predicted_selection_loss


@pytest.mark.parametrize("method", [*SALIENCIES, "swap_search"])
def test_the_update_lowers_the_predicted_loss(method: str) -> None:
    model = network()
    before = snapshot(model)
    report = run(model, method=method)
    check(model, before, report)
    assert report.predicted_loss_increase is not None
    assert report.predicted_selection_loss is not None
    assert report.predicted_loss_increase <= report.predicted_selection_loss + 1e-12


@pytest.mark.parametrize("gradient_term", [False, True])
@pytest.mark.parametrize("partition", ["global", "layer"])
def test_predicted_losses_are_those_of_formulations(partition: str, gradient_term: bool) -> None:
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
    report = run(model, (x, y), program="selection", partition=partition, gradient_term=gradient_term)
    keep = torch.cat([report.masks[name].flatten() for name in ELIGIBLE])
    for block, summary in zip(blocks, report.blocks, strict=True):
        problem = type(block)(
            name=block.name,
            start=block.start,
            stop=block.stop,
            weights=block.weights,
            rows=block.rows,
            gradient=block.gradient if gradient_term else None,
            damping=block.damping,
        ).to_problem(summary.n_prune)
        kept = keep[block.start : block.stop].numpy()
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
        run(model, method=method, seed=seed, update=False, method_options=options, restarts=2)
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
    report = prune(model, None, sparsity=0.5, method="magnitude", update=False, progress=False)
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
        report = run(model, partition=partition, budget=budget)
        check(model, before, report)
        expected = (24, 12) if budget == "uniform" else (12, 18)
        if partition == "layer" or budget != "uniform":
            assert tuple(layer.n_prune for layer in report.layers) == expected
        assert report.n_prune == sum(expected)


@pytest.mark.parametrize("score", ["obd", "magnitude"])
def test_a_budget_score_decides_between_blocks(score: str) -> None:
    by_score, by_swaps = network(), network()
    first = run(by_score, method=score, partition="layer", update=False)
    second = run(by_swaps, method="swap_search", partition="layer", update=False, budget_score=score)
    assert [block.n_prune for block in first.blocks] == [block.n_prune for block in second.blocks]


def test_the_candidate_of_lowest_training_loss_wins() -> None:
    grid = {"damping": (1e-3, 1.0), "update_scale": (0.1, 1.5)}
    losses = {}
    for damping in grid["damping"]:
        for scale in grid["update_scale"]:
            model = network()
            report = run(model, damping=damping, update_scale=scale)
            assert report.train_after is not None
            losses[damping, scale] = report.train_after.loss
    model = network()
    report = run(model, **grid)
    assert (report.damping, report.update_scale) == min(losses, key=losses.__getitem__)
    assert report.train_after is not None
    assert report.train_after.loss == pytest.approx(min(losses.values()), rel=1e-6)


def test_more_restarts_are_never_worse() -> None:
    values = []
    for restarts in (1, 4):
        report = run(network(), method="randomized_magnitude", restarts=restarts)
        assert report.train_after is not None
        values.append(report.train_after.loss)
    assert values[1] <= values[0]


def test_alternatives_of_options_are_tried() -> None:
    best = []
    for options in ({"max_swaps": 0}, {"max_swaps": 3}, [{"max_swaps": 0}, {"max_swaps": 3}]):
        report = run(network(), method_options=options, update=False)
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

    report = run(model, loss_fn=overflowing, update_scale=scales)
    assert report.update_scale == 0.5
    assert report.train_after is not None
    assert math.isfinite(report.train_after.loss)


def test_swap_search_never_ends_above_its_start() -> None:
    report = run(network(), program="selection", update=False)
    (block,) = report.blocks
    assert block.locally_optimal
    assert block.initial_loss is not None
    assert block.selection_loss is not None
    assert block.selection_loss <= block.initial_loss + 1e-12


def test_joint_selection_is_at_least_as_good_where_it_is_offered() -> None:
    plain = run(network(dtype=torch.float64), data(dtype=torch.float64), method="magnitude")
    joint = run(network(dtype=torch.float64), data(dtype=torch.float64), program="joint")
    assert plain.predicted_loss_increase is not None
    assert joint.predicted_loss_increase is not None
    assert joint.predicted_loss_increase <= plain.predicted_loss_increase * (1 + 1e-9)


def test_the_independent_update_is_no_better_than_the_exact_one() -> None:
    exact, independent = run(network(), method="obs"), run(network(), method="obs", update="independent")
    assert exact.masks["0.weight"].equal(independent.masks["0.weight"])
    assert exact.predicted_loss_increase is not None
    assert independent.predicted_loss_increase is not None
    assert exact.predicted_loss_increase <= independent.predicted_loss_increase


# --- nothing is written unless all is done ------------------------------------------------------


class Interrupting:
    """A callable that raises on its n-th call."""

    def __init__(self, function: Callable[..., Any], error: BaseException, at: int) -> None:
        self.function, self.error, self.at, self.calls = function, error, at, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*args, **kwargs)


ERRORS = (KeyboardInterrupt(), RuntimeError("broken"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_loss_that_raises_at_any_call_leaves_the_network(error: BaseException) -> None:
    counted = Interrupting(cross_entropy, error, -1)
    options = {"update_scale": (0.5, 1.0), "evaluate": data(20), "samples": 20}
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

BAD_ARGUMENTS: list[tuple[dict[str, Any], type[CbsError], str]] = [
    *[({"sparsity": value}, ArgumentError, "sparsity") for value in (1.0, -0.1, 1.5, math.nan, math.inf)],
    *[({"sparsity": value}, ArgumentError, "sparsity") for value in (True, None, "half", "0.5")],
    *[({"damping": value}, ArgumentError, "damping") for value in (-1e-3, math.nan, (), (0.1, -1.0), "0.1")],
    *[({"update_scale": value}, ArgumentError, "update_scale") for value in (0.0, -1.0, math.inf, ())],
    ({"selection_damping": -1.0}, ArgumentError, "selection_damping"),
    ({"method": "unknown"}, UnknownMethodError, "method"),
    ({"method_options": {"swops": 3}}, UnknownOptionError, "method_options"),
    ({"method_options": []}, ArgumentError, "method_options"),
    ({"method": "magnitude", "method_options": {"max_swaps": 3}}, UnknownOptionError, "method_options"),
    ({"method_options": {"start": "nowhere"}}, ArgumentError, "start"),
    ({"method": "randomized_magnitude", "method_options": {"spread": 2.0}}, ArgumentError, "spread"),
    ({"program": "both"}, ArgumentError, "program"),
    ({"update": "sometimes"}, ArgumentError, "update"),
    ({"curvature": "hessian"}, ArgumentError, "curvature"),
    ({"samples": 0}, ArgumentError, "samples"),
    ({"samples": 2.5}, ArgumentError, "samples"),
    ({"samples_per_row": 50}, ArgumentError, "samples_per_row"),
    ({"choice_samples": 0}, ArgumentError, "choice_samples"),
    ({"choice_samples": -5}, ArgumentError, "choice_samples"),
    ({"restarts": 0}, ArgumentError, "restarts"),
    ({"restarts": 2, "method": "obd"}, ArgumentError, "restarts"),
    ({"partition": "column"}, ArgumentError, "partition"),
    ({"partition": 0}, ArgumentError, "partition"),
    ({"budget": "half"}, ArgumentError, "budget"),
    ({"budget": {"5.*": 0.5}, "partition": "layer"}, UnmatchedPatternError, "budget"),
    ({"budget_score": "swap_search"}, UnknownMethodError, "budget_score"),
    ({"budget_score": "unknown"}, UnknownMethodError, "budget_score"),
    ({"target": "nothing.*"}, UnmatchedPatternError, "target"),
    ({"ignore": "*"}, NoEligibleWeightsError, "target, ignore"),
    ({"time_limit": -1.0}, ArgumentError, "time_limit"),
    ({"seed": -1}, ArgumentError, "seed"),
    ({"memory_limit": 0}, ArgumentError, "memory_limit"),
    ({"damping": 0.0}, NotPositiveDefiniteError, "damping"),
]


@pytest.mark.parametrize(("options", "error", "argument"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_bad_arguments(options: dict[str, Any], error: type[ArgumentError], argument: str) -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        run(model, **options)
    assert caught.value.argument == argument
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
    with pytest.raises(ArgumentError) as caught:
        prune(network(), None, sparsity=0.5, progress=False)
    assert caught.value.argument == "data"


def test_a_damping_too_small_to_divide_by_writes_nothing() -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(CbsError) as caught:
        run(model, program="selection", damping=1e-320)
    assert isinstance(caught.value, ArgumentError)
    assert caught.value.argument == "damping"
    assert_untouched(model, before)


def test_dense_methods_refuse_blocks_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from cbs_opt.select import selectors as selection

    monkeypatch.setattr(selection, "DENSE_BLOCK", 50)
    model = network()
    before = snapshot(model)
    with pytest.raises(UnsupportedProblemError) as caught:
        run(model, program="joint", method="branch_and_bound")
    assert caught.value.argument == "partition"
    assert_untouched(model, before)


def test_numpy_numbers_are_numbers() -> None:
    model = network()
    report = run(model, sparsity=np.float32(0.5), damping=np.float32(0.01), update_scale=np.array([1.0]))
    assert report.n_prune == 36
