"""A small network of handwritten digits for runs that take a second or two."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

HIDDEN = 24
TRAINED_ON = 1_200
STEPS = 60


@functools.cache
def _samples() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)


def train() -> tuple[Tensor, Tensor]:
    """Training samples: inputs (1200, 64) and labels."""
    x, y = _samples()
    return x[:TRAINED_ON], y[:TRAINED_ON]


def test() -> tuple[Tensor, Tensor]:
    """The other 597 samples."""
    x, y = _samples()
    return x[TRAINED_ON:], y[TRAINED_ON:]


def network() -> nn.Module:
    """Return a network 64-24-10 after some steps of gradient descent, in evaluation mode."""
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train()[0]), train()[1]).backward()
        optimizer.step()
    return model.eval()
