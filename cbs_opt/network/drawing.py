"""Training samples for stochastic steps, apart from those that networks are compared on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from cbs_opt.network.data import Batch, Data, cut, iterate, picker, read, sample_count
from cbs_opt.network.objective import UNCUT_BATCH, Objective

LARGEST_SHARE = 0.2
"""Of the samples that are set aside at most."""


class Drawing:
    """The samples of a run: some set aside, and an endless stream of the others.

    Of data that can be drawn from, `seed` decides which are set aside: `aside` of them, a fifth of all at
    most. Other data are read from their beginning again and again: what is set aside are the first samples
    of a pass, and the stream has them too, as there is no telling samples apart.
    """

    def __init__(self, data: Data, *, aside: int, seed: int) -> None:
        self._data, self._most = data, aside
        self._pick = picker(data)
        count = sample_count(data) or 0
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        first = min(aside, int(LARGEST_SHARE * count))
        # A single sample, or a few, have to serve for both.
        self._first, self._rest = order[: max(1, first)], order[first:]

    @property
    def count(self) -> int | None:
        """How many samples the stream has in a pass, where that is known."""
        return None if self._pick is None else len(self._rest)

    def aside(self, device: torch.device) -> list[Batch]:
        """Return the samples that were set aside."""
        if self._pick is not None:
            return [self._pick(self._first).to(device)]
        return list(iterate(self._data, batch_size=None, max_samples=self._most, device=device))

    def batches(
        self, objective: Objective, *, size: int, device: torch.device, begin: Callable[[], int]
    ) -> Iterator[Batch]:
        """Yield batches of at most `size` samples without end, or those that the loss needs.

        `begin` is called before every pass over the data, and returns its seed.
        """
        while True:
            seed = begin()
            if self._pick is None:
                whole = objective.in_batches
                yield from cut(read(self._data), size=None if whole else size, device=device)
                continue
            order = self._rest[torch.randperm(len(self._rest), generator=torch.Generator().manual_seed(seed))]
            for index in torch.split(order, UNCUT_BATCH if objective.in_batches else size):
                yield self._pick(index).to(device)
