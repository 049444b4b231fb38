"""Outputs of a network that does not change, kept by the place of a sample in data that do not change."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_KEPT = 2**28
"""Bytes that are kept at most: more are computed anew."""


class KnownOutputs:
    """What a network returned for the samples that it has seen, so that later passes need not run it.

    Parameters
    ----------
    samples : int
        How many the data have; 0 to keep nothing, as where a sample is another one each time it is read.
    """

    def __init__(self, samples: int) -> None:
        self._known = torch.zeros(samples, dtype=torch.bool)
        self._rows: Tensor | None = None

    def at(self, index: Tensor | None) -> Tensor | None:
        """Return the outputs of samples at places (B,), if all of them are known."""
        if index is None or self._rows is None or not bool(self._known[index].all()):
            return None
        return self._rows[index]

    def keep(self, index: Tensor | None, rows: Tensor) -> None:
        """Keep outputs (B, ...) of samples at places (B,), if there is room for those of all samples."""
        if index is None or not len(self._known):
            return
        size = rows.numel() * rows.element_size() * len(self._known)
        if self._rows is None and size <= MOST_KEPT * len(index):
            self._rows = rows.new_zeros(len(self._known), *rows.shape[1:])
        if self._rows is None or rows.shape != (len(index), *self._rows.shape[1:]):
            # No room, outputs as long as their samples, or several rows of a sample.
            self._known, self._rows = self._known[:0], None
            return
        self._rows[index] = rows
        self._known[index] = True
