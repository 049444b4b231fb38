"""Sequences whose entries are made when they are asked for and never kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class OnDemand(Sequence[T]):
    """``make(0), ..., make(length - 1)``, each made anew whenever it is asked for.

    What walks through it and lets go of each entry has one in memory at a time.
    """

    def __init__(self, make: Callable[[int], T], length: int) -> None:
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> OnDemand[T]: ...
    def __getitem__(self, index: int | slice) -> T | OnDemand[T]:
        chosen = range(self._length)[index]
        return self._make(chosen) if isinstance(chosen, int) else self.take(chosen)

    def take(self, chosen: Sequence[int]) -> OnDemand[T]:
        """Return the entries at `chosen`."""
        return OnDemand(lambda index: self._make(chosen[index]), len(chosen))
