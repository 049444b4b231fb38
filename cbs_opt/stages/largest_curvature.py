"""The largest eigenvalue of a Fisher matrix that a few rows sample: what a learning rate goes by."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_curvature(rows: Tensor, images: Tensor | None = None) -> float:
    """Return the largest eigenvalue of the matrix that ``rows^T rows`` samples, of independent rows (m, n).

    Of that matrix times P, if `images` are ``rows P`` for a symmetric P that is positive definite.
    That of ``rows^T rows`` itself is above it by about the trace over m, several times it where rows are few.
    Here one half of the rows says in which direction, and the other half how much: the mean of both ways.
    O(m^2 n).
    """
    images = rows if images is None else images
    if len(rows) < 2:
        return float((rows.double() * images.double()).sum())
    halves = [(rows[part], images[part]) for part in (slice(0, None, 2), slice(1, None, 2))]
    found = [_along_first(first, other[0]) for first, other in (halves, halves[::-1])]
    return (
        sum(len(rows) / len(other[0]) * value for value, other in zip(found, halves[::-1], strict=True)) / 2
    )


def _along_first(half: tuple[Tensor, Tensor], others: Tensor) -> float:
    """Return ``|others P^(1/2) v|^2`` for the unit v that the rows of a half see most of in the metric of P.

    0 if they see nothing.
    """
    rows, images = half
    gram = (rows @ images.mT).double()
    values, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
    if not float(values[-1]) > 0.0:
        return 0.0
    mixed = (others @ images.mT).double() @ vectors[:, -1]
    return float(mixed.square().sum() / values[-1])
