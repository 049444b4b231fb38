"""Tamper with solutions and run folders as a forger would, and see whether any of it passes as proved.

    python -m tests.stress.tamper --count 1000

Checksums are made anew wherever a forger could do that. What a check lets pass must still be true: exact
rational arithmetic (`tests.stress.exact`) decides whether the set has its size, the value is that of the
set, the bound is below the optimum and the gap is the one called met; what a report says of its run must be
what the run wrote. Anything else is a forgery that passed. Exit code 1 if there is any. Case `N` of seed `S`
is the same in every run: ``--only N --seed S`` repeats it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import nn
from torch.nn.functional import cross_entropy

from cbs_opt import CbsError, load_report, prune, save_masks
from cbs_opt.certify.files import CERTIFICATES, block_path, certificate_path
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.network.masks import load_masks
from cbs_opt.recipe.records import Certify, Recipe, Weights
from cbs_opt.recipe.select import SwapSearch
from cbs_opt.report.files import MASKS_FILE, REPORT_JSON, save_report
from cbs_opt.report.parts import CertifiedSum
from cbs_opt.report.verification import CheckedBlock, check_certificates
from formulations import BlockProblem, BlockSolution, Subject, Termination, Verdict, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.enumeration import enumerate_optimum
from formulations.errors import InstanceFormatError
from formulations.files import CHECKSUM, checksum, read_container, sealed_json
from formulations.incumbents import greedy
from formulations.instances import (
    SOLUTION_FORMAT,
    read_instance,
    read_solution,
    write_instance,
    write_solution,
)
from formulations.loss import objective, solved_weights
from formulations.problem import BoolArray, FloatArray
from formulations.relaxations import lower_bound
from formulations.relaxations.certificate import Fixing, RelaxationCertificate
from formulations.solution import relative_gap
from tests.stress.exact import ExactBlock

PROGRAMS = ("selection", "joint")
CLAIMED = ("program", "pattern", "damping", "n", "n_prune", "certified", "blocks", "layers")
"""What a report claims of its run and blocks; times, histograms and versions prove nothing."""
DESCRIPTIVE = (
    "rho",
    "effective_rank",
    "seconds",
    "status",
    "certificate_status",
    "certificate_seconds",
    "dtype",
)
"""The dtype of a parameter among them: the folder holds masks and float64 blocks, which do not say it."""
PREDICTED = ("selection_loss", "updated_loss", "initial_loss", "iterations", "locally_optimal")
HISTOGRAMS = ("weight_histogram_before", "weight_histogram_after")
RESULTS = ("refused", "wrong", "unchecked", "true", "passed")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one forgery.

    "refused" by a reader, found "wrong", left "unchecked", "true" as every claim still holds, or "passed".
    """

    number: int
    forgery: str
    result: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What is tampered with: blocks with solutions of every method, and a certified run on disk."""

    blocks: list[tuple[BlockProblem, ExactBlock]]
    solutions: list[tuple[int, BlockSolution]]
    folder: Path
    blocks_of_run: list[tuple[BlockProblem, ExactBlock]]
    claims: list[Any]


def subjects(home: Path) -> Subjects:
    """Make blocks, solutions and a run folder in `home`."""
    blocks, solutions = [], []
    for seed in range(3):
        rng = np.random.default_rng([seed, 7])
        n, gradient = 7, rng.normal(size=7) * 0.2 if seed == 1 else None
        rows = rng.normal(size=(9, n)) / 3.0
        model: dict[str, Any] = {"hessian": rows.T @ rows} if seed == 2 else {"rows": rows}
        problem = BlockProblem(
            weights=rng.normal(size=n), damping=0.05, n_prune=3, gradient=gradient, **model
        )
        blocks.append((problem, ExactBlock(problem)))
        for program in PROGRAMS:
            best = enumerate_optimum(problem, program)
            found = [best, branch_and_bound(problem, program), greedy(problem, program)]
            found.append(lower_bound(problem, program))
            found.append(lower_bound(problem, program, incumbent=best, fix=True))
            if program == "selection":
                found.append(lower_bound(problem, program, relaxation="rlt"))
            solutions += [(seed, solution) for solution in found]
    folder = home / "run"
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    report = prune(
        network,
        (torch.randn(40, 6), torch.arange(40) % 3),
        sparsity=0.5,
        loss_fn=cross_entropy,
        recipe=Recipe(
            curvature=EmpiricalFisher(samples=40),
            weights=Weights(blocks="row"),
            select=SwapSearch(program="joint"),
        ),
        certify=Certify(block_dir=folder / CERTIFICATES),
        progress=False,
    )
    save_report(report, folder)
    of_run = [read_instance(path)[0] for path in sorted((folder / CERTIFICATES).glob("*.block.npz"))]
    return Subjects(
        blocks=blocks,
        solutions=solutions,
        folder=folder,
        blocks_of_run=[(problem, ExactBlock(problem)) for problem in of_run],
        claims=_claims(folder),
    )


# Forged solutions: each takes the subjects, the number of a block and a solution, and gives a claim.

Forged = tuple[BlockProblem, BlockSolution]
SolutionForgery = Callable[[Subjects, int, BlockSolution, Generator], Forged]


def label(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """Another program, or one that does not exist."""
    other = {"selection": "joint", "joint": "selection"}[solution.program]
    return s.blocks[block][0], replace(solution, program=str(rng.choice([other, other, "both"])))


def label_throughout(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """Another program, with weights, objective and subject of the certificate to match."""
    problem = s.blocks[block][0]
    other = {"selection": "joint", "joint": "selection"}[solution.program]
    certificate = solution.certificate
    if certificate is not None:
        certificate = replace(certificate, subject=Subject.of(problem, other))  # type: ignore[type-var]
    return problem, replace(
        solution,
        program=other,
        certificate=certificate,
        weights=solved_weights(problem, solution.keep, other),
        objective=objective(problem, solution.keep, other),
    )


def status(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """Any other status, with any gap asked for."""
    others = [t for t in Termination if t is not solution.termination]
    termination = others[int(rng.integers(len(others)))]
    rel_gap = [None, 1e-9, 1e-6, 0.0, -1.0, math.inf, math.nan][int(rng.integers(7))]
    return s.blocks[block][0], replace(solution, termination=termination, rel_gap=rel_gap, limit=None)


def bound(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """A bound nearer to the objective, or above it."""
    value, old = solution.objective or 0.0, solution.bound or 0.0
    share = float(rng.choice([1e-9, 1e-6, 1e-3, 0.5, 1.0, 2.0]))
    forged = old + share * max(value - old, 1e-9 * abs(value))
    forged = [forged, value, 2.0 * abs(value), math.inf, math.nan][int(rng.choice(5, p=[0.6, *[0.1] * 4]))]
    return s.blocks[block][0], replace(solution, bound=forged)


def optimal(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """Called optimal, with a bound to match."""
    gap = float(rng.choice([0.0, 1e-9, 1e-6]))
    value = solution.objective or 0.0
    return s.blocks[block][0], replace(
        solution,
        termination=Termination.OPTIMAL,
        limit=None,
        rel_gap=gap,
        bound=value - gap * abs(value) * float(rng.random()),
    )


def value(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """A better objective than the set has."""
    old = solution.objective or 0.0
    forged = [old * (1.0 - 10.0 ** float(rng.uniform(-5, 0))), 0.0, -old, None, math.nan][
        int(rng.integers(5))
    ]
    return s.blocks[block][0], replace(solution, objective=forged)


def kept_set(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """Another set: of another size, or of the right size with or without the weights to match."""
    problem = s.blocks[block][0]
    keep = np.array(solution.keep)
    keep[rng.choice(np.flatnonzero(keep))] = False
    if rng.random() < 0.7:
        keep[rng.choice(np.flatnonzero(~keep))] = True
    if rng.random() < 0.5:
        return problem, replace(solution, keep=keep)
    return problem, replace(solution, keep=keep, weights=solved_weights(problem, keep, solution.program))


def weights(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """A pruned weight that is not zero, a kept one that moved, or no number."""
    moved = np.array(solution.weights)
    place = int(rng.integers(moved.size))
    moved[place] = float(rng.choice([1e-12, moved[place] + 1e-3, 1.0, math.nan, math.inf]))
    return s.blocks[block][0], replace(solution, weights=moved)


def other_certificate(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """The certificate of another solution, with its subject as it is or to match, and the bound it had."""
    donors = [other for _, other in s.solutions if other.certificate is not None]
    donor = donors[int(rng.integers(len(donors)))]
    certificate = donor.certificate
    if rng.random() < 0.5:
        subject = Subject.of(s.blocks[block][0], solution.program)
        certificate = replace(certificate, subject=subject)  # type: ignore[type-var]
    return s.blocks[block][0], replace(solution, certificate=certificate, bound=donor.bound)


def evidence(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """Changed arrays of the certificate, and the bound that they would give."""
    problem = s.blocks[block][0]
    certificate = _own(solution, rng)
    arrays = [
        f.name
        for f in dataclasses.fields(certificate)
        if isinstance(getattr(certificate, f.name), np.ndarray)
    ]
    name = str(rng.choice(arrays))
    changed = np.array(getattr(certificate, name), dtype=np.float64)
    if rng.random() < 0.5:
        changed *= float(rng.choice([1.0 + 1e-9, 1.001, 1.5, 1e3, -1.0, 0.0]))
    else:
        changed.flat[int(rng.integers(changed.size))] *= float(rng.choice([1.001, 1.5, 1e3, -1.0]))
    return problem, _claiming(problem, solution, replace(certificate, **{name: changed}), rng)


def fixings(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """More weights fixed than are proved, another cutoff, or a basis that proves nothing here."""
    problem = s.blocks[block][0]
    certificate = _own(solution, rng)
    fixing = certificate.fixing or Fixing.by_count(problem)
    keep, prune_ = np.array(fixing.keep), np.array(fixing.prune)
    kind = int(rng.integers(5))
    if kind == 0:
        free = np.flatnonzero(~keep & ~prune_)
        chosen = keep if rng.random() < 0.5 else prune_
        chosen[free[: 1 + int(rng.integers(3))]] = True
        fixing = Fixing(keep=keep, prune=prune_, cutoff=fixing.cutoff)
    elif kind == 1:
        fixing = Fixing(keep=prune_, prune=keep, cutoff=fixing.cutoff)
    elif kind == 2:
        fixing = replace(fixing, cutoff=float(rng.choice([math.inf, 1e3, 0.0, -1.0])))
    elif kind == 3:
        best = np.array(solution.keep)
        fixing = Fixing(keep=best, prune=~best, cutoff=math.inf)
    basis = replace(certificate, fixing=fixing, basis=None) if kind == 4 else certificate.basis
    forged = replace(certificate, fixing=fixing, basis=basis)
    if rng.random() < 0.5:
        forged = replace(forged, basis=replace(certificate, fixing=fixing, basis=None), fixing=None)
    return problem, _claiming(problem, solution, forged, rng)


def other_block(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """Another block, or this one with another count or damping, and a subject to match."""
    problem = s.blocks[block][0]
    choice = int(rng.integers(3))
    if choice == 0:
        problem = s.blocks[(block + 1 + int(rng.integers(2))) % len(s.blocks)][0]
    elif choice == 1:
        problem = replace(problem, n_prune=problem.n_prune + 1)
    else:
        problem = replace(problem, damping=2.0 * problem.damping)
    certificate = solution.certificate
    if certificate is not None and rng.random() < 0.7:
        certificate = replace(certificate, subject=Subject.of(problem, solution.program))  # type: ignore[type-var]
    return problem, replace(solution, certificate=certificate)


def stored(s: Subjects, block: int, solution: BlockSolution, rng: Generator) -> Forged:
    """A solution file with an edited header, its checksum as it was, made anew or deleted."""
    problem = s.blocks[block][0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.npz"
        write_solution(path, problem, solution)
        _edit_container(path, rng)
        return problem, read_solution(path, problem)


SOLUTIONS: tuple[SolutionForgery, ...] = (
    label,
    label_throughout,
    status,
    bound,
    optimal,
    value,
    kept_set,
    weights,
    other_certificate,
    evidence,
    evidence,
    fixings,
    fixings,
    other_block,
    stored,
)


def _own(solution: BlockSolution, rng: Generator) -> RelaxationCertificate:
    certificate = solution.certificate
    if not isinstance(certificate, RelaxationCertificate):
        raise InstanceFormatError("solution", "no certificate to forge", "take another")
    return certificate


def _claiming(
    problem: BlockProblem, solution: BlockSolution, certificate: RelaxationCertificate, rng: Generator
) -> BlockSolution:
    """Return a solution that claims what a forged certificate gives, or the better of that and the old."""
    forged = certificate.lower_bound(problem)
    if rng.random() < 0.3 or not math.isfinite(forged):
        forged = max(forged, solution.bound or forged) if math.isfinite(forged) else solution.bound
    gap = relative_gap(solution.objective, forged)
    done = gap <= 1e-6
    return replace(
        solution,
        certificate=certificate,
        bound=forged,
        termination=Termination.OPTIMAL if done else Termination.FEASIBLE,
        rel_gap=1e-6 if done else None,
    )


def judged_solution(problem: BlockProblem, solution: BlockSolution) -> tuple[str, str]:
    """Return what `verify` makes of a solution, set against exact arithmetic."""
    found = verify(problem, solution)
    lie = untrue(ExactBlock(problem), problem, solution)
    if found.bound_checked and lie.startswith("bound"):
        return "passed", f"bound called proved: {lie}"
    if found.verdict is Verdict.OK:
        return ("passed", lie) if lie else ("true", "")
    return ("wrong" if found.wrong else "unchecked"), "; ".join(found.notes)


def untrue(exact: ExactBlock, problem: BlockProblem, solution: BlockSolution) -> str:
    """Return a claim of a solution that is not so, "" if there is none."""
    if solution.program not in PROGRAMS:
        return f"program {solution.program}"
    optimum = exact.optimum(solution.program)
    assert optimum is not None
    bound = solution.bound
    if bound is not None and not (math.isfinite(bound) and Fraction(bound) <= optimum):
        return f"bound {bound!r} above the optimum {float(optimum)!r}"
    if solution.keep is None or solution.weights is None:
        return "" if solution.termination is Termination.NO_SOLUTION else "no set"
    if solution.termination in (Termination.INFEASIBLE, Termination.NO_SOLUTION):
        return "a set, called none"
    lie = _untrue_set(problem, solution.keep, solution.weights, solution.program)
    return lie or _untrue_value(exact.loss(solution.weights.tolist()), optimum, solution)


def _untrue_set(problem: BlockProblem, keep: BoolArray, weights: FloatArray, program: str) -> str:
    if int(keep.sum()) != problem.n_keep or bool((weights[~keep] != 0.0).any()):
        return "a set of another size"
    if not np.isfinite(weights).all():
        return "weights that are no numbers"
    moved = program == "selection" and bool((weights != problem.weights)[keep].any())
    return "a weight that moved" if moved else ""


def _untrue_value(loss: Fraction, optimum: Fraction, solution: BlockSolution) -> str:
    value, gap = solution.objective, solution.rel_gap
    if value is None or not math.isfinite(value) or abs(loss - Fraction(value)) > abs(loss) / 10**6:
        return f"objective {value!r} of a set of value {float(loss)!r}"
    if solution.termination is Termination.OPTIMAL:
        if gap is None or not 0.0 <= gap < math.inf:
            return f"a gap of {gap} met"
        if loss - optimum > abs(loss) * (Fraction(gap) + Fraction(1, 10**12)):
            return "optimal, and is not"
    return ""


# Forged run folders: each changes a copy of the folder in place.

FolderForgery = Callable[[Path, Generator], None]


def report_value(folder: Path, rng: Generator) -> None:
    """One value in report.json, with its checksum made anew."""
    document = report_of(folder)
    _change_claim(document, rng)
    write_report(folder, document)


def report_unsealed(folder: Path, rng: Generator) -> None:
    """One value in report.json, its checksum deleted or as it was."""
    document = json.loads((folder / REPORT_JSON).read_text())
    _change_claim(document, rng)
    if rng.random() < 0.5:
        del document[CHECKSUM]
    (folder / REPORT_JSON).write_text(json.dumps(document, indent=1))


def report_line(folder: Path, rng: Generator) -> None:
    """A line of report.json deleted, the checksum's line among them."""
    lines = (folder / REPORT_JSON).read_text().splitlines()
    places = (
        [i for i, line in enumerate(lines) if CHECKSUM in line] if rng.random() < 0.3 else range(len(lines))
    )
    del lines[int(rng.choice(list(places)))]
    if rng.random() < 0.5:
        lines[-2] = lines[-2].rstrip(",")
    (folder / REPORT_JSON).write_text("\n".join(lines))


