"""Checking the certificates of a saved run without trusting the run that wrote them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbs_opt.certify.files import CERTIFICATES, block_path
from cbs_opt.report.files import load_report
from cbs_opt.report.parts import BlockSummary
from formulations.errors import ArgumentError, InstanceFormatError
from formulations.instances import read_instance
from formulations.problem import BlockProblem, BoolArray
from formulations.solution import BlockSolution
from formulations.verification import Verdict, verify


@dataclass(frozen=True, kw_only=True)
class CheckedBlock:
    """One block after its check.

    `name`: of the block. `verdict`: OK if the data are those that were certified, the set is that of the
    masks and has its stated value, and the evidence proves the stated bound. `objective` and `bound`:
    recomputed in float64. `proved`: whether the evidence alone proves the stated bound. `notes`: what is
    wrong or was not checked.
    """

    name: str
    verdict: Verdict
    objective: float | None = None
    bound: float | None = None
    proved: bool = False
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything was checked and holds."""
        return self.verdict is Verdict.OK


def check_certificates(
    directory: str | os.PathLike[str], blocks: Iterable[BlockProblem] | None = None
) -> Iterator[CheckedBlock]:
    """Check every certificate of a saved report, one block at a time.

    `directory`: where the report was saved. `blocks`: the blocks, built anew, in the order of the report. By
    default their files are read. Raises `ArgumentError` if the run was not certified, or there are more or
    fewer blocks than certificates; `ReportFormatError` or `InstanceFormatError` if there is no report, or a
    file is missing or damaged.
    """
    source = Path(directory)
    report = load_report(source)
    if not report.certificates:
        raise ArgumentError("directory", f"{directory} has no certificates", "prune with certify=True")
    if len(report.certificates) != len(report.blocks):
        counted = f"{len(report.certificates)} certificates for {len(report.blocks)} blocks in {directory}"
        raise ArgumentError("directory", counted, "save the report again")
    problems = _read_blocks(source / CERTIFICATES) if blocks is None else iter(blocks)
    # The masks as one flat array in the order of the blocks.
    flat = [report.masks[layer.name].cpu().numpy().ravel() for layer in report.layers if report.masks]
    masks = np.concatenate(flat) if flat else None
    start = 0
    for number, (summary, solution) in enumerate(zip(report.blocks, report.certificates, strict=True)):
        problem = next(problems, None)
        if problem is None:
            raise ArgumentError("blocks", f"only {number}", "pass one for each certificate")
        keep = None if masks is None else masks[start : start + summary.n]
        start += summary.n
        yield _checked(summary, solution, problem, keep)
    if blocks is not None and next(problems, None) is not None:
        raise ArgumentError("blocks", f"more than {len(report.blocks)}", "pass those of the report")


def _read_blocks(directory: Path) -> Iterator[BlockProblem]:
    for number in itertools.count():
        path = block_path(directory, number)
        if not path.exists():
            remedy = "prune with block_dir (--save-blocks) to write the data of the blocks, or rebuild them"
            raise InstanceFormatError("directory", f"no {path.name} in {directory}", remedy)
        yield read_instance(path)[0]


def _checked(
    summary: BlockSummary, solution: BlockSolution, problem: BlockProblem, keep: BoolArray | None
) -> CheckedBlock:
    fingerprint = problem.fingerprint()
    if fingerprint != summary.fingerprint:
        other = f"other data than were certified: fingerprint {fingerprint[:12]}..."
        return CheckedBlock(name=summary.name, verdict=Verdict.WRONG, notes=(other,))
    result = verify(problem, solution)
    wrong = []
    if (summary.objective, summary.bound) != (solution.objective, solution.bound):
        wrong.append("the report states other values than the certificate")
    if keep is not None and (solution.keep is None or not np.array_equal(keep, solution.keep)):
        wrong.append("the certified set is not that of the masks")
    verdict, notes = result.verdict, result.notes
    if keep is None:
        notes = (*notes, "the report has no masks to compare the set with")
        verdict = Verdict.WRONG if result.wrong else Verdict.UNCHECKED
    return CheckedBlock(
        name=summary.name,
        verdict=Verdict.WRONG if wrong else verdict,
        objective=result.objective,
        bound=result.bound,
        proved=result.bound_checked and not wrong,
        notes=(*wrong, *notes),
    )
