"""Fine-tuning that goes by the outputs before pruning in place of labels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import cbs_opt as cbs
from cbs_opt import resolution
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.network import known_outputs
from cbs_opt.network.data import Batch, fixed_samples, forward
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.objective import Objective
from cbs_opt.pruning import prune
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import FineTuning, Stages
from formulations.errors import ArgumentError
from tests.cbs_opt.small_network import assert_untouched, data, network, scene, snapshot
from tests.cbs_opt.stages.test_fine_tuning import RECIPE, SETTLING, steps, tuned

PLAN = FineTuning(samples=1_600, batch_size=16, rest=True, momentum_rates=(0.2,), matching=True)


def distance(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return 0.5 * float((model(x) - dense(x)).double().square().sum()) / len(x)


def learnt(samples: int = 600) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a network and data whose labels it predicts, and is sure of."""
    model = network()
    with torch.no_grad():
        model.get_submodule("3").weight.mul_(40.0)  # type: ignore[operator]
        x, _ = data(samples)
        return model, (x, model(x).argmax(1))


def test_the_distance_is_that_of_outputs_whatever_the_labels() -> None:
    model, dense = network(1), network(0)
    x, y = data(40)
    aim = Objective.matching(partial(forward, dense))
    found = evaluate(model, (x, y), aim)
    assert found.loss == pytest.approx(distance(model, dense, x), rel=1e-6)
    assert found.accuracy is None
    other = evaluate(model, (x, y.flip(0)), Objective.matching(partial(forward, dense)))
    assert other.loss == found.loss
    assert aim.output_hessian == "squared"
    assert evaluate(dense, (x, y), aim).loss == 0.0


def test_labels_that_are_made_once_have_the_same_loss() -> None:
    model, dense = network(1), network(0)
    x, y = data(40)
    aim = Objective.matching(partial(forward, dense))
    found = evaluate(model, (x, y), aim)
    fixed, sample = aim.labelled([Batch(inputs=x, labels=y)], size=16, device=x.device)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert evaluate(model, sample, fixed).loss == pytest.approx(found.loss, rel=1e-6)
    own = Objective(cross_entropy)
    assert own.labelled([Batch(inputs=x, labels=y)], size=16, device=x.device)[0] is own


class Counting(nn.Module):
    """A network that counts the samples that it is run for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.samples = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kept", [True, False])
def test_a_sample_of_tensors_runs_through_the_network_before_once(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_outputs, "MOST_KEPT", 40 * 3 * 4 if kept else 40 * 3 * 4 - 1)
    dense, (x, _) = Counting(network(0)), data(40)
    aim = Objective.matching(partial(forward, dense), samples=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for number, index in enumerate((order[:20], order[20:], order.flip(0), order[:7])):
        found = aim.prepared(Batch(inputs=x[index], index=index)).labels
        assert isinstance(found, Tensor)
        assert torch.allclose(found, network(0)(x[index]), rtol=1e-6)
        assert dense.samples == ((20, 40, 40, 40) if kept else (20, 40, 80, 87))[number]
    # Samples that are not known by their place.
    aim.prepared(Batch(inputs=x))
    assert dense.samples == (80 if kept else 127)


def test_outputs_as_long_as_their_samples_are_made_anew() -> None:
    dense = Counting(nn.Identity())
    aim = Objective.matching(partial(forward, dense), samples=4)
    short, long = torch.randn(2, 3), torch.randn(2, 5)
    for x, index in ((short, torch.tensor([0, 1])), (long, torch.tensor([2, 3]))) * 2:
        assert torch.equal(aim.prepared(Batch(inputs=x, index=index)).labels, x)  # type: ignore[arg-type]
    assert dense.samples == 8


def test_several_rows_of_a_sample_are_made_anew() -> None:
    dense = Counting(nn.Flatten(0, 1))
    aim = Objective.matching(partial(forward, dense), samples=4)
    x = torch.randn(4, 3, 2)
    for index in (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([1, 2])):
        labels = aim.prepared(Batch(inputs=x[index], index=index)).labels
        assert torch.equal(labels, x[index].flatten(0, 1))  # type: ignore[arg-type]
    assert dense.samples == 6


def test_data_that_may_change_are_always_new() -> None:
    x, y = data(10)
    assert fixed_samples((x, y)) == fixed_samples(x) == fixed_samples({"x": x, "labels": y}) == 10
    for changing in (TensorDataset(x, y), DataLoader(TensorDataset(x, y)), [(x, y), (x, y)], iter([(x, y)])):
        assert fixed_samples(changing) == 0


def test_passes_over_tensors_end_as_those_over_a_dataset_of_them() -> None:
    ends = []
    for train in (data(400), TensorDataset(*data(400))):
        model = network()
        tuned(model, PLAN, count=1, recipe=RECIPE, train=train)
        ends.append(model(data(400)[0]))
    assert torch.allclose(*ends, rtol=1e-3, atol=1e-4)


def test_its_gradient_is_that_of_the_distance() -> None:
    model, dense = network(1).double(), network(0).double()
    x, y = data(8, torch.float64)
    aim = Objective.matching(partial(forward, dense))
    batch = Batch(inputs=x, labels=y)
    aim.settle(model, partial(forward, model), batch)
    loss = aim.loss(model(x), aim.prepared(batch))
    parameters = list(model.parameters())
    expected = 0.5 * (model(x) - dense(x).detach()).square().sum() / 8
    for one, other in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
    assert all(parameter.grad is None for parameter in dense.parameters())


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("surplus", [1.0, 2.0])
def test_outputs_come_closer_to_those_before(normalized: bool, surplus: float) -> None:
    dense, found = network(), []
    for plan in (replace(PLAN, batch_statistics=normalized, surplus=surplus), None):
        model = network()
        recipe = SETTLING if normalized else RECIPE
        report = tuned(model, plan, count=1, recipe=recipe, train=data(400))
        assert report.n_prune == round(0.6 * report.n)
        found.append(distance(model, dense, data(400)[0]))
        if plan is not None:
            (record,) = steps(report)
            assert record.accepted
            assert record.samples > 1_600
            # The report tells the loss that was asked for.
            assert record.loss == pytest.approx(report.train_after.loss, rel=0.3)  # type: ignore[union-attr]
    assert found[0] < 0.8 * found[1]


def test_the_network_itself_is_not_touched_meanwhile() -> None:
    model = network()
    before = snapshot(model)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    stages = cbs.Stages(count=1, updates=1, final_updates=0, fine_tuning=PLAN, on_stage=stop)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, PLAN, stages=stages)
    assert_untouched(model, before)


def test_data_of_another_precision_are_converted() -> None:
    x, y = data(200)
    models = [network(), network()]
    for model, inputs in zip(models, (x, x.double()), strict=True):
        tuned(model, PLAN, count=1, train=(inputs, y))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_statistics_are_estimated_from_data_of_another_precision() -> None:
    x, y = data(200)
    models = [network(), network()]
    for model, inputs in zip(models, (x, x.double()), strict=True):
        prune(model, (inputs, y), sparsity=0.5, recipe=cbs.fast(), progress=False)
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.allclose(one, other)


def test_beside_steps_that_know_the_curvature_of_the_loss_it_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"stages\.fine_tuning\.matching"):
        FineTuning(samples=10, momentum_rates=(), newton_dampings=(0.1,), matching=True)


class Summed(nn.Module):
    """Returns its outputs where no tensor is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.inner(x)}


