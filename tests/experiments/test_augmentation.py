"""Shifted and mirrored images: real crops of the padded image, the same for the same pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from experiments.augmentation import AugmentedImages
from formulations.errors import ArgumentError

FILL = (-1.0, -2.0)


def images(count: int = 9) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(count)


def crops(image: Tensor, padding: int) -> list[Tensor]:
    """Every shift of `image` over its fill, and every mirror image."""
    channels, height, width = image.shape
    around = (
        torch.tensor(FILL).view(-1, 1, 1).expand(channels, height + 2 * padding, width + 2 * padding).clone()
    )
    found = []
    for source in (image, image.flip(2)):
        around[:, padding : padding + height, padding : padding + width] = source
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                found.append(around[:, top : top + height, left : left + width].clone())
    return found


def test_every_image_is_a_crop_or_its_mirror_image() -> None:
    x, y = images()
    loader = AugmentedImages(x, y, fill=FILL, padding=2, batch_size=4)
    seen = []
    for batch, labels in loader:
        for picture, label in zip(batch, labels, strict=True):
            assert any(torch.allclose(picture, crop) for crop in crops(x[label], 2))
            seen.append(int(label))
    assert sorted(seen) == list(range(9))


def test_a_pass_is_decided_by_its_number_and_the_seed() -> None:
    def read(seed: int, epoch: int, batch_size: int = 3) -> Tensor:
        loader = AugmentedImages(*images(), fill=FILL, padding=1, seed=seed, batch_size=batch_size)
        list(loader)
        loader.set_epoch(epoch)
        return torch.cat([batch for batch, _ in loader])

    assert read(0, 4).equal(read(0, 4))
    assert not read(0, 4).equal(read(0, 5))
    assert not read(0, 4).equal(read(1, 4))


def test_without_padding_only_mirrors_are_left() -> None:
    x, y = images(64)
    mirrored = 0
    for batch, labels in AugmentedImages(x, y, fill=FILL, padding=0):
        for picture, label in zip(batch, labels, strict=True):
            same = torch.allclose(picture, x[label])
            mirrored += not same
            assert same or torch.allclose(picture, x[label].flip(2))
    assert 16 < mirrored < 48


def test_fill_must_fit_the_channels() -> None:
    with pytest.raises(ArgumentError, match="fill"):
        AugmentedImages(*images(), fill=(0.0,))