def bound_throughout(folder: Path, rng: Generator) -> None:
    """A higher bound in certificate, block and sum alike, and perhaps optimal."""
    number, solution, document = _block_and_report(folder, rng)
    old, best = solution.bound or 0.0, solution.objective or 0.0
    raised = old + float(rng.choice([1e-6, 0.1, 0.5, 1.0])) * max(best - old, 1e-6 * abs(best))
    done = raised >= best * (1.0 - 1e-6)
    _write_claim(
        folder,
        number,
        replace(
            solution,
            bound=raised,
            termination=Termination.OPTIMAL if done else solution.termination,
            rel_gap=1e-6 if done else solution.rel_gap,
        ),
        document,
    )


def program_throughout(folder: Path, rng: Generator) -> None:
    """The other program in report and sum, and perhaps in every certificate."""
    document = report_of(folder)
    document["program"] = document["certified"]["program"] = "selection"
    if rng.random() < 0.5:
        for number in range(len(document["blocks"])):
            path = certificate_path(folder / CERTIFICATES, number)
            solution = read_solution(path)
            write_solution(
                path, document["blocks"][number]["fingerprint"], replace(solution, program="selection")
            )
    write_report(folder, document)


def certificate_value(folder: Path, rng: Generator) -> None:
    """A value in a certificate's header, its checksum as it was, made anew or deleted."""
    path = certificate_path(folder / CERTIFICATES, int(rng.integers(_count(folder))))
    _edit_container(path, rng)


