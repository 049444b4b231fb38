"""Sizes that decide how a swap search goes about its work, and not what it finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SwapTuning:
    """Sizes of a swap search on the selection program.

    Parameters
    ----------
    dense_limit : int
        Largest block whose whole Gram matrix is formed.
    batch_bytes : int
        Bytes of Gram matrices in one batch of small blocks.
    pool : int
        Weights in a pool.
    swaps_a_look : int
        Swaps within a pool between two looks at the clock.
    gathered : int
        Partners listed for one pruned weight; of one with more, a table over all partners is cheaper.
    cells : int
        Entries of the columns that are held in float64 at a time.
    scan_rows : int
        Pruned weights whose partners are scanned at a time.
    table_rows, table_columns : int
        Pruned and kept weights in a table of exact changes.
    partners : int
        Best partners that are kept of each weight in such a table.
    most_pairs : int
        Pairs that a sweep returns, the best ones.
    enough : int
        A sweep ends early once it has found this many improving pairs.
    compiled : bool
        Whether the kernels for the CPU are used there, and not those of other devices.
    """

    dense_limit: int = 2_048
    batch_bytes: int = 1 << 29
    pool: int = 2_048
    swaps_a_look: int = 128
    gathered: int = 32
    cells: int = 1 << 21
    scan_rows: int = 8_192
    table_rows: int = 1_024
    table_columns: int = 2_048
    partners: int = 16
    most_pairs: int = 65_536
    enough: int = 4_096
    compiled: bool = True


TUNING = SwapTuning()
