"""Networks on images, series and volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.any_network.case import CLASSES, SAMPLES, Case, Trial, classes


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, in the shape of `x`."""
        return functional.relu(x + self.second(functional.relu(self.norm(self.first(x)))))


class UNet(nn.Module):
    """One level down, one up by a transposed convolution, joined with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C, H, W)."""
        high = functional.relu(self.down(x))
        low = functional.relu(self.inner(functional.max_pool2d(high, 2)))
        logits: Tensor = self.out(torch.cat([high, self.up(low)], dim=1))
        return logits


def _pooled(*layers: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)).eval()


def _images() -> Tensor:
    return torch.randn(SAMPLES, 1, 6, 6)


def _convolutional() -> Trial:
    model = _pooled(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), width=8)
    return Trial(model=model, data=(_images(), classes()))


def _resnet() -> Trial:
    model = _pooled(nn.Conv2d(1, 6, 3, padding=1), ResidualBlock(6), width=6)
    return Trial(model=model, data=(_images(), classes()))


def _mobilenet() -> Trial:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    model = _pooled(
        nn.Conv2d(1, 8, 3), depthwise, nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 12, 1), width=12
    )
    return Trial(model=model, data=(_images(), classes()))


def _segmentation(ignored: int, *, default: bool) -> Trial:
    labels = classes(SAMPLES, 6, 6)
    labels[torch.rand(labels.shape) < 0.3] = ignored
    labels[0] = ignored
    options = {} if default else {"loss_fn": nn.CrossEntropyLoss(ignore_index=ignored)}
    return Trial(model=UNet().eval(), data=(_images(), labels), options=options)


def _series() -> Trial:
    model = nn.Sequential(
        nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3, dilation=2), nn.Flatten(), nn.Linear(48, 1)
    )
    x, y = torch.randn(SAMPLES, 2, 12), torch.randn(SAMPLES, 1)
    return Trial(model=model.eval(), data=(x, y), options={"loss_fn": nn.MSELoss()})


def _volumes() -> Trial:
    model = nn.Sequential(nn.Conv3d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)).eval()
    return Trial(model=model, data=(torch.randn(SAMPLES, 1, 4, 4, 4), classes()))


def _autoencoder() -> Trial:
    x = torch.randn(SAMPLES, 10)
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 10)).eval()
    return Trial(model=model, data=(x, x), options={"loss_fn": nn.MSELoss()})


CASES = (
    Case(network="convolutional", batch="images, classes", build=_convolutional),
    Case(network="ResNet", batch="images, classes", build=_resnet),
    Case(network="MobileNet-like, depthwise", batch="images, classes", build=_mobilenet),
    Case(
        network="U-Net with ConvTranspose2d",
        batch="pixels, 255 ignored by the loss",
        build=lambda: _segmentation(255, default=False),
    ),
    Case(
        network="U-Net with ConvTranspose2d",
        batch="pixels, -100 ignored by default",
        build=lambda: _segmentation(-100, default=True),
    ),
    Case(network="Conv1d", batch="series, MSE", build=_series),
    Case(network="Conv3d", batch="volumes, classes", build=_volumes),
    Case(network="autoencoder", batch="(x, x), MSE", build=_autoencoder),
)
