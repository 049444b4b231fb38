"""Counts are met exactly, whatever the blocks and the budget."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt.budget.counts import allocate
from cbs_opt.errors import UnmatchedPatternError
from cbs_opt.network.partition import BlockSpan, ParameterSpan, Partition
from formulations.errors import ArgumentError, NonFiniteError, ShapeError

shares = st.floats(0.0, 1.0, exclude_max=True)
size_lists = st.lists(st.integers(1, 60), min_size=1, max_size=12)


def partition_of(sizes: list[int], block_size: int | None = None) -> Partition:
    """One parameter a size, each one block or cut into blocks of `block_size`."""
    parameters, blocks, start = [], [], 0
    for index, size in enumerate(sizes):
        stop = start + size
        parameters.append(ParameterSpan(name=f"layer{index}", shape=(size,), start=start, stop=stop))
        for first in range(start, stop, block_size or size):
            last = min(first + (block_size or size), stop)
            blocks.append(BlockSpan(name=f"b{first}", start=first, stop=last))
        start = stop
    return Partition(parameters=tuple(parameters), blocks=tuple(blocks))


def sizes_of(partition: Partition) -> list[int]:
    return [block.stop - block.start for block in partition.blocks]


@given(size_lists, shares)
def test_uniform_meets_the_total_and_every_quota(sizes, sparsity):
    partition = partition_of(sizes)
    counts = allocate(partition, sparsity, budget="uniform")
    assert sum(counts) == round(sparsity * partition.n)
    for count, size in zip(counts, sizes, strict=True):
        assert 0 <= count <= size
        assert abs(count - sparsity * size) < 1.0 + 1e-9
    remainders = [Fraction(sparsity) * size % 1 for size in sizes]
    raised = [count > Fraction(sparsity) * size for count, size in zip(counts, sizes, strict=True)]
    rest = [r for r, up in zip(remainders, raised, strict=True) if not up]
    assert all(r >= max(rest, default=0) for r, up in zip(remainders, raised, strict=True) if up)


@given(size_lists, shares, st.integers(0, 2**31), st.sampled_from([2, 1000]))
def test_global_counts_are_those_of_the_lowest_scores(sizes, sparsity, seed, levels):
    partition = partition_of(sizes)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (partition.n,), generator=generator).double()  # many ties
    counts = allocate(partition, sparsity, scores=scores, floor=0.0)
    total = round(sparsity * partition.n)
    lowest = sorted(range(partition.n), key=lambda i: (scores[i].item(), i))[:total]
    expected = [sum(block.start <= i < block.stop for i in lowest) for block in partition.blocks]
    assert counts == expected
    assert allocate(partition, sparsity, scores=scores.clone(), floor=0.0) == counts


@settings(max_examples=50)
@given(size_lists, shares, shares, st.booleans(), st.sampled_from([None, 7]))
def test_a_mapping_meets_every_parameter(sizes, sparsity, special, scored, block_size):
    partition = partition_of(sizes, block_size)
    scores = torch.arange(partition.n, dtype=torch.float64) if scored else None
    budget = {"layer0": special, "layer*": sparsity}  # the first match counts
    counts = allocate(partition, 0.5, budget=budget, scores=scores)
    assert all(0 <= count <= size for count, size in zip(counts, sizes_of(partition), strict=True))
    for index, span in enumerate(partition.parameters):
        inside = [
            (count, block.stop - block.start)
            for count, block in zip(counts, partition.blocks, strict=True)
            if span.start <= block.start < span.stop
        ]
        assert sum(count for count, _ in inside) == round(
            (special if index == 0 else sparsity) * sizes[index]
        )
        if scored:  # ascending scores: the first blocks fill up before the next begins
            assert sum(0 < count < size for count, size in inside) <= 1


def test_parameters_without_a_match_take_the_general_sparsity():
    assert allocate(partition_of([10, 20]), 0.5, budget={"layer1": 0.9}) == [5, 18]


def test_infinite_scores_come_last():
    scores = torch.tensor([float("inf"), 1.0, 2.0, float("inf"), 0.0, 3.0])
    assert allocate(partition_of([3, 3]), 2 / 3, scores=scores) == [2, 2]


def test_one_block_needs_no_scores():
    assert allocate(partition_of([40]), 0.9) == [36]


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan"), float("inf"), True, "0.5", None, 1 + 0j])
def test_sparsity_out_of_range(sparsity):
    for budget in ("uniform", "global", {"layer0": 0.5}):
        with pytest.raises(ArgumentError, match=r"^sparsity: "):
            allocate(partition_of([4]), sparsity, budget=budget)
    with pytest.raises(ArgumentError, match=r"budget\['layer0'\]"):
        allocate(partition_of([4]), 0.5, budget={"layer0": sparsity})


def test_unusable_budgets_and_scores():
    partition = partition_of([4, 4])
    with pytest.raises(ArgumentError, match="scores: none for 2 blocks"):
        allocate(partition, 0.5)
    with pytest.raises(ArgumentError, match="budget: 'even'"):
        allocate(partition, 0.5, budget="even")
    with pytest.raises(UnmatchedPatternError, match="fc"):
        allocate(partition, 0.5, budget={"fc*": 0.5})
    with pytest.raises(ShapeError, match="scores"):
        allocate(partition, 0.5, scores=torch.ones(7))
    with pytest.raises(NonFiniteError, match="1 of 8"):
        allocate(partition, 0.5, scores=torch.tensor([float("nan")] + [1.0] * 7))
    whole = Partition(parameters=partition.parameters, blocks=(BlockSpan(name="global", start=0, stop=8),))
    with pytest.raises(ArgumentError, match="span several"):
        allocate(whole, 0.5, budget={"layer0": 0.5})


@given(size_lists, shares, st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 1.0]))
def test_a_floor_leaves_something_of_every_parameter(sizes, sparsity, seed, floor):
    partition = partition_of(sizes)
    # All of one layer comes before all of the next.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sizes), generator=generator).tolist()
    scores = torch.cat([torch.full((size,), float(rank)) for rank, size in zip(order, sizes, strict=True)])
    counts = allocate(partition, sparsity, scores=scores, floor=floor)
    assert sum(counts) == round(sparsity * partition.n)
    least = [max(1, math.floor(floor * (1.0 - sparsity) * size)) for size in sizes]
    if len(sizes) > 1 and sum(least) <= partition.n - sum(counts):
        assert all(size - count >= low for size, count, low in zip(sizes, counts, least, strict=True))


def test_a_floor_that_does_not_bind_changes_nothing_and_one_that_does_says_so(caplog):
    partition = partition_of([50, 50])
    even = torch.arange(50, dtype=torch.float64).repeat(2)
    assert allocate(partition, 0.8, scores=even) == allocate(partition, 0.8, scores=even, floor=0.0)
    assert not caplog.records
    uneven = torch.arange(100).double()
    assert allocate(partition, 0.8, scores=uneven, floor=0.0) == [50, 30]
    assert not caplog.records
    assert allocate(partition, 0.8, scores=uneven) == [49, 31]
    assert "layer0" in caplog.text
    assert uneven.equal(torch.arange(100).double())


def test_rows_may_be_emptied_but_not_layers():
    partition = partition_of([40, 40], block_size=10)
    scores = torch.arange(80).double()
    assert allocate(partition, 0.5, scores=scores, floor=0.1) == [10, 10, 10, 8, 2, 0, 0, 0]


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_an_impossible_floor_is_named(floor):
    with pytest.raises(ArgumentError) as caught:
        allocate(partition_of([4]), 0.5, floor=floor)
    assert caught.value.argument == "floor"
