"""Sketched rows of the exact Fisher, gradients at other weights, rows of some columns only."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    l1_loss,
    mse_loss,
    multi_margin_loss,
)

from cbs_opt.curvature.fisher import gradient_rows, mean_gradient
from cbs_opt.curvature.gradients import NetworkFunction
from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, Fisher, SketchedFisher
from cbs_opt.curvature.rows import Rows
from cbs_opt.errors import TrainingModeError
from cbs_opt.network.data import Batch
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.network.trial import write_back
from cbs_opt.system.resources import Resources
from formulations.errors import ShapeError, UnsupportedProblemError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

DOUBLE = torch.float64
FORTY = EmpiricalFisher(samples=40)


def rows(curvature: Fisher = FORTY, **options: Any) -> Rows:
    model = network(dtype=DOUBLE)
    partition = Partition.from_model(model, blocks="global")
    chosen = {"seed": 3, "progress": False} | options
    return gradient_rows(model, data(dtype=DOUBLE), cross_entropy, partition, curvature=curvature, **chosen)


def signs_of(pattern: Sequence[int], shape: torch.Size) -> Tensor:
    return torch.tensor(pattern).reshape(-1, *shape)


@pytest.mark.parametrize("chunk", [1, 2])
def test_the_mean_over_all_signs_is_the_exact_fisher(chunk: int) -> None:
    model = network(dtype=DOUBLE)
    partition = Partition.from_model(model, blocks="global")
    x, y = data(2, dtype=DOUBLE)
    exact = gradient_rows(
        model, (x, y), cross_entropy, partition, curvature=ExactFisher(samples=2), progress=False
    ).rows
    function = NetworkFunction(model, partition, Objective(cross_entropy))
    batch = Batch(inputs=x, labels=y)
    total = torch.zeros(partition.n, partition.n, dtype=DOUBLE)
    patterns = list(itertools.product((-1, 1), repeat=6))
    for pattern in patterns:
        signs = functools.partial(signs_of, pattern)
        (found,) = function.differentiated(batch, chunk, function.sketch(batch, signs, None))
        row = torch.cat([found[span.name].reshape(-1) for span in partition.parameters])
        total += torch.outer(row, row) / len(patterns)
    torch.testing.assert_close(total, exact.T @ exact, rtol=1e-10, atol=1e-12)


CLASS_WEIGHTS = torch.tensor([0.5, 3.0], dtype=DOUBLE)
LABELS = torch.tensor([1, 0, 1])
TOKENS = torch.tensor([[1, 0], [-100, 1], [-100, -100]])
NUMBERS = torch.tensor([[0.3, -1.2], [2.0, 0.1], [0.7, 0.4]], dtype=DOUBLE)
LOSSES: dict[str, tuple[Any, tuple[int, ...], Tensor]] = {
    "class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), (2,), LABELS),
    "summed class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction="sum"), (2,), LABELS),
    "twice": (lambda output, y: 2.0 * cross_entropy(output, y), (2,), LABELS),
    "shares": (cross_entropy, (2,), NUMBERS.softmax(1)),
    "positions": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), (2, 2), TOKENS),
    "tokens": (lambda output, y: cross_entropy(output.flatten(0, 1), y.flatten()), (2, 2), TOKENS),
    "squared": (mse_loss, (2,), NUMBERS),
    "squared, one output": (lambda output, y: mse_loss(output.squeeze(1), y), (1,), NUMBERS[:, 0]),
    "squared, summed": (nn.MSELoss(reduction="sum"), (2,), NUMBERS),
    "half": (lambda output, y: 0.5 * (output - y).square().sum(1).mean(), (2,), NUMBERS),
    "binary": (binary_cross_entropy_with_logits, (2,), NUMBERS.sigmoid()),
    "binary, weighted": (nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), (2,), (NUMBERS > 0.2).double()),
}


def case(name: str) -> tuple[nn.Module, Tensor, Tensor, Objective]:
    """A network, three samples, and the loss, settled."""
    loss, shape, labels = LOSSES[name]
    torch.manual_seed(0)
    head = nn.Linear(3, torch.Size(shape).numel())
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), head, nn.Unflatten(1, shape)).to(DOUBLE).eval()
    x = torch.randn(3, 2, dtype=DOUBLE)
    objective = Objective(loss)
    objective.settle(model, model, Batch(inputs=x, labels=labels))
    return model, x, labels, objective


def gauss_newton(model: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> Tensor:
    """``J^T L'' J`` of the loss of all samples, by autograd."""
    partition = Partition.from_model(model, blocks="global")
    tensors = partition.tensors(model)
    jacobians = jacrev(lambda weights: functional_call(model, weights, (x,)))(
        {name: tensor.detach() for name, tensor in tensors.items()}
    )
    with torch.no_grad():
        outputs = model(x)
    jacobian = torch.cat([jacobians[s.name].reshape(outputs.numel(), -1) for s in partition.parameters], 1)
    batch = Batch(inputs=x, labels=y)
    inner = torch.autograd.functional.hessian(lambda z: objective.loss(z, batch), outputs)
    return (jacobian.T @ inner.reshape(outputs.numel(), -1) @ jacobian).detach()


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_over_all_signs_is_the_gauss_newton_matrix(name: str) -> None:
    model, x, y, objective = case(name)
    partition = Partition.from_model(model, blocks="global")
    function = NetworkFunction(model, partition, objective)
    batch = Batch(inputs=x, labels=y).take(slice(2))
    weights = function.weights(batch)
    mass = 2.0 if weights is None else float(weights.sum())
    patterns = list(itertools.product((-1, 1), repeat=model(batch.inputs).numel()))
    total = torch.zeros(partition.n, partition.n, dtype=DOUBLE)
    for pattern in patterns:
        target = function.sketch(batch, functools.partial(signs_of, pattern), weights)
        (found,) = function.differentiated(batch, 2, target)
        row = torch.cat([found[span.name].reshape(-1) for span in partition.parameters])
        total += torch.outer(row, row) / len(patterns)
    expected = gauss_newton(model, batch.inputs, batch.labels, objective) * mass / 2.0
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-11)


KINDS = ("class weights", "positions", "squared", "binary")
"""A loss of each form; that of all signs is exact for every one of them."""


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES]
)
def test_many_rows_come_near_the_gauss_newton_matrix_of_the_data(name: str) -> None:
    model, x, y, objective = case(name)
    partition = Partition.from_model(model, blocks="global")
    exact = gauss_newton(model, x, y, objective)
    mean, draws = torch.zeros_like(exact), 150
    for seed in range(draws):
        found = gradient_rows(
            model,
            [(x, y)],
            objective,
            partition,
            curvature=SketchedFisher(samples=3, per_row=3),
            seed=seed,
            gradient=False,
            progress=False,
        )
        mean += found.rows.T @ found.rows / draws
    assert float(torch.linalg.norm(mean - exact) / torch.linalg.norm(exact)) < 0.3


@pytest.mark.parametrize("name", ["tokens", "squared"])
def test_signs_of_any_outputs_do_not_depend_on_the_memory_at_hand(name: str) -> None:
    model, x, y, objective = case(name)
    partition = Partition.from_model(model, blocks="global")

    def sketched(memory: int) -> Tensor:
        return gradient_rows(
            model,
            [(x, y)],
            objective,
            partition,
            curvature=SketchedFisher(samples=3, per_row=3),
            resources=Resources(chunk_memory=memory),
            progress=False,
        ).rows

    torch.testing.assert_close(sketched(1), sketched(1 << 28))


def test_a_loss_without_a_form_is_refused_unless_it_is_a_classifiers() -> None:
    model = network(dtype=DOUBLE)
    x, y = data(dtype=DOUBLE)
    partition = Partition.from_model(model, blocks="global")
    options: dict[str, Any] = {"curvature": SketchedFisher(samples=8), "progress": False}
    with pytest.raises(UnsupportedProblemError, match="EmpiricalFisher"):
        gradient_rows(model, (x, model(x).detach() + 1.0), l1_loss, partition, **options)
    plain = gradient_rows(model, (x, y), cross_entropy, partition, **options)
    margin = gradient_rows(model, (x, y), multi_margin_loss, partition, **options)
    assert margin.rows.equal(plain.rows)


def test_many_rows_come_near_the_exact_fisher() -> None:
    exact = rows(ExactFisher(samples=60)).rows
    seeds = [rows(SketchedFisher(samples=60, per_row=3), seed=s).rows for s in range(30)]
    mean = torch.stack([found.T @ found for found in seeds]).mean(dim=0)
    error = torch.linalg.norm(mean - exact.T @ exact) / torch.linalg.norm(exact.T @ exact)
    assert float(error) < 0.15


def test_the_seed_decides_the_signs() -> None:
    first, again, other = (rows(SketchedFisher(samples=60, per_row=4), seed=seed) for seed in (1, 1, 2))
    assert first.rows.equal(again.rows)
    assert not first.rows.equal(other.rows)
    assert first.rows.shape == (15, 72)


def test_signs_do_not_depend_on_the_memory_at_hand() -> None:
    little = rows(SketchedFisher(samples=40, per_row=8), resources=Resources(chunk_memory=1))
    much = rows(SketchedFisher(samples=40, per_row=8))
    torch.testing.assert_close(little.rows, much.rows)


@pytest.mark.parametrize("kind", [SketchedFisher, EmpiricalFisher, ExactFisher])
def test_some_columns_are_those_of_all(kind: type[Fisher]) -> None:
    keep = torch.rand(72, generator=torch.Generator().manual_seed(0)) < 0.4
    everything, some = rows(kind(samples=40)), rows(kind(samples=40), keep=keep)
    assert some.rows.equal(everything.rows[:, keep])
    torch.testing.assert_close(some.gradient[keep], everything.gradient[keep])


def test_rows_at_other_weights_are_those_of_a_network_that_has_them() -> None:
    model = network(dtype=DOUBLE)
    before = snapshot(model)
    partition = Partition.from_model(model, blocks="global")
    weights = partition.flatten(model) * 0.5
    options: dict[str, Any] = {"curvature": SketchedFisher(samples=20), "progress": False}
    found = gradient_rows(model, data(dtype=DOUBLE), cross_entropy, partition, weights=weights, **options)
    mean, used = mean_gradient(
        model, data(dtype=DOUBLE), cross_entropy, partition, samples=20, weights=weights, progress=False
    )
    assert_untouched(model, before)
    write_back(model, partition, weights)
    moved = gradient_rows(model, data(dtype=DOUBLE), cross_entropy, partition, **options)
    assert found.rows.equal(moved.rows)
    assert used == 20
    torch.testing.assert_close(mean, moved.gradient)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_mean_gradient_does_not_depend_on_the_batches(batch_size: int) -> None:
    model = network(dtype=DOUBLE)
    partition = Partition.from_model(model, blocks="global")
    mean, used = mean_gradient(
        model,
        data(dtype=DOUBLE),
        cross_entropy,
        partition,
        samples=100,
        batch_size=batch_size,
        progress=False,
    )
    assert used == 60
    torch.testing.assert_close(mean, rows(EmpiricalFisher(samples=60)).gradient)


def test_the_gradient_can_be_spared() -> None:
    spared = rows(SketchedFisher(samples=40), gradient=False)
    assert spared.gradient.equal(torch.zeros_like(spared.gradient))
    assert rows(gradient=False).gradient.equal(rows().gradient)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ShapeError, match="keep"):
        rows(keep=torch.ones(71, dtype=torch.bool))
    model = network().train()
    partition = Partition.from_model(model, blocks="global")
    with pytest.raises(TrainingModeError):
        mean_gradient(model, data(), cross_entropy, partition, samples=4, progress=False)
