"""Pruning with rows on disk: the same networks, little memory, and nothing left after a failure."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbs_opt
from cbs_opt import (
    CbsError,
    EmpiricalFisher,
    ExactFisher,
    MonteCarloFisher,
    Partition,
    Resources,
    Rows,
    SketchedFisher,
    gradient_rows,
    prune,
)
from cbs_opt.curvature.kinds import Fisher
from cbs_opt.curvature.rows import RowsOnDisk
from cbs_opt.errors import RowMemoryError, RowStoreError
from cbs_opt.recipe.records import Recipe, Update, Weights, absolute
from cbs_opt.recipe.select import (
    OBD,
    OBS,
    GradientNorm,
    GreedyOBS,
    HardThreshold,
    Magnitude,
    SwapSearch,
)
from tests.cbs_opt.recipes import arguments
from tests.cbs_opt.small_network import assert_untouched, snapshot
from tests.cbs_opt.small_network import data as small_data
from tests.cbs_opt.small_network import network as small_network

SAMPLES = 90
LARGEST = 40 * 30
"""Weights of the largest layer."""
AT_ONCE = 4
"""Blocks that may be open at once: the one at hand, its neighbours, and one that a loop has not let go of."""


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 4)).eval()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(160, 30, generator=generator), torch.randint(0, 4, (160,), generator=generator)


def pruned(row_memory: int | None, **options: Any) -> tuple[Tensor, cbs_opt.PruneReport]:
    model = network()
    fields: dict[str, Any] = {"curvature": EmpiricalFisher(samples=SAMPLES), "damping": absolute(1e-3)}
    resources = Resources(row_memory=row_memory)
    given = arguments(**{"sparsity": 0.7} | fields | options)
    report = prune(model, data(), resources=resources, progress=False, **given)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), report


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of blocks that were in memory at once, whenever one came in."""
    seen: list[int] = []
    live: list[None] = []
    mapped = RowsOnDisk._mapped

    def counted(self: RowsOnDisk, start: int, stop: int) -> Tensor:
        rows = mapped(self, start, stop)
        live.append(None)
        seen.append(len(live))
        weakref.finalize(rows.untyped_storage(), live.pop)
        return rows

    monkeypatch.setattr(RowsOnDisk, "_mapped", counted)
    return seen


ROW, LAYER = Weights(blocks="row"), Weights(blocks="layer")
SELECTION: list[dict[str, Any]] = [
    {"select": OBD(program="selection"), "weights": ROW},
    {"select": OBS(program="selection"), "weights": Weights(blocks=150)},
    {"select": GradientNorm(program="selection"), "weights": LAYER},
    {"select": SwapSearch(program="selection"), "weights": LAYER},
    {"select": SwapSearch(program="selection"), "weights": ROW},
]
OTHERS: list[dict[str, Any]] = [
    {"select": Magnitude(), "weights": LAYER, "gradient": True},
    {"select": OBS(), "weights": Weights(blocks=150, budget="uniform"), "update": "independent"},
    {"select": SwapSearch(program="selection"), "weights": LAYER, "layer_inputs": 1.0},
    {"select": SwapSearch(), "weights": LAYER, "layer_inputs": 0.0},
    {"select": SwapSearch(), "weights": LAYER, "layer_inputs": 1.0},
    {"select": SwapSearch(), "weights": Weights(blocks=150), "gradient": True},
    {"select": GreedyOBS(), "weights": LAYER, "layer_inputs": 1.0},
    {"select": GreedyOBS(), "weights": LAYER, "layer_inputs": 0.0},
    {"select": HardThreshold(), "weights": Weights(blocks=700), "layer_inputs": 0.0},
    {
        "recipe": Recipe.grid(
            Recipe(
                curvature=EmpiricalFisher(samples=SAMPLES),
                select=SwapSearch(),
                weights=LAYER,
                selection_damping=0.3,
                choice_samples=60,
            ),
            damping=[0.1, 0.5],
            update=[Update(scale=0.5), Update(scale=1.0)],
        )
    },
    {
        "select": OBS(),
        "weights": LAYER,
        "sparsity": {"0.weight": 0.5, "*": 0.8},
        "curvature": EmpiricalFisher(samples=SAMPLES, per_row=3),
    },
    {
        "select": OBD(),
        "weights": LAYER,
        "curvature": MonteCarloFisher(samples=SAMPLES),
        "gradient": True,
    },
    {"select": OBD(), "weights": LAYER, "curvature": SketchedFisher(samples=SAMPLES, per_row=2)},
    {"select": OBS(), "weights": Weights(blocks=50), "certify": True, "layer_inputs": 0.0},
]


@pytest.mark.parametrize(
    "options", SELECTION + OTHERS, ids=lambda options: "-".join(map(str, options.values()))[:60]
)
def test_the_network_is_that_of_rows_in_memory_to_the_bit(options: dict[str, Any], stored: list[int]) -> None:
    expected, in_memory = pruned(None, **options)
    assert not stored
    rows = SAMPLES // getattr(options.get("curvature"), "per_row", 1)
    found, on_disk = pruned(4 * rows * LARGEST, **options)
    assert stored
    assert max(stored) <= AT_ONCE
    assert torch.equal(found, expected)
    assert on_disk.predicted_loss_increase == in_memory.predicted_loss_increase
    assert [block.n_prune for block in on_disk.blocks] == [block.n_prune for block in in_memory.blocks]
    assert on_disk.rows == in_memory.rows == rows
    assert on_disk.certified == in_memory.certified


