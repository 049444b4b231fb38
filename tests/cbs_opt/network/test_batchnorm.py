"""Recalibration against statistics computed by hand, and nothing else touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cbs_opt.errors import DataLoaderError, EmptyDataError, NoBatchNormError
from cbs_opt.network.batchnorm import recalibrate_batchnorm
from formulations.errors import ArgumentError, NonFiniteError

SAMPLES = 22


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, momentum=None),
    ).double()
    network.train()
    network[0].eval()
    network[1].running_mean.add_(5.0)
    return network


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(SAMPLES, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return 3.0 * x + 1.0, torch.zeros(SAMPLES)


def by_hand(model: nn.Sequential, x: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Sample-weighted averages of the means and unbiased variances of the batches, layer by layer."""
    sums = [[0.0, 0.0], [0.0, 0.0]]
    used = 0
    for batch in x.split(batch_size):
        if len(batch) == 1:
            continue
        used += len(batch)
        hidden = torch.conv2d(batch, model[0].weight, model[0].bias)
        flat = hidden.transpose(0, 1).flatten(1)
        shape = (1, 3, 1, 1)
        mean, variance = flat.mean(1), flat.var(1)
        normal = (hidden - mean.view(shape)) / (flat.var(1, unbiased=False).view(shape) + 1e-5).sqrt()
        out = torch.relu(normal).flatten(1) @ model[5].weight.T + model[5].bias
        for total, (new_mean, new_variance) in zip(
            sums, [(mean, variance), (out.mean(0), out.var(0))], strict=True
        ):
            total[0] += len(batch) * new_mean
            total[1] += len(batch) * new_variance
    return [(mean / used, variance / used) for mean, variance in sums]


@pytest.mark.parametrize("batch_size", [22, 8, 7, 500])
def test_statistics_are_averages_over_all_samples(model, data, batch_size):
    expected = by_hand(model, data[0], batch_size)
    loader = DataLoader(TensorDataset(*data), batch_size=5)
    others = copy.deepcopy(model)
    assert recalibrate_batchnorm(model, data, batch_size=batch_size) == SAMPLES - (batch_size == 7)
    recalibrate_batchnorm(others, loader, batch_size=batch_size)
    for network in (model, others):
        for layer, (mean, variance) in zip((network[1], network[6]), expected, strict=True):
            torch.testing.assert_close(layer.running_mean, mean.detach())
            torch.testing.assert_close(layer.running_var, variance.detach())


def test_only_statistics_change(model, data):
    before = copy.deepcopy(model.state_dict())
    buffers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    recalibrate_batchnorm(model, data, samples=10, batch_size=4)
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[6].momentum) == (0.1, None)
    assert not model[1]._forward_pre_hooks
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == buffers
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value) == ("running" not in name and "tracked" not in name)
    assert model[1].num_batches_tracked == 3


class Interrupted:
    def __init__(self, batch: tuple[Tensor, Tensor], error: BaseException) -> None:
        self.batch, self.error = batch, error

    def __iter__(self):
        yield self.batch
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError("gone"), DataLoaderError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_old_statistics_return_after_a_failure(model, data, error, expected):
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with pytest.raises(expected):
        recalibrate_batchnorm(model, Interrupted(data, error), batch_size=4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[6].momentum) == (0.1, None)


def test_nan_statistics_are_refused(model, data):
    before = copy.deepcopy(model.state_dict())
    data[0][3] = float("inf")
    with pytest.raises(NonFiniteError, match="statistics"):
        recalibrate_batchnorm(model, data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_layer_used_twice_averages_both_uses():
    norm = nn.BatchNorm1d(1)
    model = nn.Sequential(norm, nn.Linear(1, 1, bias=False), norm).double()
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    x = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    recalibrate_batchnorm(model, (x, torch.zeros(12)), batch_size=6)
    first = x.view(2, 6).mean(1).mean()
    torch.testing.assert_close(norm.running_mean, (first / 2).reshape(1))  # the second use has mean 0


def test_unusable_arguments(model, data):
    with pytest.raises(NoBatchNormError):
        recalibrate_batchnorm(
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), data
        )
    for options in ({"batch_size": 1}, {"samples": 0}):
        with pytest.raises(ArgumentError):
            recalibrate_batchnorm(model, data, **options)
    for empty in ([], (data[0][:1], data[1][:1])):
        with pytest.raises(EmptyDataError):
            recalibrate_batchnorm(model, empty)
