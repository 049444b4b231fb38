"""The metric of what layers are fed: the matrix that it says it is, what it gains, and where it is taken."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt import resolution
from cbs_opt.curvature.layer_inputs import input_covariances, input_moments
from cbs_opt.network.data import Batch
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.records import FineTuning, Recipe
from cbs_opt.stages import input_metric
from cbs_opt.stages.fine_tuning import Descent, Rate, Span
from cbs_opt.stages.input_metric import DAMPING, InputMetric
from formulations.errors import ArgumentError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot
from tests.cbs_opt.stages.test_fine_tuning import SETTLING, tuned

DOUBLE = {"dtype": torch.float64}


def skewed(samples: int, size: int, seed: int = 0) -> Tensor:
    """Inputs that vary together, most of them along one direction, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, size, generator=generator, **DOUBLE)
    return x @ torch.diag(torch.logspace(1, -1, size, **DOUBLE)) @ torch.linalg.qr(x[:size, :size])[0] + 3.0


def covariances(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    partition = Partition.from_model(model)
    return input_covariances(
        model,
        (x, torch.zeros(len(x), **DOUBLE)),
        partition,
        samples=options.pop("samples", len(x)),
        seed=0,
        weights=partition.flatten(model),
        objective=Objective(),
    )


def networks() -> list[Any]:
    linear = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(**DOUBLE).eval()
    grouped = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 2)).to(**DOUBLE).eval()
    return [
        pytest.param(linear, skewed(40, 5), id="linear"),
        pytest.param(grouped, skewed(40, 36).reshape(40, 4, 3, 3), id="groups"),
    ]


