"""What a run may use of the machine. Nothing here decides a result."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cbs_opt.system.checks import check_fields, path, whole_number

CHUNK_MEMORY = 1 << 28
"""Bytes for temporaries of the curvature by default: 256 MiB."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Workers, memory and disk for one run.

    Raises `ArgumentError` if a number is out of its range.

    Parameters
    ----------
    workers : int, optional
        Processes that solve blocks, for methods that take one block at a time. The backend is joblib's:
        ``with joblib.parallel_config(backend="dask"):`` sends them to a cluster. By default blocks are
        solved one after the other in this process.
    row_memory : int, optional
        Bytes that gradient rows may take in memory at a time. If all of them take more, they are written
        to a file, and every block has its rows in memory only while it is worked on.
    row_dir : path, optional
        Folder for that file; by default the system's place for temporary files.
    chunk_memory : int
        Bytes for temporaries of the curvature, besides the rows.
    """

    workers: int | None = None
    row_memory: int | None = None
    row_dir: str | os.PathLike[str] | None = None
    chunk_memory: int = CHUNK_MEMORY

    def __post_init__(self) -> None:
        check_fields(self, "resources.", whole_number, "workers", "row_memory", "chunk_memory")
        path("resources.row_dir", self.row_dir)


ORDINARY = Resources()
