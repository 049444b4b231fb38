"""What a run states before it starts: sizes that are right, memory that is counted, and no work done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cbs_opt
from cbs_opt import PrunePlan, plan, prune
from cbs_opt.errors import RowMemoryError, RowStoreError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.plan.allocation_meter import extrapolated, peak_of
from cbs_opt.plan.working_set import BlockSize, score_bytes, update_bytes
from cbs_opt.select.joint_program.channel_program import joint_saliency
from cbs_opt.select.saliency import obs
from cbs_opt.system.sizes import parsed, readable
from cbs_opt.update.cbs import cbs_update
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

N = 6 * 8 + 8 * 3


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after its plan fails."""
    monkeypatch.setattr("cbs_opt.oneshot.streamed_rows", lambda *_, **__: pytest.fail("begun"))


@pytest.mark.usefixtures("no_work")
def test_a_plan_has_the_sizes_of_the_run_and_starts_nothing() -> None:
    model = network()
    before = snapshot(model)
    stated = plan(model, data(), sparsity=0.5, samples=40, samples_per_row=4, partition="layer", damping=0.1)
    assert (stated.n, stated.n_prune, stated.blocks) == (N, N // 2, 2)
    assert (stated.largest_block, stated.largest_block_n) == ("0.weight", 48)
    assert (stated.rows, stated.row_bytes, stated.largest_block_bytes) == (10, 4 * 10 * N, 4 * 10 * 48)
    assert (stated.row_dir, stated.disk_bytes, stated.candidates) == (None, 0, 1)
    assert stated.peak_bytes == stated.resident_bytes + max(stated.phases.values())
    assert stated.complete
    assert_untouched(model, before)
    assert json.loads(json.dumps(stated.to_dict())) == stated.to_dict()


@pytest.mark.usefixtures("no_work")
def test_rows_on_disk_are_stated_with_their_place(tmp_path: Path) -> None:
    stated = plan(
        network(),
        data(),
        sparsity=0.5,
        samples=40,
        partition="row",
        row_memory=4 * 40 * 8,
        row_dir=tmp_path,
        damping=[0.1, 0.2],
    )
    assert stated.row_dir == str(tmp_path)
    assert stated.disk_bytes >= stated.row_bytes
    assert stated.disk_free_bytes > 0
    assert stated.candidates == 2
    text = stated.summary()
    assert f"on disk in {tmp_path}" in text
    assert "peak memory: " in text
    assert readable(stated.peak_bytes) in text


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"curvature": "exact_fisher", "samples": 20}, 60),
        ({"samples": 1000}, 60),
        ({"samples": 30, "choice_samples": 5}, 30),
        ({"method": "magnitude", "program": "selection", "update": False}, 0),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_work")
def test_the_number_of_rows_is_known_before(options: dict[str, Any], rows: int) -> None:
    assert plan(network(), data(60), sparsity=0.5, damping=0.1, layer_inputs=0.0, **options).rows == rows


@pytest.mark.usefixtures("no_work")
def test_what_cannot_run_is_refused_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(RowMemoryError, match="cut blocks of at most"):
        plan(network(), data(), sparsity=0.5, samples=40, row_memory=4 * 40 * 8)
    with pytest.raises(RowStoreError, match="not a folder"):
        plan(
            network(),
            data(),
            sparsity=0.5,
            samples=40,
            partition="row",
            row_memory=4 * 40 * 8,
            row_dir=tmp_path / "none",
        )
    with pytest.raises(cbs_opt.CbsError, match="on_plan"):
        plan(network(), data(), sparsity=0.5, on_plan=print)
    with pytest.raises(TypeError, match="sparcity"):
        plan(network(), data(), sparcity=0.5)


def test_a_run_tells_its_plan_first_and_then_does_it() -> None:
    told: list[PrunePlan] = []
    model = network()
    before = snapshot(model)

    def listen(stated: PrunePlan) -> None:
        assert_untouched(model, before)
        told.append(stated)

    report = prune(model, data(), sparsity=0.5, samples=40, damping=0.1, on_plan=listen, progress=False)
    assert [stated.n_prune for stated in told] == [report.n_prune]


def test_a_method_of_unknown_memory_is_stated_as_such() -> None:
    stated = plan(
        network(), data(), sparsity=0.5, samples=40, damping=0.1, method="branch_and_bound", partition="row"
    )
    assert not stated.complete
    assert "at least" in stated.summary()


def test_the_meter_counts_what_is_alive_at_once() -> None:
    def run() -> Tensor:
        first = torch.zeros(1000)
        second = first.double()
        del first
        return second + 1.0

    assert peak_of(run) == 2 * 8000
    held = torch.zeros(1000)
    assert peak_of(lambda: held.add_(1.0).view(10, 100)) == 0


@pytest.mark.parametrize("available", [1, 2, 3, 4, 9])
def test_a_straight_line_is_carried_on(available: int) -> None:
    slope = 7 if available > 1 else 0
    assert extrapolated(lambda count: 100 * (available > 1) + slope * count, 50, available) in (450, 0)
    assert extrapolated(lambda count: 3 * count, 50, available) == 150
    assert extrapolated(lambda count: 3 * count, 1, available) == 3


def allocated(run: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at once, within operators too."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.kineto_results.events()
    live = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize(("m", "n"), [(150, 9000), (200, 1500)])
@pytest.mark.parametrize("what", ["obd", "obs", "joint", "update", "much updated"])
def test_working_sets_are_those_that_are_allocated(m: int, n: int, what: str) -> None:
    generator = torch.Generator().manual_seed(n)
    block = FisherBlock(
        name="b",
        weights=torch.randn(n, generator=generator),
        hessian=RowsHessian(torch.randn(m, n, generator=generator) / m**0.5),
        damping=0.1,
    )
    n_keep = n // 2 if what == "much updated" else n // 5
    keep = torch.arange(n) < n_keep
    size = BlockSize(n=n, n_keep=n_keep, m=m, itemsize=4, factors=0)
    run: Callable[[], object]
    if what.endswith("updated") or what == "update":
        stated, run = update_bytes("cbs", size), lambda: cbs_update(block, keep)
    else:
        score = {"obd": FisherBlock.diagonal, "obs": obs, "joint": joint_saliency}[what]
        stated, run = score_bytes(what, size), lambda: score(block)
    assert stated == pytest.approx(allocated(run), rel=0.15)


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


def test_double_precision_counts_eight_bytes() -> None:
    stated = plan(
        network(dtype=torch.float64), data(dtype=torch.float64), sparsity=0.5, samples=40, damping=0.1
    )
    assert stated.row_bytes == 8 * 40 * N
