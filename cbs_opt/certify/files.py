"""Certificates on disk.

In the directory of a saved report, ``certificates/`` has for block number ``i``

- ``<i>.certificate.npz``: the chosen set, its value, the bound and the evidence (a solution file of
  `formulations.instances`), written by `save_report`;
- ``<i>.block.npz``: the data of the block in float64, written by ``prune(..., block_dir=...)`` because it is
  as large as the gradient rows. Without it a checker builds the block anew: `cbs_opt.fisher_blocks` with the
  trained weights, the data and the settings in report.json, or from the very `Rows` of the run.

Either way the fingerprint in report.json says whether it is the same block, to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from formulations.instances import read_solution, write_solution
from formulations.solution import BlockSolution

CERTIFICATES = "certificates"
"""Directory within that of the report."""
BLOCK, CERTIFICATE = ".block.npz", ".certificate.npz"


def block_path(directory: str | os.PathLike[str], number: int) -> Path:
    """Return the file of the data of a block."""
    return Path(directory) / f"{number:05d}{BLOCK}"


def certificate_path(directory: str | os.PathLike[str], number: int) -> Path:
    """Return the file of the certified solution of a block."""
    return Path(directory) / f"{number:05d}{CERTIFICATE}"


def save_certificates(
    fingerprints: Sequence[str], solutions: Sequence[BlockSolution], directory: Path
) -> None:
    """Write certified solutions with the fingerprints of their blocks; those of another run are removed."""
    if directory.is_dir():
        for stale in directory.glob(f"*{CERTIFICATE}"):
            stale.unlink()
    if not solutions:
        return
    directory.mkdir(exist_ok=True)
    for number, (fingerprint, solution) in enumerate(zip(fingerprints, solutions, strict=True)):
        write_solution(certificate_path(directory, number), fingerprint, solution)


def load_certificates(directory: Path) -> tuple[BlockSolution, ...]:
    """Read what `save_certificates` wrote, () if nothing."""
    return tuple(read_solution(path) for path in sorted(directory.glob(f"*{CERTIFICATE}")))
