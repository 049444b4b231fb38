"""A network of a few dozen weights and its data, for the tests of `prune`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.network.objective import LossFunction, Objective
from cbs_opt.network.partition import Partition
from cbs_opt.resolution import Scene


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linear layers and a batch normalisation, in evaluation mode: 6*8 + 8*3 weights."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return model.to(dtype).eval()


def data(samples: int = 60, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs (samples, 6) and labels of three classes."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 6, generator=generator)
    return x.to(dtype), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return copy.deepcopy(model.state_dict())


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every tensor is bit-identical, no gradient was left, and the network is in evaluation mode."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert tensor.equal(after[name]), name
        assert tensor.dtype == after[name].dtype
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def scene(model: nn.Module, train: Any, sparsity: float, loss_fn: LossFunction | None = None) -> Scene:
    """What `prune` makes a recipe concrete for, where memory is no matter."""
    return Scene(
        model=model,
        data=train,
        objective=Objective(loss_fn),
        partition=Partition.from_model(model),
        sparsity=sparsity,
        stages=None,
        certify=False,
        free=10**9,
    )
