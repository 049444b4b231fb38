"""What a run states before it starts: sizes that are right, what does not fit refused, and no work done."""

from __future__ import annotations

import json
from copy import deepcopy
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
from cbs_opt.curvature.run_size import Way, _channel_numbers, check_fits, fitting, run_size, ways
from cbs_opt.errors import RowMemoryError, RowStoreError
from cbs_opt.network.partition import BlockRule
from cbs_opt.recipe.records import Recipe, Weights
from cbs_opt.recipe.select import GreedyOBS
from cbs_opt.system.memory import free_memory, parsed, readable
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
    assert size.needed_bytes >= max(size.arrays.values())
    assert size.changes == ()
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
    check_fits(size, size.needed_bytes)


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
    assert (size.rows, size.row_bytes) == (7, 4 * 7 * N)
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


def limited(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    class Memory:
        available = free

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


def test_a_run_that_exceeds_the_free_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, no_work: None
) -> None:
    model = network()
    before = snapshot(model)
    limited(monkeypatch, 1 << 20)
    with pytest.raises(RowMemoryError, match=r"where 1.0 MiB are free; prune a part"):
        prune(model, data(), sparsity=0.5, recipe=FEW)
    assert_untouched(model, before)


WIDE = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100)).eval()
SMALL_CHUNKS = Resources(chunk_memory=1 << 10)
ASKED = Way(blocks="global")
FREES = (1 << 31, 700 << 20, 400 << 20, 80 << 20, 30 << 20)


def wide(way: Way = ASKED, **options: Any) -> RunSize:
    partition = Partition.from_model(WIDE, blocks=way.blocks)
    curvature = EmpiricalFisher(samples=1000, per_row=way.per_row)
    resources = SMALL_CHUNKS
    if way.on_disk:
        largest = run_size(partition, curvature, resources=resources).largest_block_bytes
        resources = replace(resources, row_memory=largest)
    return run_size(partition, curvature, resources=resources, in_double=True, **options)


def chosen(free: int) -> tuple[Way, RunSize] | None:
    return fitting(ways(ASKED, 1000, cut=True, average=True, disk=True), wide, free)


@settings(max_examples=15, deadline=None)
@given(free=st.integers(1 << 10, 1 << 31))
def test_the_way_that_is_chosen_fits_and_strays_only_where_it_must(free: int) -> None:
    found = chosen(free)
    if wide().needed_bytes <= free:
        assert found == (ASKED, wide())
        return
    if found is None:
        least = min(wide(way).needed_bytes for way in ways(ASKED, 1000, cut=True, average=True, disk=True))
        assert least > free
        return
    way, size = found
    assert size.needed_bytes <= free
    check_fits(size, free)
    assert size.rows >= 16
    assert len(size.changes) == (way.blocks != "global") + (way.per_row > 1) + (size.row_dir is not None)
    with pytest.raises(RowMemoryError, match="where"):
        check_fits(size, size.needed_bytes - 1)


def test_ways_stray_further_as_memory_falls() -> None:
    found = [entry for entry in map(chosen, FREES) if entry is not None]
    assert found[0][0] == ASKED
    strays = [(way.blocks == "row", way.per_row) for way, _ in found]
    assert strays == sorted(strays)
    assert len({way for way, _ in found}) > 2
    order = list(ways(ASKED, 1000, cut=True, average=True, disk=True))
    assert order[1:4] == [
        Way(blocks="layer"),
        Way(blocks="layer", on_disk=True),
        Way(blocks="layer", per_row=2),
    ]
    assert max(way.per_row for way in order) == 32


def test_what_was_asked_for_is_never_changed() -> None:
    options = {"cut": False, "average": False, "disk": False}
    assert set(ways(ASKED, 1000, **options)) == {ASKED}
    by_rows = Way(blocks="row", per_row=4)
    assert {way.blocks for way in ways(by_rows, 250, cut=False, average=True, disk=True)} == {"row"}


def test_a_run_is_changed_to_fit_says_how_and_keeps_its_budget(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe(curvature=EmpiricalFisher(samples=320), layer_inputs=0.0, select=GreedyOBS())
    x = torch.randn(320, 300, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"sparsity": 0.5, "recipe": recipe, "resources": SMALL_CHUNKS}
    model = deepcopy(WIDE)
    whole = plan(model, (x, x[:, 0].long() % 3), **given)
    limited(monkeypatch, int(0.9 * whole.needed_bytes))
    size = plan(model, (x, x[:, 0].long() % 3), **given)
    assert any("blocks are cut" in change for change in size.changes)
    assert all(change in size.summary() for change in size.changes)
    y = (x[:, 0] > 0).long()
    report = prune(model, (x, y), progress=False, **given)
    assert report.notes == size.changes
    assert all(note in caplog.text and note in report.summary() for note in report.notes)
    assert (report.partition, report.rows, report.samples) == ("layer", size.rows, 320)
    assert report.n_prune == round(0.5 * report.n)


def test_what_the_caller_fixed_is_refused_with_what_would_fit(
    monkeypatch: pytest.MonkeyPatch, no_work: None
) -> None:
    rows = EmpiricalFisher(samples=320, per_row=2)
    recipe = Recipe(curvature=rows, weights=Weights(blocks="global"), layer_inputs=0.0)
    given: dict[str, Any] = {"sparsity": 0.5, "recipe": recipe, "resources": SMALL_CHUNKS}
    x = torch.zeros(320, 300)
    whole = plan(WIDE, (x, x[:, 0].long()), **given)
    limited(monkeypatch, whole.needed_bytes // 2)
    with pytest.raises(RowMemoryError, match=r'what would fit: blocks are cut by "layer"'):
        prune(WIDE, (x, x[:, 0].long()), **given)


def test_stages_keep_their_rows_in_memory() -> None:
    size = wide(Way(blocks="layer", on_disk=True), staged=True)
    assert (size.row_dir, size.row_memory) == (None, None)
    with pytest.raises(RowMemoryError, match="use fewer samples, or more of them in a row"):
        check_fits(size, 1 << 20)


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", "a", ("max", "current")),
        ("4:memory:/x", "memory", ("limit_in_bytes", "usage_in_bytes")),
    ],
)
def test_free_memory_heeds_the_limit_of_a_control_group(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str]
) -> None:
    groups, place = tmp_path / "cgroup", tmp_path / "fs" / folder
    place.mkdir(parents=True)
    groups.write_text(f"1:cpu:/\n{line}\n")
    for name, text in zip(("stat", *names), ("inactive_file 300\n", "5000", "1000"), strict=True):
        (place / f"memory.{name}").write_text(text)
    assert free_memory(groups, tmp_path / "fs") == 4300
    (place / f"memory.{names[0]}").write_text("max\n")
    assert free_memory(groups, tmp_path / "fs") > 1 << 20


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


@pytest.mark.parametrize("blocks", ["global", "layer", "row", 7])
def test_numbers_of_channels_are_those_of_the_largest_block(blocks: BlockRule) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 4))
    partition = Partition.from_model(model, blocks=blocks)
    fan_in = [span.fan_in for span in partition.parameters for _ in range(span.start, span.stop)]
    expected = max(sum(fan_in[block.start : block.stop]) for block in partition.blocks)
    assert _channel_numbers(partition) == expected
