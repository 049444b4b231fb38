"""The Gram matrices that tried networks share, one a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.products import KeptGram
from cbs_opt.update.cbs import passed_over

Updater = Callable[[FisherBlock, Tensor, Sequence[float], KeptGram | None], list[Tensor]]
"""New weights of a block for its pruned set, one for each damping."""

SHARED_GRAM_SIZE = 1 << 26
"""Numbers in the Gram matrices that are kept from one tried network to the next: 512 MiB."""


class SharedGrams:
    """A `KeptGram` for every block, where there are few enough blocks to keep them.

    Parameters
    ----------
    blocks : int
        How many there are.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._grams: dict[str, KeptGram] = {}

    @contextmanager
    def of(self, block: FisherBlock) -> Iterator[KeptGram | None]:
        """That of `block`, or None where it is not worth its memory."""
        rows = block.rows
        if rows is None or self._blocks * rows.shape[0] ** 2 > SHARED_GRAM_SIZE:
            yield None
            return
        if block.name not in self._grams:
            self._grams[block.name] = KeptGram(rows)
        gram = self._grams[block.name]
        gram.rows = rows
        yield gram
        # Rows on disk leave memory with the last tensor that refers to them.
        gram.rows = rows.new_empty(0, block.n)

    def updates(
        self,
        update: Updater,
        blocks: Sequence[FisherBlock],
        sets: Sequence[Tensor],
        dampings: Sequence[float],
    ) -> list[list[Tensor]]:
        """`update` of every block for its pruned set of `sets`: new weights for each damping.

        No block outlives its turn.
        """
        found = []
        for block, pruned in zip(blocks, sets, strict=True):
            with self.of(block) as gram:
                found.append(update(block, pruned, dampings, gram))
        return found

    def pass_over(self, blocks: Sequence[FisherBlock], sets: Sequence[Tensor]) -> None:
        """Have the Gram matrices see sets whose updates are not needed."""
        for block, pruned in zip(blocks, sets, strict=True):
            with self.of(block) as gram:
                passed_over(block, pruned, gram)