def swapped(folder: Path, rng: Generator) -> None:
    """Certificates, blocks or both of two blocks exchanged, and perhaps their summaries."""
    first, second = rng.choice(_count(folder), size=2, replace=False)
    kinds = [certificate_path, block_path]
    for path in kinds if rng.random() < 0.5 else [kinds[int(rng.integers(2))]]:
        one, other = (path(folder / CERTIFICATES, int(i)) for i in (first, second))
        content = one.read_bytes(), other.read_bytes()
        other.write_bytes(content[0])
        one.write_bytes(content[1])
    if rng.random() < 0.5:
        document = report_of(folder)
        blocks = document["blocks"]
        blocks[first], blocks[second] = blocks[second], blocks[first]
        if rng.random() < 0.5:
            blocks[first]["name"], blocks[second]["name"] = blocks[second]["name"], blocks[first]["name"]
        write_report(folder, document)


def masks(folder: Path, rng: Generator) -> None:
    """Masks that are not those of the run: one weight exchanged, a layer left out, or a name changed."""
    forged = {name: keep.clone() for name, keep in load_masks(folder / MASKS_FILE).items()}
    name = str(rng.choice(sorted(forged)))
    kind = int(rng.integers(3))
    if kind == 0:
        flat = forged[name].view(-1)
        flat[int(rng.integers(flat.numel()))] ^= True
    elif kind == 1:
        del forged[name]
    else:
        forged["other"] = forged.pop(name)
    save_masks(folder / MASKS_FILE, forged)