def test_outputs_that_are_not_found_are_an_error_by_name() -> None:
    model = Summed().eval()
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"stages\.fine_tuning\.matching"):
        tuned(
            model,
            PLAN,
            count=1,
            loss_fn=lambda output, y: cross_entropy(output["scores"], y),
            recipe=replace(RECIPE, curvature=EmpiricalFisher(samples=40)),
        )
    assert_untouched(model, before)


def named(recipe: Named, model: nn.Module, train: Any, sparsity: float, loss_fn: Any = None) -> Stages:
    """Return the stages that a recipe's name stands for; nothing is pruned."""
    found = resolution.resolved(recipe, scene(model, train, sparsity, loss_fn))
    assert found.stages is not None
    assert found.stages.fine_tuning is not None
    by_outputs = any("outputs before pruning" in line for line in found.choices)
    assert by_outputs is found.stages.fine_tuning.matching
    return found.stages


def matching(stages: Stages) -> bool:
    assert stages.fine_tuning is not None
    return stages.fine_tuning.matching


@pytest.mark.parametrize("name", ["balanced", "best"])
def test_a_recipe_by_name_matches_where_labels_are_learnt(name: str) -> None:
    assert matching(named(Named(name=name, samples=2_000), *learnt(), 0.8))


def test_a_recipe_by_name_goes_by_labels_where_there_is_something_to_learn() -> None:
    model, (x, y) = learnt()
    weighted = partial(cross_entropy, weight=torch.tensor([1.0, 2.0, 5.0]))
    for train, loss_fn in (((x, y.roll(1)), None), ((x, y), weighted)):
        assert not matching(named(cbs.best(samples=2_000), model, train, 0.8, loss_fn))


def test_where_too_little_is_kept_for_outputs_it_goes_by_labels() -> None:
    model, train = learnt()
    found = [matching(named(cbs.best(samples=2_000), model, train, sparsity)) for sparsity in (0.96, 0.98)]
    assert found == [True, False]


def test_stages_that_few_passes_would_be_shared_among_are_one_by_outputs() -> None:
    model, (x, y) = learnt(2_000)
    by_outputs, by_labels = (
        named(cbs.best(samples=10_000), model, (x, labels), 0.5) for labels in (y, y.roll(1))
    )
    assert matching(by_outputs)
    assert by_outputs.count == 1
    assert not matching(by_labels)
    assert by_labels.count == 3


def test_the_work_of_the_network_before_pruning_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of the fine-tuning by name are fewer, those of a budget are not, nor those of few steps."""
    model, train = learnt()
    few = named(cbs.balanced(), model, train, 0.95).fine_tuning
    monkeypatch.setattr(resolution, "MATCHED_STEPS", 100)
    found: dict[str, list[int]] = {}
    for share in (resolution.LEARNT, 0.0):
        monkeypatch.setattr(resolution, "LEARNT", share)
        for recipe in (cbs.balanced(), cbs.best(samples=3_000)):
            tuning = named(recipe, model, train, 0.95).fine_tuning
            assert tuning is not None
            assert tuning.matching is (share > 0.0)
            found.setdefault(str(recipe.samples), []).append(tuning.final_samples or 0)
    matched, labels = found["None"]
    assert matched == pytest.approx(0.75 * labels, abs=1.0)
    assert few is not None
    assert matched < (few.final_samples or 0) < labels
    assert found["3000"][0] == found["3000"][1]


def test_where_there_are_no_steps_rows_take_their_place() -> None:
    """A budget that rows use up, of a network that loses little."""
    model, train = learnt()
    report = prune(model, train, sparsity=0.02, recipe=cbs.best(samples=100), progress=False)
    assert report.request.stages is None
    assert any("rows take the place" in line for line in report.choices)
