"""Rows on disk: what is read is what was written, and nothing is left whatever goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cbs_opt.curvature.rows import RowsInMemory, RowsOnDisk, RowTarget, stored_bytes
from cbs_opt.errors import RowStoreError
from cbs_opt.network.partition import BlockSpan, ParameterSpan, Partition

CPU = torch.device("cpu")
Usage = namedtuple("Usage", "total used free")


def partition_of(sizes: list[int]) -> Partition:
    """Blocks of the given sizes, each a parameter of its own."""
    edges = torch.tensor([0, *sizes]).cumsum(0).tolist()
    pairs = list(pairwise(edges))
    return Partition(
        parameters=tuple(ParameterSpan(name=f"p{a}", shape=(b - a,), start=a, stop=b) for a, b in pairs),
        blocks=tuple(BlockSpan(name=f"b{a}", start=a, stop=b) for a, b in pairs),
    )


def store_of(partition: Partition, rows: int, folder: Path, dtype: torch.dtype = torch.float32) -> RowsOnDisk:
    return RowsOnDisk(
        partition, rows, dtype, CPU, folder=folder, buffer_bytes=3 * partition.n * dtype.itemsize
    )


def fill(target: RowTarget, rows: Tensor, pieces: list[int]) -> None:
    """Hand `rows` over in pieces of the given sizes, again and again."""
    done, turn = 0, 0
    while done < len(rows):
        space = target.space(min(pieces[turn % len(pieces)], len(rows) - done))
        assert len(space) >= 1
        space.copy_(rows[done : done + len(space)])
        target.commit(len(space))
        done, turn = done + len(space), turn + 1


def write_and_close(folder: Path) -> None:
    """The life of a store."""
    disk = store_of(partition_of([4, 5]), 6, folder)
    try:
        fill(disk, torch.ones(6, 9), [3])
        disk.scale(1.0, mean=False)
    finally:
        disk.close()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    count=st.integers(1, 23),
    spare=st.integers(0, 4),
    buffered=st.integers(1, 9),
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_what_is_read_is_what_memory_would_hold(
    sizes: list[int], count: int, spare: int, buffered: int, pieces: list[int], dtype: torch.dtype
) -> None:
    partition = partition_of(sizes)
    rows = torch.randn(count, partition.n, generator=torch.Generator().manual_seed(count), dtype=dtype)
    memory = RowsInMemory(torch.empty(count + spare, partition.n, dtype=dtype))
    row_bytes = partition.n * dtype.itemsize
    disk = RowsOnDisk(
        partition, count + spare, dtype, CPU, folder=None, buffer_bytes=buffered * row_bytes + row_bytes // 2
    )
    for target in (memory, disk):
        fill(target, rows, pieces)
        assert target.filled == count
    expected, found = (target.scale(0.37, mean=True) for target in (memory, disk))
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found, rows.mean(dim=0), rtol=tolerance, atol=tolerance)
    for span in partition.blocks:
        assert torch.equal(disk.block(span.start, span.stop), memory.rows[:, span.start : span.stop])
    disk.close()


def test_the_folder_stays_empty_and_tensors_outlive_the_store(tmp_path: Path) -> None:
    partition = partition_of([5, 6])
    disk = store_of(partition, 4, tmp_path)
    rows = torch.arange(44.0).view(4, 11)
    fill(disk, rows, [2])
    disk.scale(1.0, mean=False)
    block = disk.block(5, 11)
    assert list(tmp_path.iterdir()) == []
    disk.close()
    assert torch.equal(block, rows[:, 5:])
    with pytest.raises(RowStoreError, match="closed"):
        disk.block(5, 11)


def test_a_block_cannot_be_changed_through_its_tensor(tmp_path: Path) -> None:
    partition = partition_of([5, 6])
    disk = store_of(partition, 2, tmp_path)
    fill(disk, torch.ones(2, 11), [2])
    disk.scale(1.0, mean=False)
    disk.block(0, 5).zero_()
    assert bool((disk.block(0, 5) == 1.0).all())
    disk.close()


def test_writes_that_the_system_cuts_short_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, bytes(data[:7]), offset))
    partition = partition_of([9, 4])
    disk = store_of(partition, 6, tmp_path)
    rows = torch.randn(6, 13, generator=torch.Generator().manual_seed(2))
    fill(disk, rows, [4])
    disk.scale(1.0, mean=False)
    assert torch.equal(disk.block(0, 9), rows[:, :9])
    disk.close()


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(RowStoreError, match="nowhere is not a folder"):
        store_of(partition_of([4]), 2, tmp_path / "nowhere")


def test_a_full_disk_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = partition_of([4000])
    needed = stored_bytes(partition, 100, 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed - 1))
    with pytest.raises(RowStoreError, match=r"1\.5 MiB free .* needed"):
        store_of(partition, 100, tmp_path)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "can be written"), (errno.EACCES, "can be written")],
)
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "open"])
def test_what_the_system_refuses_is_named_and_leaves_no_file_open(
    code: int, remedy: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, call):
        pytest.skip(f"no {call} here")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(RowStoreError, match=remedy) as refused:
            write_and_close(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert isinstance(refused.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
