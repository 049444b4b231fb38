"""Sketched rows of the exact Fisher, gradients at other weights, rows of some columns only."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

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
from formulations.errors import ShapeError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

DOUBLE = torch.float64
FORTY = EmpiricalFisher(samples=40)


def rows(curvature: Fisher = FORTY, **options: Any) -> Rows:
    model = network(dtype=DOUBLE)
    partition = Partition.from_model(model, blocks="global")
    chosen = {"seed": 3, "progress": False} | options
    return gradient_rows(model, data(dtype=DOUBLE), cross_entropy, partition, curvature=curvature, **chosen)


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
        signs = torch.tensor(pattern).reshape(2, 3)
        (found,) = function.differentiated(batch, chunk, function.sketch(batch, signs, None))
        row = torch.cat([found[span.name].reshape(-1) for span in partition.parameters])
        total += torch.outer(row, row) / len(patterns)
    torch.testing.assert_close(total, exact.T @ exact, rtol=1e-10, atol=1e-12)


def test_many_rows_come_near_the_exact_fisher() -> None:
    exact = rows(ExactFisher(samples=60)).rows
    seeds = [rows(SketchedFisher(samples=60, per_row=3), seed=s).rows for s in range(60)]
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
