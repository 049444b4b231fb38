"""Samples set aside and the stream of the others: apart, whole, seeded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cbs_opt.network.drawing import LARGEST_SHARE, Drawing
from cbs_opt.network.objective import Objective
from tests.cbs_opt.small_network import data

CPU = torch.device("cpu")
N = 60


def numbered() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(float(N)).unsqueeze(1), torch.zeros(N, dtype=torch.int64)


def passes(drawing: Drawing, number: int, seeds: Any = None) -> list[list[int]]:
    """The samples of some passes, by the numbers that they hold."""
    seeds = itertools.count() if seeds is None else seeds
    stream = drawing.batches(Objective(), size=7, device=CPU, begin=lambda: next(seeds))
    result = []
    for _ in range(number):
        seen: list[int] = []
        while len(seen) < (drawing.count or N):
            seen += [int(value) for value in next(stream).inputs.flatten()]
        result.append(seen)
    return result


@pytest.mark.parametrize("form", [lambda d: d, lambda d: TensorDataset(*d)], ids=["pair", "dataset"])
def test_a_pass_has_every_sample_once_but_those_set_aside(form: Any) -> None:
    drawing = Drawing(form(numbered()), aside=10, seed=3)
    (aside,) = drawing.aside(CPU)
    apart = {int(value) for value in aside.inputs.flatten()}
    first, second = passes(drawing, 2)
    assert len(apart) == 10
    assert drawing.count == N - 10
    assert sorted(first) == sorted(second) == sorted(set(range(N)) - apart)
    assert first != second


def test_seeds_decide_what_is_set_aside_and_the_order() -> None:
    one, same, other = (Drawing(numbered(), aside=10, seed=seed) for seed in (0, 0, 1))
    assert one.aside(CPU)[0].inputs.equal(same.aside(CPU)[0].inputs)
    assert not one.aside(CPU)[0].inputs.equal(other.aside(CPU)[0].inputs)
    assert passes(one, 1, itertools.repeat(5)) == passes(same, 1, itertools.repeat(5))


def test_no_more_than_a_share_is_set_aside() -> None:
    drawing = Drawing(numbered(), aside=1000, seed=0)
    assert drawing.aside(CPU)[0].size == int(LARGEST_SHARE * N)


def test_a_loader_is_read_again_and_again() -> None:
    loader = DataLoader(TensorDataset(*numbered()), batch_size=8)
    drawing = Drawing(loader, aside=12, seed=0)
    assert drawing.count is None
    assert sum(batch.size for batch in drawing.aside(CPU)) == 12
    assert passes(drawing, 2) == [list(range(N))] * 2


def test_a_single_sample_serves_for_both() -> None:
    x, y = data(1)
    drawing = Drawing((x, y), aside=5, seed=0)
    assert drawing.aside(CPU)[0].size == 1
    assert next(drawing.batches(Objective(), size=4, device=CPU, begin=lambda: 0)).size == 1
