"""A set that narrows while steps are taken: exact counts, nothing comes back, and what makes no sense."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.budget.remaining import narrowed
from cbs_opt.network.data import Batch
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.pruning import prune
from cbs_opt.recipe.records import FineTuning, Stages, Weights
from cbs_opt.stages import staged
from cbs_opt.stages.fine_tuning import NARROWING, NARROWINGS, Descent, Narrowing, Rate, Span
from formulations.errors import ArgumentError
from tests.cbs_opt.budget.test_counts import partition_of
from tests.cbs_opt.small_network import data, network
from tests.cbs_opt.stages.test_fine_tuning import RECIPE, SETTLING, steps, tuned

PLAN = FineTuning(samples=800, batch_size=16, rest=True, batch_statistics=True, surplus=3.0)


@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_counts_are_exact_at_the_end(budget: Any, vectors: bool, count: int) -> None:
    model = network()
    recipe = replace(SETTLING, weights=Weights(budget=budget))
    plan = replace(PLAN, vectors=vectors)
    report = tuned(model, plan, count=count, sparsity=0.8, recipe=recipe)
    assert report.n_prune == round(0.8 * report.n)
    for name, keep in report.masks.items():
        assert bool((model.get_parameter(name)[~keep] == 0.0).all())
        if budget == "uniform":
            assert int((~keep).sum()) == pytest.approx(0.8 * keep.numel(), abs=1.0)
    selection, last = report.stages[-2:]
    before = 1.0 - 0.2**0.5 if count == 2 else 0.0
    assert selection.sparsity == pytest.approx(max(0.4, before), abs=1.0 / report.n)
    assert last.rate_kind == "momentum"
    assert last.accepted
    assert last.sparsity == pytest.approx(0.8, abs=0.5 / report.n)


def test_few_steps_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some seventy steps, too few for a rate to be tried."""
    rates = []
    for most in (staged.MOST_PER_STEP, 1.0):
        monkeypatch.setattr(staged, "MOST_PER_STEP", most)
        recipe = cbs.best(samples=1_600)
        report = prune(network(), data(500), sparsity=0.95, recipe=recipe, progress=False)
        assert any("times as many weights" in line for line in report.choices)
        rates.append(report.stages[-1].rate)
    assert 0.0 < rates[0] < 0.5 * rates[1]


def test_it_narrows_by_the_cubic_and_then_stays() -> None:
    plan = Narrowing(begin=0.6, end=0.9, narrow=lambda keep, *_: keep)
    times = torch.linspace(0.0, 1.0, 200, dtype=torch.float64).tolist()
    found = [plan.sparsity(time) for time in times]
    assert found == sorted(found)
    assert found[0] == 0.6
    assert {value for time, value in zip(times, found, strict=True) if time >= NARROWING + 1e-9} == {0.9}
    assert len(set(found)) == NARROWINGS + 1
    half = plan.sparsity(0.5 * NARROWING + 1e-9)
    assert half == pytest.approx(0.9 - 0.3 / 8, abs=1e-12)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_what_has_gone_stays_away_and_what_stays_keeps_its_momentum(kind: str) -> None:
    model = network(dtype=torch.float64)
    x, y = data(16, dtype=torch.float64)
    partition = Partition.from_model(model, target=["0.weight"])
    start = partition.flatten(model)
    kept: list[Tensor] = []

    def narrow(keep: Tensor, saliency: Tensor, sparsity: float) -> Tensor:
        kept.append(narrowed(partition, keep, saliency, sparsity, 0.9, budget="uniform"))
        return kept[-1]

    def descent() -> Descent:
        return Descent(
            model,
            partition,
            Objective(nn.CrossEntropyLoss()),
            weights=start,
            keep=torch.ones(partition.n, dtype=torch.bool),
            rate=Rate(kind=kind, value=0.01),
        )

    batches = repeat(Batch(inputs=x, labels=y))
    plain, narrowing = descent(), descent()
    narrowing.narrow_by(Narrowing(begin=0.0, end=0.9, narrow=narrow))
    for entry in (plain, narrowing):
        entry.run(batches, samples=16 * 20, batch_size=16, span=Span(), advance=lambda _: None)
    assert all(bool((later <= earlier).all()) for earlier, later in pairwise(kept))
    assert int(narrowing.keep.sum()) == partition.n - round(0.9 * partition.n)
    assert bool((narrowing.weights[~narrowing.keep] == 0.0).all())
    assert bool((narrowing.weights[narrowing.keep] != start[narrowing.keep]).all())
    # Where nothing goes, narrowing changes no bit of the steps.
    same = descent()
    same.narrow_by(Narrowing(begin=0.0, end=0.9, narrow=lambda keep, *_: keep.clone()))
    same.run(batches, samples=16 * 20, batch_size=16, span=Span(), advance=lambda _: None)
    assert torch.equal(same.weights, plain.weights)


