"""A search that is stopped anywhere goes on from its journal to the same bits, and does not begin anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cbs_opt.select.choice import NO_JOURNAL, SearchJournal
from cbs_opt.select.joint_program.program import JointProgram
from cbs_opt.select.joint_program.search import joint_search
from cbs_opt.select.joint_program.starts import greedy_obs_set, hard_threshold_set
from cbs_opt.select.saliency import magnitude, without_lowest
from cbs_opt.select.selection_program.program import SelectionProgram, SwapTuning
from cbs_opt.select.selection_program.swap_search import swap_search
from cbs_opt.system.progress import Advance, Progress
from tests.cbs_opt.fisher import fisher_block

LARGE = SwapTuning(dense_limit=20, pool=24, swaps_a_look=5, gathered=2, scan_rows=16, enough=20)


class Stop(Exception):
    """Ends a search from within, as a kill would."""


class StopAfter(Progress):
    """Stops a search after so many steps; counts them, and has what was done when it began."""

    def __init__(self, steps: int) -> None:
        self.left, self.counted, self.begun = steps, 0, 0

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, unit: str, done: int = 0) -> Iterator[Advance]:
        self.begun = done

        def advance(count: int) -> None:
            self.counted += 1
            self.left -= 1
            if self.left == 0:
                raise Stop

        yield advance


class Remembering(SearchJournal):
    """Keeps the last state in memory, in a copy."""

    def __init__(self, progress: Progress, state: Mapping[str, Any] | None = None) -> None:
        super().__init__(progress)
        self.state = dict(state or {})

    def recall(self) -> dict[str, Any]:
        return dict(self.state)

    def keep(self, state: Mapping[str, Any]) -> None:
        self.state = {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()
        }


def searched(journal: SearchJournal) -> tuple[Any, ...]:
    program = JointProgram(fisher_block("gradient", 300, 30))
    result = joint_search(program, without_lowest(magnitude(program.block), 200), journal=journal)
    return result.keep.tolist(), result.value, result.initial_value, result.swaps, result.locally_optimal


def swapped(journal: SearchJournal) -> tuple[Any, ...]:
    block = fisher_block("gradient", 300, 30)
    start = without_lowest(magnitude(block), 200)
    result = swap_search(SelectionProgram(block), start, tuning=LARGE, journal_of=lambda number: journal)
    return result.keep.tolist(), result.value, result.initial_value, result.swaps, result.locally_optimal


def dropped(journal: SearchJournal) -> tuple[Any, ...]:
    program = JointProgram(fisher_block("flat", 300, 30))
    return tuple(greedy_obs_set(program, 200, drops=9, journal=journal).tolist())


def thresholded(journal: SearchJournal) -> tuple[Any, ...]:
    program = JointProgram(fisher_block("flat", 300, 30))
    return tuple(hard_threshold_set(program, 200, journal=journal).tolist())


@pytest.mark.parametrize("search", [searched, swapped, dropped, thresholded])
def test_a_search_goes_on_from_where_it_was_stopped(search: Callable[[SearchJournal], Any]) -> None:
    expected, whole = search(NO_JOURNAL), StopAfter(-1)
    assert search(Remembering(whole)) == expected
    assert whole.counted >= 3
    for steps in range(1, whole.counted + 1, max(1, whole.counted // 8)):
        stopped = Remembering(StopAfter(steps))
        with pytest.raises(Stop):
            search(stopped)
        rest = StopAfter(-1)
        assert search(Remembering(rest, stopped.state)) == expected
        # The state is that before the step under way.
        assert rest.counted == whole.counted - steps + 1
        assert (rest.begun > 0) == (steps > 1)