@pytest.mark.parametrize(
    ("curvature", "chunk_memory"),
    [
        (EmpiricalFisher(samples=SAMPLES), 1 << 28),
        (EmpiricalFisher(samples=SAMPLES), 1),
        (EmpiricalFisher(samples=SAMPLES, per_row=7), 1 << 28),
        (EmpiricalFisher(samples=SAMPLES, vectorize=False), 1 << 28),
        (EmpiricalFisher(samples=1000), 1 << 28),
        (ExactFisher(samples=SAMPLES), 1 << 28),
        (MonteCarloFisher(samples=SAMPLES), 1 << 28),
        (SketchedFisher(samples=SAMPLES, per_row=4), 1 << 28),
    ],
    ids=str,
)
def test_rows_and_gradient_are_those_of_memory_to_the_bit(
    curvature: Fisher, chunk_memory: int, tmp_path: Path
) -> None:
    model, loss = network(), nn.functional.cross_entropy
    partition = Partition.from_model(model, blocks=170)

    def rows(row_memory: int | None) -> Rows:
        resources = Resources(row_memory=row_memory, row_dir=tmp_path, chunk_memory=chunk_memory)
        return gradient_rows(
            model, data(), loss, partition, curvature=curvature, resources=resources, progress=False
        )

    whole = rows(None)
    with rows(whole.rows.nbytes // 3) as stored:
        assert stored.on_disk
        assert not whole.on_disk
        assert list(tmp_path.iterdir()) == []
        assert stored.shape == whole.shape
        assert (stored.samples, stored.curvature) == (whole.samples, whole.curvature)
        assert torch.equal(stored.gradient, whole.gradient)
        assert torch.equal(stored.rows, whole.rows)
        for block in partition.blocks:
            assert torch.equal(stored.block(block.start, block.stop), whole.block(block.start, block.stop))
        torch.testing.assert_close(stored.column_squares(), whole.column_squares(), rtol=1e-14, atol=0.0)


def test_rows_that_fit_stay_in_memory() -> None:
    model = network()
    partition = Partition.from_model(model, blocks="global")
    size = 4 * 20 * partition.n
    for limit in (None, size):
        rows = gradient_rows(
            model,
            data(),
            nn.functional.cross_entropy,
            partition,
            curvature=EmpiricalFisher(samples=20),
            resources=Resources(row_memory=limit),
            progress=False,
        )
        assert not rows.on_disk


def test_rows_on_disk_serve_several_runs_and_stay_open(stored: list[int]) -> None:
    model = network()
    partition = Partition.from_model(model, blocks="layer")
    limit = 4 * SAMPLES * LARGEST
    rows = gradient_rows(
        model,
        data(),
        nn.functional.cross_entropy,
        partition,
        curvature=EmpiricalFisher(samples=SAMPLES),
        resources=Resources(row_memory=limit),
        progress=False,
    )
    assert rows.on_disk
    for select in ("obd", "obs"):
        expected, _ = pruned(None, select=select, weights=LAYER, layer_inputs=0.0)
        found, _ = pruned(None, select=select, weights=LAYER, layer_inputs=0.0, curvature=rows)
        assert torch.equal(found, expected)
    with pytest.raises(CbsError, match="in other blocks"):
        pruned(None, select="obd", weights=ROW, curvature=rows)
    rows.close()
    with pytest.raises(RowStoreError, match="closed"):
        pruned(None, select="obd", weights=LAYER, curvature=rows)


@pytest.mark.parametrize("partition", ["global", "layer", 1000])
def test_a_block_that_does_not_fit_is_refused_with_the_size_that_does(partition: str | int) -> None:
    model = network()
    before = snapshot(model)
    recipe = Recipe(curvature=EmpiricalFisher(samples=SAMPLES), weights=Weights(blocks=partition))
    resources = Resources(row_memory=4 * SAMPLES * 100)
    with pytest.raises(RowMemoryError, match="cut blocks of at most 100 weights"):
        prune(model, data(), sparsity=0.5, recipe=recipe, resources=resources)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2GB"])
def test_a_budget_that_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(CbsError, match=r"resources\.row_memory"):
        Resources(row_memory=value)


def test_stages_keep_their_rows_in_memory() -> None:
    with pytest.raises(CbsError, match="row_memory: given for a run in stages"):
        prune(network(), data(), sparsity=0.5, stages=2, resources=Resources(row_memory=1000))


def failing(call: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose call of that number raises."""
    made = 0

    def run(*arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        if made == call:
            raise error
        return function(*arguments, **options)

    return run


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("where", ["write", "read"])
def test_after_a_failure_the_network_is_as_it_was_and_no_file_is_left(
    kind: type[BaseException], call: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, error = small_network(), kind(28, "No space left on device")
    recipe = Recipe(curvature=EmpiricalFisher(samples=30), weights=ROW, select=OBS(), damping=absolute(0.1))
    before = snapshot(model)
    open_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with monkeypatch.context() as patched:
        if where == "write":
            patched.setattr(os, "pwrite", failing(call, error, os.pwrite))
        else:
            patched.setattr(RowsOnDisk, "_mapped", failing(call, error, RowsOnDisk._mapped))
        with pytest.raises((RowStoreError, OSError, KeyboardInterrupt)) as raised:
            prune(
                model,
                small_data(),
                sparsity=0.5,
                recipe=recipe,
                resources=Resources(row_memory=4 * 30 * 10, row_dir=tmp_path),
                progress=False,
            )
    if where == "write" and kind is OSError:
        assert isinstance(raised.value, RowStoreError)
        assert "No space left" in str(raised.value)
    assert_untouched(model, before)
    assert list(tmp_path.iterdir()) == []
    # The exception has frames in which blocks of rows are still open.
    del raised, error
    gc.collect()
    if open_files:
        assert len(os.listdir("/proc/self/fd")) == open_files
