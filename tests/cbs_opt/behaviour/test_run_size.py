"""What a run states before it starts: sizes that are right, what does not fit refused, and no work done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbs_opt import (
    EmpiricalFisher,
    ExactFisher,
    Partition,
    Resources,
    RunSize,
    SketchedFisher,
    gradient_rows,
    plan,
    prune,
)
from cbs_opt.curvature.rows import Rows, RowsInMemory
from cbs_opt.curvature.run_size import check_fits, fitting_blocks, run_size
from cbs_opt.errors import RowMemoryError, RowStoreError
from cbs_opt.recipe.records import Recipe, Weights
from cbs_opt.system.memory import parsed, readable
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

N = 6 * 8 + 8 * 3


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after its size is stated fails."""
    monkeypatch.setattr("cbs_opt.oneshot.gradient_rows", lambda *_, **__: pytest.fail("begun"))


FEW = Recipe(curvature=EmpiricalFisher(samples=40))


def parts(blocks: str | int = "global") -> Partition:
    return Partition.from_model(network(), blocks=blocks)


@pytest.mark.usefixtures("no_work")
def test_a_plan_has_the_sizes_of_the_run_and_starts_nothing() -> None:
    model = network()
    before = snapshot(model)
    recipe = Recipe(curvature=EmpiricalFisher(samples=40, per_row=4), weights=Weights(blocks="layer"))
    size = plan(model, data(), sparsity=0.5, recipe=recipe)
    assert (size.n, size.blocks) == (N, 2)
    assert (size.largest_block, size.largest_block_n) == ("0.weight", 48)
    assert (size.rows, size.row_bytes, size.largest_block_bytes) == (10, 4 * 10 * N, 4 * 10 * 48)
    assert (size.row_dir, size.disk_bytes) == (None, 0)
    assert size.peak_bytes == size.resident_bytes + sum(size.arrays.values())
    assert_untouched(model, before)
    assert json.loads(json.dumps(size.to_dict())) == size.to_dict()


def test_rows_on_disk_are_stated_with_their_place(tmp_path: Path) -> None:
    resources = Resources(row_memory=4 * 40 * 8, row_dir=tmp_path)
    size = run_size(parts("row"), EmpiricalFisher(samples=40), resources=resources)
    assert size.row_dir == str(tmp_path)
    assert size.disk_bytes >= size.row_bytes
    assert size.disk_free_bytes > 0
    assert size.arrays.get("gradient rows", 0) <= 4 * 40 * 8
    text = size.summary()
    assert f"on disk in {tmp_path}" in text
    assert f"peak memory: about {readable(size.peak_bytes)}" in text
    check_fits(size)


@pytest.mark.parametrize(
    ("curvature", "available", "rows"),
    [
        (EmpiricalFisher(samples=40, per_row=4), None, 10),
        (EmpiricalFisher(samples=1000), 60, 60),
        (EmpiricalFisher(samples=5, per_row=5), 3, 1),
        (SketchedFisher(samples=40, per_row=3), None, 13),
        (ExactFisher(samples=20), None, 60),
        (None, None, 0),
    ],
    ids=str,
)
def test_the_number_of_rows_is_known_before(curvature: Any, available: int | None, rows: int) -> None:
    assert run_size(parts(), curvature, available=available).rows == rows
    if curvature is not None:
        samples = available or curvature.samples
        found = gradient_rows(
            network(), data(samples), nn.functional.cross_entropy, parts(), curvature=curvature
        )
        assert found.shape == (rows, N)


def test_rows_that_are_there_take_nothing_more() -> None:
    tensor = torch.zeros(7, N)
    rows = Rows(store=RowsInMemory(tensor, 7), partition=parts(), gradient=torch.zeros(N), samples=7)
    size = run_size(parts(), rows)
    assert (size.rows, size.row_bytes, size.alternatives) == (7, 4 * 7 * N, {})
    assert "gradient rows" not in size.arrays or size.arrays["gradient rows"] == 0


