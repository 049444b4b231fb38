"""Sequences whose entries are made when they are asked for and never kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

S = TypeVar("S")
T = TypeVar("T")


class OnDemand(Sequence[T]):
    """``make(0), ..., make(length - 1)``, each made anew whenever it is asked for.

    What walks through it and lets go of each entry has one in memory at a time.
    """

    def __init__(self, make: Callable[[int], T], length: int) -> None:
        self._make, self._length = make, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> OnDemand[T]: ...
    def __getitem__(self, index: int | slice) -> T | OnDemand[T]:
        places = range(self._length)[index]
        return self._make(places) if isinstance(places, int) else chosen(self, places)


def chosen(entries: Sequence[T], places: Sequence[int]) -> OnDemand[T]:
    """Return the entries at `places`, each taken when it is asked for."""
    return OnDemand(lambda index: entries[places[index]], len(places))


def mapped(change: Callable[[S], T], entries: Sequence[S]) -> Sequence[T]:
    """Return what `change` makes of every entry, on demand if the entries are."""
    changed = OnDemand(lambda index: change(entries[index]), len(entries))
    return changed if isinstance(entries, OnDemand) else list(changed)
