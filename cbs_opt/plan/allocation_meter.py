"""How much memory tensors take while something runs: counted, not guessed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operators return while it is entered.

    Attributes
    ----------
    live, peak : int
        Bytes now, and at most so far. Storages that were there before do not count, nor does what an
        operator uses within itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator and look at what it returns."""
        given = {self._key(entry) for entry in tree_iter((args, kwargs)) if isinstance(entry, Tensor)}
        result = func(*args, **(kwargs or {}))
        for entry in tree_iter(result):
            if isinstance(entry, Tensor) and self._key(entry) not in given:
                self._count(entry.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes of tensors that were made in `run` and alive at once, its result included."""
    with AllocationMeter() as meter:
        result = run()
        del result
    return int(meter.peak)


def extrapolated(measure: Callable[[int], int], count: int, available: int) -> int:
    """What `measure` would give at `count`, from its values at two small counts and a straight line.

    Parameters
    ----------
    measure : callable
        From a number of samples to bytes.
    count : int
    available : int
        Most samples that can be measured; with one the line goes through the origin.
    """
    large = min(4, available)
    if count <= large:
        return measure(count)
    small = max(1, large // 2)
    high = measure(large)
    if small == large:
        return high * count // large
    slope = (high - measure(small)) / (large - small)
    return round(high + max(0.0, slope) * (count - large))