def test_the_counts_are_right_however_far_steps_run_away() -> None:
    plan = replace(PLAN, samples=400, momentum_rates=(1e12,))
    report = tuned(network(), plan, count=1, sparsity=0.8, recipe=SETTLING)
    assert report.n_prune == round(0.8 * report.n)
    assert report.train_after is not None
    # As without any steps to speak of, where what is too much goes by its size.
    still = tuned(network(), replace(PLAN, samples=1), count=1, sparsity=0.8, recipe=SETTLING)
    assert still.train_after is not None
    assert report.train_after.loss < 2.0 * still.train_after.loss


def test_patterns_do_not_narrow() -> None:
    options: dict[str, Any] = {"recipe": SETTLING, "progress": False}
    one, other = network(), network()
    for model, plan in ((one, PLAN), (other, replace(PLAN, surplus=1.0))):
        stages = Stages(count=1, updates=1, final_updates=0, fine_tuning=plan)
        prune(model, data(200), sparsity="2:4", stages=stages, **options)
    assert all(one.state_dict()[name].equal(value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("budget", ["uniform", "global", "mapping"])
def test_the_smallest_of_each_block_go(budget: Any) -> None:
    partition = partition_of([30, 20, 50], 25)
    draw = torch.Generator().manual_seed(0)
    keep = torch.rand(100, generator=draw) < 0.8
    saliency = torch.rand(100, generator=draw)
    if budget == "mapping":
        budget = {"layer0": 0.6, "layer1": 0.9, "layer2": 0.7}
    found = narrowed(partition, keep, saliency, 0.7, 0.7, budget=budget)
    assert int((~found).sum()) == (71 if isinstance(budget, dict) else 70)
    assert bool((found <= keep).all())
    for span in partition.blocks:
        part = slice(span.start, span.stop)
        gone, staying = keep[part] & ~found[part], found[part]
        if bool(gone.any()) and bool(staying.any()):
            assert saliency[part][gone].max() < saliency[part][staying].min()


@pytest.mark.parametrize(
    "fields",
    [
        {"surplus": 0.5},
        {"surplus": "2"},
        {"surplus": float("nan")},
        {"surplus": 2.0, "momentum_rates": (0.1, 0.2)},
        {"surplus": 2.0, "momentum_rates": (), "newton_dampings": (0.1,)},
    ],
)
def test_a_surplus_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"stages\.fine_tuning\.surplus"):
        FineTuning(samples=10, **fields)


@pytest.mark.parametrize(
    ("samples", "sparsity", "least", "most"),
    [(4_000, 0.9, 1.2, 1.5), (4_000, 0.8, 1, 1), (1_600, 0.95, 1.1, 1.3), (1_600, 0.9, 1.1, 1.3)],
)
def test_a_set_narrows_from_the_more_the_more_steps_there_are_where_little_is_kept(
    samples: int, sparsity: float, least: float, most: float
) -> None:
    report = prune(
        network(),
        data(500),
        sparsity=sparsity,
        recipe=cbs.best(samples=samples),
        progress=False,
    )
    stages = report.request.stages
    assert stages is not None
    assert stages.fine_tuning is not None
    surplus = stages.fine_tuning.surplus
    assert least <= surplus <= most
    assert report.n_prune == round(sparsity * report.n)
    assert any("times as many weights" in line for line in report.choices) is (surplus > 1)
    assert steps(report)[-1].sparsity == pytest.approx(sparsity, abs=0.5 / report.n)


def test_fields_of_fine_tuning_are_set_afterwards_and_missing_ones_named() -> None:
    recipe = cbs.best(samples=4_000, changes=("stages.fine_tuning.surplus=1",))
    report = prune(network(), data(500), sparsity=0.9, recipe=recipe, progress=False)
    assert report.request.stages is not None
    assert report.request.stages.fine_tuning is not None
    assert report.request.stages.fine_tuning.surplus == 1.0
    none = cbs.fast(weights=Weights())
    with pytest.raises(ArgumentError, match=r"stages\.fine_tuning\.samples: missing"):
        prune(
            network(),
            data(500),
            sparsity=0.9,
            recipe=replace(none, changes=("stages.fine_tuning.surplus=2",)),
            progress=False,
        )


def test_a_recipe_that_narrows_needs_no_statistics() -> None:
    report = tuned(network(), replace(PLAN, batch_statistics=False), count=1, sparsity=0.8, recipe=RECIPE)
    assert report.n_prune == round(0.8 * report.n)
