"""Checking the certificates of a saved run without trusting the run that wrote them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbs_opt.certify.certificates import relative_gap
from cbs_opt.certify.files import CERTIFICATES, block_path
from cbs_opt.report.files import load_report
from cbs_opt.report.parts import BlockSummary, CertifiedSum, LayerSummary
from cbs_opt.report.record import PruneReport
from formulations.errors import ArgumentError, InstanceFormatError
from formulations.instances import read_instance
from formulations.problem import BlockProblem, BoolArray
from formulations.solution import BlockSolution
from formulations.support import NofM
from formulations.verification import Verdict, verify


@dataclass(frozen=True, kw_only=True)
class CheckedBlock:
    """One block after its check.

    `name`: of the block. `verdict`: OK if the data are those that were certified, the set is that of the
    masks and has its stated value, the evidence proves the stated bound, and the report says the same of
    block and run; UNCHECKED without masks. `objective` and `bound`: recomputed in float64. `proved`: whether
    the evidence alone proves the stated bound. `notes`: what is wrong or was not checked.
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
    contradictions = _contradictions(report)
    masks = _flat_masks(report)
    start = 0
    for number, (summary, solution) in enumerate(zip(report.blocks, report.certificates, strict=True)):
        problem = next(problems, None)
        if problem is None:
            raise ArgumentError("blocks", f"only {number}", "pass one for each certificate")
        keep = None if masks is None else masks[start : start + summary.n]
        start += summary.n
        differences = _differences(report, summary, solution, problem)
        yield _checked(summary, solution, problem, keep, [*differences, *contradictions])
    if blocks is not None and next(problems, None) is not None:
        raise ArgumentError("blocks", f"more than {len(report.blocks)}", "pass those of the report")


def _flat_masks(report: PruneReport) -> BoolArray | None:
    """Return the masks as one array in the order of the blocks; None if there are none."""
    if not report.masks:
        return None
    layers = [layer for layer in report.layers if layer.name in report.masks]
    flat = [
        (report.masks[layer.name].permute(layer.axes) if _ordered(layer) else report.masks[layer.name])
        .numpy()
        .ravel()
        for layer in layers
    ]
    return np.concatenate(flat) if flat else np.zeros(0, dtype=np.bool_)


def _ordered(layer: LayerSummary) -> bool:
    """Whether a layer states an order of its axes that can be one."""
    return bool(layer.axes) and sorted(layer.axes) == list(range(len(layer.shape)))


def _contradictions(report: PruneReport) -> list[str]:
    """Return what the report says of the run that its own blocks, layers and masks do not say."""
    wrong = []
    if report.certified != CertifiedSum.of(report.program, report.blocks):
        wrong.append("the certified sum is not that of the blocks")
    for name in ("n", "n_prune"):
        stated = getattr(report, name)
        parts = [sum(getattr(part, name) for part in part_of) for part_of in (report.blocks, report.layers)]
        if parts != [stated, stated]:
            wrong.append(f"{name} is {stated}, that of the blocks {parts[0]}, that of the layers {parts[1]}")
    wrong += [
        f"the axes of {layer.name} are {layer.axes}, which is no order of {len(layer.shape)}"
        for layer in report.layers
        if layer.axes and not _ordered(layer)
    ]
    if report.masks:
        stated_layers = {layer.name: (layer.shape, layer.n, layer.n_prune) for layer in report.layers}
        masks = {
            name: (tuple(keep.shape), keep.numel(), int((~keep).sum())) for name, keep in report.masks.items()
        }
        wrong += [
            f"the mask of {name} is not that of its layer"
            for name in sorted(masks.keys() | stated_layers.keys())
            if masks.get(name) != stated_layers.get(name)
        ]
    return wrong


def _differences(
    report: PruneReport, summary: BlockSummary, solution: BlockSolution, problem: BlockProblem
) -> list[str]:
    """Return what the report states of a block that its certificate or its data do not."""
    evidence = solution.certificate
    kind = None if evidence is None else evidence.kind
    n_fixed = None if evidence is None else evidence.n_fixed
    stated = {
        "program": (report.program, solution.program),
        "objective": (summary.objective, solution.objective),
        "bound": (summary.bound, solution.bound),
        "gap": (summary.gap, relative_gap(solution.objective, solution.bound)),
        "kind of certificate": (summary.certificate, kind),
        "number of fixed weights": (summary.n_fixed, n_fixed),
        "number of weights": (summary.n, problem.n),
        "number of pruned weights": (summary.n_prune, problem.n_prune),
        "name": (summary.name, problem.name or summary.name),
        "pattern": (report.pattern, str(problem.support) if isinstance(problem.support, NofM) else ""),
    }
    recipes = () if report.request is None else report.request.recipes
    if report.program == "joint" or not any(recipe.selection_damping is not None for recipe in recipes):
        stated["damping"] = (report.damping, problem.damping)
    return [
        f"the report states other values than the certificate: {name} {said!r}, not {found!r}"
        for name, (said, found) in stated.items()
        if said != found
    ]


def _read_blocks(directory: Path) -> Iterator[BlockProblem]:
    for number in itertools.count():
        path = block_path(directory, number)
        if not path.exists():
            remedy = "prune with block_dir (--save-blocks) to write the data of the blocks, or rebuild them"
            raise InstanceFormatError("directory", f"no {path.name} in {directory}", remedy)
        yield read_instance(path)[0]


def _checked(
    summary: BlockSummary,
    solution: BlockSolution,
    problem: BlockProblem,
    keep: BoolArray | None,
    wrong: list[str],
) -> CheckedBlock:
    """Return the verdict on a block of which `wrong` is already known."""
    fingerprint = problem.fingerprint()
    if fingerprint != summary.fingerprint:
        other = f"other data than were certified: fingerprint {fingerprint[:12]}..."
        return CheckedBlock(name=summary.name, verdict=Verdict.WRONG, notes=(other, *wrong))
    result = verify(problem, solution)
    if keep is not None and (solution.keep is None or not np.array_equal(keep, solution.keep)):
        wrong = [*wrong, "the certified set is not that of the masks"]
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
