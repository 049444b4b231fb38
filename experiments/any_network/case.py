"""One kind of network with one kind of batch: a case, and what it builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SAMPLES = 24
"""Samples of every case."""
CLASSES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A network, its data, and what `prune` is told beside them: nothing, where the defaults do."""

    model: nn.Module
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A kind of network and a kind of batch.

    Parameters
    ----------
    network, batch : str
        In words, as the table has them; together they are unique.
    build : callable
        Returns a `Trial`; all its random numbers come from torch's generator.
    refused : str, optional
        Words that the error must have, where `prune` refuses the network.
    needs : tuple of str
        Packages beyond those of the library.
    """

    network: str
    batch: str
    build: Callable[[], Trial]
    refused: str | None = None
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Network and batch."""
        return f"{self.network}: {self.batch}"

    def trial(self, seed: int = 0) -> Trial:
        """Build the case from `seed`; the state of torch's generator stays as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build()


def classes(*shape: int) -> torch.Tensor:
    """Return labels of `CLASSES` classes, int64; `SAMPLES` of them unless `shape` says otherwise."""
    return torch.randint(0, CLASSES, shape or (SAMPLES,))


def perceptron(inputs: int = 8, width: int = 12, outputs: int = CLASSES) -> nn.Sequential:
    """Return two linear layers in evaluation mode."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs)).eval()
