"""The Gram matrices that tried networks share, one a block."""

from __future__ import annotations

from cbs_opt.hessian.rows import KeptGram

SHARED_GRAM_SIZE = 1 << 26
"""Numbers in the Gram matrices that are kept from one tried network to the next: 512 MiB."""


class SharedGrams:
    """A `KeptGram` for every one of so many blocks, where they are few enough to keep them."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._grams: dict[str, KeptGram] = {}

    def of(self, name: str, rows: int) -> KeptGram | None:
        """Return that of block `name` with so many rows, or None where it is not worth its memory."""
        if self._blocks * rows**2 > SHARED_GRAM_SIZE:
            return None
        return self._grams.setdefault(name, KeptGram())