@pytest.mark.parametrize(("model", "x"), networks())
def test_it_is_the_damped_inverse_of_the_covariances_scaled_by_layer(model: nn.Module, x: Tensor) -> None:
    partition, generator = Partition.from_model(model), torch.Generator().manual_seed(1)
    keep = torch.rand(partition.n, generator=generator) < 0.6
    rows = torch.randn(9, int(keep.sum()), generator=generator, **DOUBLE)
    found = covariances(model, x)
    metric = InputMetric(partition, found, keep, rows)
    matrix = metric(torch.eye(int(keep.sum()), **DOUBLE), keep)
    assert torch.allclose(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0.0
    places, squares = keep.nonzero().squeeze(1), rows.square().sum(0)
    for span in partition.parameters:
        own = (places >= span.start) & (places < span.stop)
        blocks = found[span.name].reshape(-1, span.fan_in, span.fan_in)
        dense = []
        for block in blocks:
            damped = block + DAMPING * block.diagonal().mean() * torch.eye(span.fan_in, **DOUBLE)
            dense += [torch.linalg.inv(damped)] * (span.channels // len(blocks))
        wanted = torch.block_diag(*dense)[keep[span.start : span.stop]][:, keep[span.start : span.stop]]
        assert torch.allclose(
            matrix[own][:, own] / matrix[own][:, own].trace() * wanted.trace(), wanted, atol=1e-9
        )
        assert float((matrix.diagonal() * squares)[own].mean()) == pytest.approx(1.0)
        assert not bool(matrix[own][:, ~own].any())


def test_its_curvature_is_the_largest_eigenvalue_and_vectors_go_as_far_as_without() -> None:
    model, x = networks()[0].values
    partition = Partition.from_model(model)
    keep = torch.ones(partition.n, dtype=torch.bool)
    half = torch.randn(6, partition.n, generator=torch.Generator().manual_seed(2), **DOUBLE)
    # Of two halves that are alike each tells the other exactly how much it sees.
    rows = half.repeat_interleave(2, dim=0)
    metric = InputMetric(partition, covariances(model, x), keep, rows)
    matrix = metric(torch.eye(partition.n, **DOUBLE), keep)
    largest = float(torch.linalg.eigvals(rows.T @ rows @ matrix).real.max())
    assert metric.curvature == pytest.approx(largest)
    plain = float(torch.linalg.eigvalsh(rows.T @ rows)[-1])
    wide = torch.cat([keep, torch.tensor([True, False, True])])
    gradient = torch.ones(int(wide.sum()), **DOUBLE)
    assert metric(gradient, wide)[partition.n :].tolist() == pytest.approx([largest / plain] * 2)
    assert torch.equal(metric(gradient, wide)[: partition.n], metric(gradient[: partition.n], keep))


@pytest.mark.parametrize(("model", "x"), networks())
def test_what_inputs_have_in_common_is_no_part_of_covariances(model: nn.Module, x: Tensor) -> None:
    name = next(iter(covariances(model, x)))
    once, again = (covariances(model, values)[name] for values in (x, x + 5.0))
    assert torch.allclose(once, again, atol=1e-9)
    partition = Partition.from_model(model)
    moments = input_moments(model, (x + 5.0, x[:, 0]), partition)[name]
    assert float(moments.diagonal(dim1=-2, dim2=-1).sum()) > 2 * float(once.diagonal(dim1=-2, dim2=-1).sum())
    if x.ndim == 2:
        assert torch.allclose(once, torch.cov(x.T, correction=0), atol=1e-9)


def test_layers_that_nothing_is_known_of_or_that_are_fed_nothing_go_plainly() -> None:
    model, _ = networks()[0].values
    partition = Partition.from_model(model)
    keep = torch.ones(partition.n, dtype=torch.bool)
    rows = torch.randn(4, partition.n, generator=torch.Generator().manual_seed(3), **DOUBLE)
    last = partition.parameters[1]
    rows[:, last.start :] = 0.0
    dead = {partition.parameters[0].name: torch.zeros(5, 5, **DOUBLE)}
    metric = InputMetric(partition, dead, keep, rows)
    diagonal = metric(torch.eye(partition.n, **DOUBLE), keep)
    assert torch.equal(diagonal, torch.diag(diagonal.diagonal()))
    # No more than the least curvature that a layer counts as.
    squares = float(rows.square().sum(0).mean())
    assert float(diagonal.max()) == pytest.approx(1.0 / (input_metric.LEAST * squares))
    nothing = InputMetric(partition, {}, keep, torch.zeros(4, partition.n, **DOUBLE))
    assert nothing.curvature == 0.0
    assert torch.equal(nothing(torch.eye(partition.n, **DOUBLE), keep), torch.eye(partition.n, **DOUBLE))


def test_it_goes_further_in_as_many_steps_where_inputs_vary_together() -> None:
    x = skewed(200, 8)
    x = x - x.mean(0)
    model = nn.Linear(8, 1, bias=False).to(**DOUBLE).eval()
    partition = Partition.from_model(model)
    keep = torch.ones(partition.n, dtype=torch.bool)
    y = x @ torch.ones(8, 1, **DOUBLE)
    rows = x / len(x) ** 0.5
    metric = InputMetric(partition, {"weight": rows.T @ rows}, keep, rows)
    plain = float(torch.linalg.eigvalsh(rows.T @ rows)[-1])
    losses = []
    for curvature, used in ((plain, None), (metric.curvature, metric)):
        descent = Descent(
            model,
            partition,
            Objective(nn.MSELoss()),
            weights=torch.zeros(partition.n, **DOUBLE),
            keep=keep,
            rate=Rate(kind="momentum", value=0.1 / curvature),
        )
        if used is not None:
            descent.in_metric(used)
        descent.run(
            repeat(Batch(inputs=x, labels=y)),
            samples=60 * len(x),
            batch_size=len(x),
            span=Span(),
            advance=lambda _: None,
        )
        losses.append(float((x @ descent.weights.unsqueeze(1) - y).square().mean()))
    assert losses[1] < 0.1 * losses[0]


def test_a_run_in_the_metric_has_exact_zeros_and_can_be_repeated() -> None:
    plan = FineTuning(
        samples=800, batch_size=16, rest=True, batch_statistics=True, surplus=2.0, input_metric=True
    )
    found = []
    for _ in range(2):
        model = network()
        report = tuned(model, plan, count=1, sparsity=0.8, recipe=SETTLING)
        assert report.n_prune == round(0.8 * report.n)
        found.append(snapshot(model))
    model = network()
    model.load_state_dict(found[0])
    assert_untouched(model, found[1])
    plain = network()
    tuned(plain, FineTuning(**{**vars(plan), "input_metric": False}), count=1, sparsity=0.8, recipe=SETTLING)
    assert any(not torch.equal(value, found[0][name]) for name, value in plain.state_dict().items())


def test_it_is_of_no_consequence_without_batches_or_layer_inputs() -> None:
    plan = {"samples": 400, "batch_size": 16, "rest": True}
    without = Recipe(**{**vars(SETTLING), "layer_inputs": 0.0})
    for more, recipe in (({}, SETTLING), ({"batch_statistics": True}, without)):
        weights = []
        for metric in (False, True):
            model = network()
            tuned(model, FineTuning(**plan, **more, input_metric=metric), count=1, recipe=recipe)
            weights.append(snapshot(model))
        model.load_state_dict(weights[0])
        assert_untouched(model, weights[1])


@pytest.mark.parametrize("other", [{"newton_dampings": (0.1,)}, {"adam_rates": (0.01,)}])
def test_it_has_no_place_beside_steps_of_another_metric(other: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"stages\.fine_tuning\.input_metric"):
        FineTuning(samples=10, input_metric=True, **other)


def test_names_take_it_where_batches_are_normalised_and_its_products_are_cheap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taken() -> bool:
        report = cbs.prune(
            network(), data(500), sparsity=0.95, recipe=cbs.best(samples=1_600), progress=False
        )
        assert report.request.stages is not None
        plan = report.request.stages.fine_tuning
        assert plan is not None
        assert plan.batch_statistics
        return plan.input_metric

    assert taken()
    monkeypatch.setattr(resolution, "METRIC_SHARE", 1e-6)
    assert not taken()
