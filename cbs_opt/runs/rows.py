"""Gradient rows on disk as they are computed, so that a run that is killed loses a few seconds of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cbs_opt.errors import RunMismatchError
from cbs_opt.network.data import Batch
from cbs_opt.runs.digests import SampleDigest
from cbs_opt.runs.folder import Pieces, Series

MOST_BYTES = 1 << 26
"""Rows that wait to be written: 64 MiB, or those of one chunk."""


class RowJournal:
    """What is on disk of the rows of one pass over the data: a `cbs_opt.curvature.journal.Journal`.

    Every piece has the rows since the last one, not yet scaled, the sum of gradients so far, and the digest
    of all samples so far. The samples of rows that are there are read again and compared, not differentiated.

    Parameters
    ----------
    store : Pieces
    name : str
        What the names of the pieces begin with.
    """

    def __init__(self, store: Pieces, name: str) -> None:
        self._series = Series(store, name)
        self._digest = SampleDigest()
        self._samples = 0
        self._expected = ""
        self._first = 0
        self._waiting: list[Tensor] = []

    def restore(self, gradient: Tensor) -> Iterator[Tensor]:
        """Yield the rows on disk, piece by piece; `gradient` (n,) is set to their sum of gradients."""
        for header, arrays in self._series.recall():
            if header["first"] != self._first:
                return
            yield torch.from_numpy(arrays["rows"]).to(gradient)
            self._first += len(arrays["rows"])
            gradient.copy_(torch.from_numpy(arrays["gradient"]))
            self._samples, self._expected = header["samples"], header["digest"]

    def seen(self, part: Batch, samples: int) -> bool:
        """Take note of a chunk that begins after so many samples; return whether its rows are there.

        Raises
        ------
        RunMismatchError
            If the rows on disk are of other samples, or of chunks of other sizes.
        """
        self._digest.absorb(part.inputs, part.labels)
        if samples >= self._samples:
            return False
        after = samples + part.size
        if after > self._samples or (after == self._samples and self._digest.value != self._expected):
            raise self._other_samples()
        return True

    def take(self, rows: Tensor) -> None:
        """Take rows that were made, to be written with the next piece."""
        self._waiting.append(rows.cpu().clone())

    def save(self, gradient: Tensor, samples: int, *, done: bool = False) -> None:
        """Write what waits, if it is time to or all is `done`: rows of `samples` samples in all."""
        if done and samples < self._samples:
            raise self._other_samples()
        size = sum(rows.numel() * rows.element_size() for rows in self._waiting)
        if not size or not (done or self._series.due or size >= MOST_BYTES):
            return
        rows = torch.cat(self._waiting)
        header: dict[str, Any] = {"first": self._first, "samples": samples, "digest": self._digest.value}
        arrays = {"rows": rows.numpy(), "gradient": gradient.cpu().numpy()}
        self._series.add(header, arrays, compress=False)
        self._first += len(rows)
        self._waiting = []

    def _other_samples(self) -> RunMismatchError:
        found = (
            f"the first {self._samples} samples are not those of the gradient rows, or come in other batches"
        )
        remedy = "pass the same data in the same order, or use an empty run_dir"
        return RunMismatchError("data", found, remedy)
