"""Certificates on disk, and checking them again without trusting the run that wrote them.

In the directory of a saved report, ``certificates/`` has for block number ``i``

- ``<i>.certificate.npz``: the chosen set, its value, the bound and the evidence (a solution file of
  `formulations.instances`), written by `PruneReport.save`;
- ``<i>.block.npz``: the data of the block in float64, written by ``prune(..., block_dir=...)`` because it is
  as large as the gradient rows. Without it a checker builds the block anew: `cbs_opt.fisher_blocks` with the
  trained weights, the data and the settings in report.json, or from the very `GradientRows` of the run.

Either way the fingerprint in report.json says whether it is the same block, to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from formulations.errors import ArgumentError, InstanceFormatError
from formulations.instances import read_instance, read_solution, write_solution
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution
from formulations.verification import Verdict, verify

if TYPE_CHECKING:
    from cbs_opt.report.record import BlockSummary, PruneReport

CERTIFICATES = "certificates"
"""Directory within that of the report."""
BLOCK, CERTIFICATE = ".block.npz", ".certificate.npz"


def block_path(directory: str | os.PathLike[str], number: int) -> Path:
    """File of the data of a block."""
    return Path(directory) / f"{number:05d}{BLOCK}"


def certificate_path(directory: str | os.PathLike[str], number: int) -> Path:
    """File of the certified solution of a block."""
    return Path(directory) / f"{number:05d}{CERTIFICATE}"


def save_certificates(
    blocks: Sequence[BlockSummary], solutions: Sequence[BlockSolution], directory: Path
) -> None:
    """Write the certified solution of every block; those of another run are removed."""
    if directory.is_dir():
        for stale in directory.glob(f"*{CERTIFICATE}"):
            stale.unlink()
    if solutions:
        directory.mkdir(exist_ok=True)
    for number, (summary, solution) in enumerate(zip(blocks, solutions, strict=True) if solutions else ()):
        write_solution(certificate_path(directory, number), summary.fingerprint, solution)


def load_certificates(directory: Path) -> tuple[BlockSolution, ...]:
    """What `save_certificates` wrote, () if nothing."""
    return tuple(read_solution(path) for path in sorted(directory.glob(f"*{CERTIFICATE}")))


@dataclass(frozen=True, kw_only=True)
class CheckedBlock:
    """What checking one block found.

    Attributes
    ----------
    name : str
        Of the block.
    verdict : Verdict
        OK if the data are those that were certified, the set is that of the masks and has its stated
        value, and the evidence proves the stated bound.
    objective, bound : float or None
        Recomputed in float64.
    proved : bool
        Whether the evidence alone proves the stated bound.
    notes : tuple of str
        What is wrong or was not checked.
    """

    name: str
    verdict: Verdict
    objective: float | None
    bound: float | None
    proved: bool
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything was checked and holds."""
        return self.verdict is Verdict.OK


def check_certificates(
    directory: str | os.PathLike[str], blocks: Iterable[BlockProblem] | None = None
) -> Iterator[CheckedBlock]:
    """Check every certificate of a saved report, one block at a time.

    Parameters
    ----------
    directory : path
        Where the report was saved.
    blocks : iterable of BlockProblem, optional
        The blocks, built anew, in the order of the report. By default their files are read.

    Yields
    ------
    CheckedBlock

    Raises
    ------
    ReportFormatError
        If there is no report, or a damaged one.
    ArgumentError
        If the run was not certified, or there are more or fewer blocks than certificates.
    InstanceFormatError
        If a file is missing or damaged.
    """
    from cbs_opt.report.record import PruneReport

    report = PruneReport.load(Path(directory))
    if not report.certificates:
        raise ArgumentError("directory", f"{directory} has no certificates", "prune with certify=True")
    if len(report.certificates) != len(report.blocks):
        found = f"{len(report.certificates)} certificates for {len(report.blocks)} blocks in {directory}"
        raise ArgumentError("directory", found, "save the report again")
    masks = _masks_in_order(report)
    given = None if blocks is None else iter(blocks)
    start = 0
    for number, (summary, solution) in enumerate(zip(report.blocks, report.certificates, strict=True)):
        problem = _next_block(Path(directory) / CERTIFICATES, number, given)
        keep = None if masks is None else masks[start : start + summary.n]
        start += summary.n
        yield _checked(summary, solution, problem, keep)
    if given is not None and list(islice(given, 1)):
        raise ArgumentError("blocks", f"more than {len(report.blocks)}", "pass those of the report")


def _next_block(directory: Path, number: int, given: Iterator[BlockProblem] | None) -> BlockProblem:
    if given is not None:
        problem = next(given, None)
        if problem is None:
            raise ArgumentError("blocks", f"only {number}", "pass one for each certificate")
        return problem
    path = block_path(directory, number)
    if not path.exists():
        remedy = "prune with block_dir (--save-blocks) to write the data of the blocks, or rebuild them"
        raise InstanceFormatError("directory", f"no {path.name} in {directory}", remedy)
    return read_instance(path)[0]


def _masks_in_order(report: PruneReport) -> np.ndarray | None:
    """The masks of the report as one flat array in the order of the blocks."""
    if not report.masks:
        return None
    pieces = [report.masks[layer.name].cpu().numpy().ravel() for layer in report.layers]
    return np.concatenate(pieces)


def _checked(
    summary: BlockSummary, solution: BlockSolution, problem: BlockProblem, keep: np.ndarray | None
) -> CheckedBlock:
    fingerprint = problem.fingerprint()
    if fingerprint != summary.fingerprint:
        other = f"other data than were certified: fingerprint {fingerprint[:12]}..."
        return CheckedBlock(
            name=summary.name,
            verdict=Verdict.WRONG,
            objective=None,
            bound=None,
            proved=False,
            notes=(other,),
        )
    found = verify(problem, solution)
    wrong = []
    if (summary.objective, summary.bound) != (solution.objective, solution.bound):
        wrong.append("the report states other values than the certificate")
    if keep is not None and (solution.keep is None or not np.array_equal(keep, solution.keep)):
        wrong.append("the certified set is not that of the masks")
    verdict, notes = found.verdict, found.notes
    if keep is None:
        notes = (*notes, "the report has no masks to compare the set with")
        verdict = Verdict.WRONG if found.wrong else Verdict.UNCHECKED
    return CheckedBlock(
        name=summary.name,
        verdict=Verdict.WRONG if wrong else verdict,
        objective=found.objective,
        bound=found.bound,
        proved=found.bound_checked and not wrong,
        notes=(*wrong, *notes),
    )