def masks_bytes(folder: Path, rng: Generator) -> None:
    """A byte of the masks flipped, the checksum's entry renamed, or no masks at all."""
    path = folder / MASKS_FILE
    content = bytearray(path.read_bytes())
    kind = int(rng.integers(3))
    if kind == 0:
        content[-1 - int(rng.integers(20))] ^= 1
    elif kind == 1:
        content = bytearray(bytes(content).replace(b'"checksum"', b'"checksun"'))
    path.write_bytes(bytes(content))
    if kind == 2:
        path.unlink()


def data(folder: Path, rng: Generator) -> None:
    """Other data of a block, with the fingerprint in block, certificate and report made anew."""
    number, solution, document = _block_and_report(folder, rng)
    path = block_path(folder / CERTIFICATES, number)
    problem, metadata = read_instance(path)
    changed = replace(problem, damping=problem.damping * float(rng.choice([0.5, 1.001, 10.0])))
    write_instance(path, changed, metadata)
    document["blocks"][number]["fingerprint"] = changed.fingerprint()
    certificate = solution.certificate
    if certificate is not None:
        certificate = replace(certificate, subject=Subject.of(changed, solution.program))  # type: ignore[type-var]
    _write_claim(folder, number, replace(solution, certificate=certificate), document)


def missing(folder: Path, rng: Generator) -> None:
    """A file of the run deleted."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".npz", ".json", ".safetensors"))
    files[int(rng.integers(len(files)))].unlink()


FOLDERS: tuple[FolderForgery, ...] = (
    report_value,
    report_value,
    report_unsealed,
    report_line,
    bound_throughout,
    program_throughout,
    certificate_value,
    swapped,
    masks,
    masks_bytes,
    data,
    missing,
)


def report_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / REPORT_JSON).read_text())
    document.pop(CHECKSUM)
    return document


def write_report(folder: Path, document: dict[str, Any]) -> None:
    (folder / REPORT_JSON).write_bytes(sealed_json(document))


def _count(folder: Path) -> int:
    return len(list((folder / CERTIFICATES).glob("*.block.npz")))


def _block_and_report(folder: Path, rng: Generator) -> tuple[int, BlockSolution, dict[str, Any]]:
    number = int(rng.integers(_count(folder)))
    return number, read_solution(certificate_path(folder / CERTIFICATES, number)), report_of(folder)


def _write_claim(folder: Path, number: int, solution: BlockSolution, document: dict[str, Any]) -> None:
    """Write a forged solution, and a report whose block and sum say the same."""
    block = document["blocks"][number]
    write_solution(certificate_path(folder / CERTIFICATES, number), block["fingerprint"], solution)
    block |= {"bound": solution.bound, "objective": solution.objective}
    block["gap"] = relative_gap(solution.objective, solution.bound)
    write_report(folder, document)
    total = CertifiedSum.of(document["program"], load_report(folder).blocks)
    document["certified"] = dataclasses.asdict(total)
    write_report(folder, document)


def _change_claim(document: dict[str, Any], rng: Generator) -> None:
    """Change one thing that a report claims."""
    name = str(rng.choice(CLAIMED))
    place: Any = document
    key: Any = name
    if name in ("blocks", "layers"):
        place = document[name][int(rng.integers(len(document[name])))]
        names = [k for k in place if k not in (*DESCRIPTIVE, *PREDICTED, *HISTOGRAMS)]
        key = str(rng.choice(names))
    elif name == "certified":
        place, key = document[name], str(rng.choice(list(document[name])))
    old = place[key]
    if isinstance(old, bool) or old is None:
        place[key] = 1.0
    elif isinstance(old, int):
        place[key] = old + int(rng.choice([-1, 1]))
    elif isinstance(old, float):
        place[key] = old * float(rng.choice([0.5, 1.0 + 1e-6, 2.0])) + 1e-9
    elif isinstance(old, str):
        place[key] = "selection" if key == "program" else f"{old}x"
    else:
        place[key] = old[::-1] if len(old) > 1 else [*old, 0]


def _edit_container(path: Path, rng: Generator) -> None:
    """Change a claim in the header of a solution file; the checksum is wrong, made anew or gone."""
    header, arrays = read_container(path, SOLUTION_FORMAT, 2, 2**24)
    name = str(rng.choice(["bound", "objective", "program", "termination", "rel_gap"]))
    old = header[name]
    if name == "program":
        header[name] = "joint" if old == "selection" else "selection"
    elif name == "termination":
        header[name] = str(rng.choice([t.value for t in Termination if t.value != old]))
    else:
        header[name] = (old or 0.0) * 1.001 + 1e-3
    seal = int(rng.integers(3))
    fresh = checksum(header, arrays)
    if seal < 2:
        header[CHECKSUM] = fresh if seal else "0" * 64
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, header=text, **arrays)


def _claims(folder: Path) -> list[Any]:
    report = load_report(folder)
    skipped = (*DESCRIPTIVE, *PREDICTED)
    blocks = [{k: v for k, v in vars(block).items() if k not in skipped} for block in report.blocks]
    layers = [{k: v for k, v in vars(layer).items() if k not in HISTOGRAMS} for layer in report.layers]
    kept = {name: keep.tolist() for name, keep in report.masks.items()}
    whole = [getattr(report, name) for name in ("program", "damping", "n", "n_prune")]
    return [*whole, vars(report.certified), blocks, layers, kept]


def judged_folder(s: Subjects, folder: Path) -> tuple[str, str]:
    """Return what the check of a run makes of a folder, set against the run and exact arithmetic."""
    checked: list[CheckedBlock] = list(check_certificates(folder))
    verdicts = {block.verdict for block in checked}
    notes = "; ".join(note for block in checked for note in block.notes)
    if Verdict.WRONG in verdicts:
        return "wrong", notes
    if Verdict.UNCHECKED in verdicts:
        return "unchecked", notes
    lies = [
        untrue(exact, problem, solution)
        for (problem, exact), solution in zip(s.blocks_of_run, load_report(folder).certificates, strict=True)
    ]
    if any(lies):
        return "passed", "; ".join(filter(None, lies))
    return ("true", "") if _claims(folder) == s.claims else ("passed", "the report says other than the run")


def tamper(count: int, seed: int = 0, *, only: int | None = None) -> Iterator[Outcome]:
    """Make and judge `count` forgeries, or the one with number `only`."""
    with tempfile.TemporaryDirectory() as home:
        made = subjects(Path(home))
        yield from judged(made, Path(home), range(count) if only is None else [only], seed)


def judged(s: Subjects, home: Path, numbers: Iterable[int], seed: int = 0) -> Iterator[Outcome]:
    """Make and judge the forgeries with these numbers; `home` is where forged folders are put."""
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        name, judge = _case(s, home, number, rng)
        try:
            result, note = judge()
        except CbsError as error:
            result, note = "refused", str(error)
        yield Outcome(number=number, forgery=name, result=result, note=note)


def copied(folder: Path, copy: Path) -> Path:
    """Return a copy of a folder in place of what is there."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def _case(s: Subjects, home: Path, number: int, rng: Generator) -> tuple[str, Callable[[], tuple[str, str]]]:
    if number % 5 < 3:
        forge = SOLUTIONS[int(rng.integers(len(SOLUTIONS)))]
        certified = [pair for pair in s.solutions if pair[1].certificate is not None]
        pool = certified if forge in (evidence, fixings) else s.solutions
        block, solution = pool[int(rng.integers(len(pool)))]
        return f"solution: {forge.__name__}", lambda: judged_solution(*forge(s, block, solution, rng))
    spoil = FOLDERS[int(rng.integers(len(FOLDERS)))]

    def judge() -> tuple[str, str]:
        copy = copied(s.folder, home / "forged")
        spoil(copy, rng)
        return judged_folder(s, copy)

    return f"run: {spoil.__name__}", judge


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the count of each result by kind of forgery, as text."""
    counts = Counter((outcome.forgery, outcome.result) for outcome in outcomes)
    names = sorted({outcome.forgery for outcome in outcomes})
    lines = [f"{'forgery':30}" + "".join(f"{result:>11}" for result in RESULTS)]
    for name in (*names, "all"):
        row = [
            sum(n for (f, r), n in counts.items() if r == result and name in (f, "all")) for result in RESULTS
        ]
        lines.append(f"{name:30}" + "".join(f"{n:11d}" for n in row))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the forgeries asked for and print a table; 1 if any passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000, help="forgeries (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case to repeat")
    given = parser.parse_args(arguments)
    outcomes = list(tamper(given.count, given.seed, only=given.only))
    passed = [o for o in outcomes if o.result == "passed"]
    lines = [
        table(outcomes),
        *(f"passed, case {o.number} ({o.forgery}): {o.note[:300]}" for o in passed[:40]),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
