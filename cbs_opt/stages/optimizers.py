"""What turns gradients into steps: Nesterov's method and Adam, over weights of which some may go on the way.

They do as `torch.optim` does, to the bit. Its first step in a process imports the compiler of torch, which
takes seconds and 70 MB: more than the whole fine-tuning of a small network.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

MOMENTUM = 0.9
AVERAGES = (0.9, 0.999)
"""Shares of Adam's averages of gradients and of their squares that stay at each step."""
LEAST = 1e-8
"""What Adam adds to root mean squares."""


class Optimizer(Protocol):
    """Steps over one vector of weights."""

    def step(self, weights: Tensor, gradient: Tensor, rate: float) -> None:
        """Move `weights` (n,), in place, by `gradient` (n,) at a learning rate."""

    def restrict(self, staying: Tensor) -> None:
        """Go on with the weights of `staying` (n,) bool alone."""


class Nesterov:
    """Gradient descent with momentum in the manner of Nesterov (1983)."""

    def __init__(self) -> None:
        self._velocity: Tensor | None = None

    def step(self, weights: Tensor, gradient: Tensor, rate: float) -> None:
        """See `Optimizer`."""
        if self._velocity is None:
            self._velocity = gradient.clone()
        else:
            self._velocity.mul_(MOMENTUM).add_(gradient)
        weights.add_(gradient.add(self._velocity, alpha=MOMENTUM), alpha=-rate)

    def restrict(self, staying: Tensor) -> None:
        """See `Optimizer`."""
        if self._velocity is not None:
            self._velocity = self._velocity[staying]


class Adam:
    """Adam: Kingma and Ba (2015), algorithm 1."""

    def __init__(self) -> None:
        self._averages: tuple[Tensor, Tensor] | None = None
        self._steps = 0

    def step(self, weights: Tensor, gradient: Tensor, rate: float) -> None:
        """See `Optimizer`."""
        if self._averages is None:
            self._averages = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self._steps += 1
        (mean, square), (first, second) = self._averages, AVERAGES
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = rate / (1 - first**self._steps)
        scale = (square.sqrt() / math.sqrt(1 - second**self._steps)).add_(LEAST)
        weights.addcdiv_(mean, scale, value=-size)

    def restrict(self, staying: Tensor) -> None:
        """See `Optimizer`."""
        if self._averages is not None:
            mean, square = self._averages
            self._averages = mean[staying], square[staying]
