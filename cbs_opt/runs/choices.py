"""The chosen sets of one selection on disk, so that a run that is killed solves no block twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbs_opt.runs.folder import Piece, Pieces, Series
from cbs_opt.select.choice import Choice
from formulations.solution import Limit

NUMBERS = ("initial_value", "iterations", "locally_optimal", "seconds", "bound")
"""Fields of a choice that are numbers, booleans or None."""


class ChoiceLedger:
    """What is known of the choices of one selection, and where further ones are put.

    Parameters
    ----------
    pieces : Pieces
    name : str
        What the names of the pieces begin with.
    sizes : sequence of int
        Weights in each block.
    device : torch.device
        Where sets are read to.
    """

    def __init__(self, pieces: Pieces, name: str, sizes: Sequence[int], device: torch.device) -> None:
        self._series = Series(pieces, name)
        self._sizes = sizes
        self._waiting: dict[int, Choice] = {}
        self._known: dict[int, Choice] = {}
        for piece in self._series.recall():
            self._known |= _decoded(piece, sizes, device)

    def choice(self, index: int) -> Choice | None:
        """Return the choice for a block, if it was made."""
        return self._known.get(index)

    @property
    def complete(self) -> bool:
        """Whether every block has its choice."""
        return len(self._known) == len(self._sizes)

    def choices(self) -> list[Choice]:
        """All of them in order."""
        return [self._known[index] for index in range(len(self._sizes))]

    def add(self, index: int, choice: Choice) -> None:
        """Put down the choice for a block; it is on disk when enough work has come together."""
        self._waiting[index] = choice
        if self._series.due:
            self._save()

    def close(self, choices: Sequence[Choice]) -> None:
        """All blocks are done: put on disk what is not there yet."""
        self._waiting = {index: c for index, c in enumerate(choices) if index not in self._known}
        self._save()

    def _save(self) -> None:
        if self._waiting:
            self._series.add(*_encoded(self._waiting))
            self._known |= self._waiting
            self._waiting = {}


def _encoded(choices: dict[int, Choice]) -> Piece:
    """Header and arrays of some choices by the number of their block; NaN stands for None."""
    endings = [[choice.status, choice.limit and choice.limit.value] for choice in choices.values()]
    distinct = [list(ending) for ending in dict.fromkeys(map(tuple, endings))]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "index": np.array(list(choices), dtype=np.float64),
        "ending": np.array([distinct.index(ending) for ending in endings], dtype=np.float64),
        "keep": torch.cat([choice.keep for choice in choices.values()]).cpu().numpy(),
    }
    for name in NUMBERS:
        values = [getattr(choice, name) for choice in choices.values()]
        arrays[name] = np.array([math.nan if value is None else float(value) for value in values])
    return {"endings": distinct}, arrays


def _decoded(piece: Piece, sizes: Sequence[int], device: torch.device) -> dict[int, Choice]:
    header, arrays = piece
    indices = [int(index) for index in arrays["index"]]
    sets = torch.split(torch.from_numpy(arrays["keep"]).to(device), [sizes[index] for index in indices])
    return {
        index: _choice(header, arrays, row, keep)
        for row, (index, keep) in enumerate(zip(indices, sets, strict=True))
    }


def _choice(
    header: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]], row: int, keep: Tensor
) -> Choice:
    status, limit = header["endings"][int(arrays["ending"][row])]
    initial, iterations, optimal, seconds, bound = (float(arrays[name][row]) for name in NUMBERS)
    return Choice(
        keep=keep,
        initial_value=None if math.isnan(initial) else initial,
        iterations=int(iterations),
        locally_optimal=None if math.isnan(optimal) else bool(optimal),
        seconds=seconds,
        bound=None if math.isnan(bound) else bound,
        status=status,
        limit=None if limit is None else Limit(limit),
    )