def test_what_cannot_run_is_refused_before_a_gradient(tmp_path: Path, no_work: None) -> None:
    model = network()
    before = snapshot(model)
    whole, rows = (replace(FEW, weights=Weights(blocks=blocks)) for blocks in ("global", "row"))
    resources = Resources(row_memory=4 * 40 * 8)
    size = plan(model, data(), sparsity=0.5, recipe=whole, resources=resources)
    assert size.row_memory is not None
    assert size.largest_block_bytes > size.row_memory
    with pytest.raises(RowMemoryError, match="cut blocks of at most 8 weights") as large:
        prune(model, data(), sparsity=0.5, recipe=whole, resources=resources)
    assert large.value.argument == "resources.row_memory"
    nowhere = replace(resources, row_dir=tmp_path / "none")
    with pytest.raises(RowStoreError, match="not a folder") as absent:
        prune(model, data(), sparsity=0.5, recipe=rows, resources=nowhere)
    assert absent.value.argument == "resources.row_dir"
    assert_untouched(model, before)
    with pytest.raises(TypeError, match="sparcity"):
        plan(network(), data(), sparcity=0.5)


def test_a_run_that_exceeds_the_free_memory_is_refused_with_what_fits(
    monkeypatch: pytest.MonkeyPatch, no_work: None
) -> None:
    class Memory:
        available = 1 << 20

    model = network()
    before = snapshot(model)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    with pytest.raises(RowMemoryError, match=r"where 1.0 MiB are free.*use fewer samples"):
        prune(model, data(), sparsity=0.5, recipe=FEW)
    assert_untouched(model, before)


WIDE = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100))
LARGE = EmpiricalFisher(samples=1000)
SMALL_CHUNKS = Resources(chunk_memory=1 << 10)


def wide(blocks: str = "global", resources: Resources = SMALL_CHUNKS, **options: Any) -> RunSize:
    partition = Partition.from_model(WIDE, blocks=blocks)
    return run_size(partition, LARGE, resources=resources, **options)


def needed(size: RunSize) -> int:
    return size.peak_bytes - size.resident_bytes


@settings(max_examples=60, deadline=None)
@given(free=st.integers(1 << 20, 1 << 30), layer_inputs=st.booleans())
def test_the_partition_that_is_picked_fits_and_the_refusal_names_it(free: int, layer_inputs: bool) -> None:
    size = wide(layer_inputs=layer_inputs)
    rule, row_memory = fitting_blocks(size, free)
    if needed(size) <= free:
        assert (rule, row_memory) == ("global", None)
        check_fits(size, free)
        return
    with pytest.raises(RowMemoryError) as refused:
        check_fits(size, free)
    if rule == "global":
        assert "blocks of a" not in str(refused.value)
        return
    assert f'blocks of a "{rule}" with row_memory={row_memory}' in str(refused.value)
    chosen = Resources(row_memory=row_memory, chunk_memory=1 << 10)
    smaller = wide(rule, chosen, layer_inputs=layer_inputs)
    assert needed(smaller) <= free
    check_fits(smaller, free)


def test_blocks_become_smaller_as_memory_does() -> None:
    rules = [fitting_blocks(wide(), free)[0] for free in (1 << 30, 290 << 20, 30 << 20, 1 << 10)]
    assert rules == ["global", "layer", "row", "global"]
    limited = wide(resources=Resources(row_memory=1000 * 4 * 300, chunk_memory=1 << 10))
    assert fitting_blocks(limited, 1 << 30) == ("row", 1000 * 4 * 300)


def test_stages_keep_their_rows_in_memory() -> None:
    size = wide(staged=True)
    assert size.alternatives == {}
    with pytest.raises(RowMemoryError, match="use fewer samples, or more of them in a row"):
        check_fits(size, 1 << 20)


def test_a_run_states_its_size_first_and_then_does_it() -> None:
    model = network()
    before = snapshot(model)
    size = plan(model, data(), sparsity=0.5, recipe=FEW)
    assert_untouched(model, before)
    report = prune(model, data(), sparsity=0.5, recipe=FEW, progress=False)
    assert (size.n, size.rows) == (report.n, report.rows)


def test_double_precision_counts_eight_bytes() -> None:
    size = plan(network(dtype=torch.float64), data(dtype=torch.float64), sparsity=0.5, recipe=FEW)
    assert size.row_bytes == 8 * 40 * N


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("500 MiB", 500 * 2**20), ("1e3", 1000), ("1.5k", 1500), ("7 b", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parsed(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 PB", "two", "nan", "1e999"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parsed(text)


def test_sizes_are_told_in_words() -> None:
    assert [readable(size) for size in (0, 1023, 1536, 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 MiB",
        "3.0 GiB",
    ]
