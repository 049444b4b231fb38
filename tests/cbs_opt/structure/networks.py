"""Small networks with every kind of coupling, with example inputs, for the tests of groups and of removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbs_opt.structure.groups import Structure
from experiments.networks import PaddedShortcut, ResidualBlock, projection


class Residual(nn.Module):
    """Two residual blocks, the second with a shortcut that is a projection, or pads channels with zeros."""

    def __init__(self, shortcut: Any = projection) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = ResidualBlock(6, 6, shortcut)
        self.second = ResidualBlock(6, 10, shortcut)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(F.relu(self.stem(x)))).mean((2, 3)))
        return y


class Mixed(nn.Module):
    """Channels that are joined, gated by themselves (squeeze and excitation), and split into halves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.c = nn.Conv2d(11, 7, 3)
        self.squeeze, self.excite = nn.Linear(7, 4), nn.Linear(4, 7)
        self.gated, self.head = nn.Linear(7, 16), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        c = F.silu(self.c(torch.cat([a, F.gelu(self.b(a))], 1)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(c.mean((2, 3))))))
        u, v = self.gated((c * gate[:, :, None, None]).amax((2, 3))).chunk(2, -1)
        y: Tensor = self.head(u * torch.sigmoid(v))
        return y


class Packed(nn.Module):
    """Attention by hand, with query, key and value in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 4
        self.qkv, self.out, self.head = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, 3, self.n_heads, -1)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * 6**-0.5).softmax(-1)
        y: Tensor = self.head(self.out((attention @ v).transpose(1, 2).reshape(batch, length, -1)))
        return y


class Shuffled(nn.Module):
    """A channel shuffle by hand between convolutions in groups, and a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.c, self.up, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 16, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        x = self.up(self.c(self.b(x.reshape(batch, channels, height, width))))
        y: Tensor = self.head(F.pixel_shuffle(x, 2))
        return y


def depthwise() -> nn.Module:
    """A separable convolution, a group normalisation, and a flattened output."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 1), nn.GroupNorm(6, 12), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()),
        *(nn.Linear(108, 10), nn.ReLU(), nn.Linear(10, 3)),
    )


def grouped() -> nn.Module:
    """Convolutions in groups of several channels."""
    layers = nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*layers, nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))


def transposed() -> nn.Module:
    """Transposed convolutions, plain and in groups."""
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
    last = nn.ConvTranspose2d(8, 4, 2, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 8, 3), nn.ReLU(), *last)


def transformer() -> nn.Module:
    """Two encoder layers of torch."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True), 2)


def decoder() -> nn.Module:
    """A decoder layer of torch, with attention to something else."""
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, 40), 1)


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))


def image(batch: int) -> Tensor:
    """Return images of 10 by 10."""
    return torch.randn(batch, 3, 10, 10)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (mlp, lambda batch: torch.randn(batch, 7)),
    "residual": (Residual, image),
    "padded": (lambda: Residual(PaddedShortcut), image),
    "depthwise": (depthwise, image),
    "grouped": (grouped, image),
    "transposed": (transposed, image),
    "mixed": (Mixed, image),
    "shuffled": (Shuffled, image),
    "packed": (Packed, lambda batch: torch.randn(batch, 7, 24)),
    "transformer": (transformer, lambda batch: torch.randn(batch, 5, 24)),
    "decoder": (decoder, lambda batch: (torch.randn(5, batch, 24), torch.randn(7, batch, 24))),
}
"""Networks by name, each with inputs of so many samples."""


def built(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """Return a network with random weights, biases and statistics, in evaluation mode, and an example."""
    torch.manual_seed(seed)
    make, inputs = NETWORKS[name]
    return randomised(make()), inputs(2)


def randomised(model: nn.Module) -> nn.Module:
    """Give every vector of a network values that are not those of a fresh layer."""
    with torch.no_grad():
        for entry in model.parameters():
            if entry.ndim == 1:
                entry.copy_(torch.rand_like(entry) + 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn_like(module.running_mean) * 0.3)
                module.running_var.copy_(torch.rand_like(module.running_var) + 0.5)
    return model.eval()


def random_keep(structure: Structure, seed: int = 0, share: float = 0.5) -> dict[str, Any]:
    """Return which groups are kept, at least one of every set and not all of any."""
    rng = np.random.default_rng(seed)
    keep = {}
    for part in structure.sets:
        mask = rng.random(part.n_groups) < share
        mask[rng.permutation(part.n_groups)[:2]] = (True, False)
        keep[part.name] = mask
    return keep


def _masked(model: nn.Module, structure: Structure, keep: dict[str, Any]) -> None:
    with torch.no_grad():
        for part in structure.sets:
            gone = np.flatnonzero(~keep[part.name])
            for member in part.members:
                if member.role == "reads":
                    index = torch.from_numpy(member.index[gone].reshape(-1))
                    model.get_parameter(member.name).movedim(member.axis, 0)[index] = 0.0


@contextmanager
def masking(model: nn.Module, structure: Structure, keep: dict[str, Any]) -> Iterator[nn.Module]:
    """Make a network read nothing of the groups that are not kept; its weights return at the end."""
    before = {name: entry.detach().clone() for name, entry in model.named_parameters()}
    _masked(model, structure, keep)
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, entry in model.named_parameters():
                entry.copy_(before[name])


def relative(one: Any, other: Any) -> float:
    """Return the largest difference relative to the largest output."""
    return float((one - other).abs().max() / one.abs().max())
