"""How far from optimal the rows of a layer can be: bounds for a random sample of them.

Each row is the joint program of its weights over the layer's Hessian. `formulations.relaxations` proves in
float64 that no new weights of its support lose less than the bound. What a layer reports from there are
figures of the rows that were drawn, and an interval for the mean over all of its rows: the sample is random,
the bounds are proved, the interval is statistics. It is a statement about the layer program, not about the
loss of the network.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from cbs_opt.certify.certificates import relative_gap
from cbs_opt.select.layer_program.program import LayerProgram
from cbs_opt.system.checks import RUN_SEEDS, check_fields, finite_number, path, seed_number, whole_number
from formulations.errors import ArgumentError
from formulations.files import read_container, write_container
from formulations.instances import read_solution, write_solution
from formulations.loss import objective, solved_weights
from formulations.problem import BlockProblem, BoolArray, FloatArray
from formulations.relaxations import lower_bounds
from formulations.solution import BlockSolution, Limit, Limits, stated_support
from formulations.support import Support, support_from_json
from formulations.verification import verify

CONFIDENCE = 0.95
PROGRAM = "joint"
KIND = "cbs-opt bounded rows"
DATA = ".rows.npz"
VERSION = 1
MOST_BYTES = 2**36
TOLERANCE = 1e-7
"""Relative difference of two computations of one figure that is rounding."""


@dataclass(frozen=True, kw_only=True)
class RowSample:
    """Which rows of every layer are bounded.

    Raises `ArgumentError` if a field is out of its range.

    Parameters
    ----------
    rows : int, default 8
        Drawn without replacement; all, if a layer has no more.
    seed : int, default 0
    time_limit : float, optional
        Seconds a row. The rows of a layer are bounded together: after so many times their number their bounds
        are what was proved by then. A row of 576 inputs takes some .3 s of a processor, and the time grows
        with the cube of the inputs.
    evidence_dir : path, optional
        Folder for what proves the bounds, so that anybody can check them with `check_layers`: of each layer
        the Hessian, (n, n) float64, and of each row its weights before and after and the certificate.
        Without one the report has the figures alone.
    """

    rows: int = 8
    seed: int = 0
    time_limit: float | None = None
    evidence_dir: str | os.PathLike[str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "certify.", whole_number, "rows")
        check_fields(self, "certify.", seed_number, "seed", below=RUN_SEEDS)
        check_fields(self, "certify.", finite_number, "time_limit", above=True)
        path("certify.evidence_dir", self.evidence_dir)


@dataclass(frozen=True, kw_only=True)
class LayerBounds:
    """Bounds of a random sample of the rows of a layer.

    Parameters
    ----------
    rows : tuple of int
        Those that were drawn, in order.
    of : int
        Rows of the layer.
    losses : tuple of float
        Objective of each at its new weights, as they are written, relative to pruning all of the row.
    bounds : tuple of float
        No new weights of the row's support have a smaller one. Proved.
    seed : int
        That drew the rows.
    """

    rows: tuple[int, ...]
    of: int
    losses: tuple[float, ...]
    bounds: tuple[float, ...]
    seed: int

    @property
    def gaps(self) -> FloatArray:
        """``(loss - bound) / loss`` of every row of the sample: its loss is that far from optimal at most."""
        pairs = zip(self.losses, self.bounds, strict=True)
        return np.array([relative_gap(loss, bound) for loss, bound in pairs], dtype=np.float64)

    @property
    def mean(self) -> float:
        """Mean gap of the sample."""
        return float(self.gaps.mean())

    @property
    def largest(self) -> float:
        """Largest gap of the sample; other rows may have a larger one."""
        return float(self.gaps.max())

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of 95 % confidence for the mean gap over all rows of the layer.

        By Student's t for sampling without replacement, as if gaps were normal; the mean itself where all
        rows were bounded, and 0 to 1 for a single row of several.
        """
        from scipy.stats import t

        count, mean = len(self.rows), self.mean
        if count == self.of:
            return mean, mean
        if count == 1:
            return 0.0, 1.0
        error = float(self.gaps.std(ddof=1)) * math.sqrt((1.0 - count / self.of) / count)
        reach = float(t.ppf(0.5 + 0.5 * CONFIDENCE, count - 1)) * error
        return max(0.0, mean - reach), min(1.0, mean + reach)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{len(self.rows)} of {self.of} rows, drawn by seed {self.seed}: at most {self.mean:.1%} of "
            f"their loss could be saved on average, {self.largest:.1%} in one row; on average over all rows "
            f"{low:.1%} to {high:.1%} with {CONFIDENCE:.0%} confidence"
        )


def bound_rows(
    program: LayerProgram,
    keep: Tensor,
    weights: Tensor,
    sample: RowSample,
    place: tuple[int, int] = (0, 0),
    name: str = "layer",
) -> LayerBounds:
    """Bound a random sample of the rows of a layer.

    `keep` (r, n) and `weights` (r, n) are what the layer has now; `place` is the number of its block and its
    own in there, by which each draws rows of its own. Evidence goes to ``sample.evidence_dir``.
    """
    draw = np.random.default_rng([sample.seed, *place])
    stem = f"block_{place[0]:04d}_layer_{place[1]:02d}"
    rows = np.sort(draw.permutation(program.rows)[: sample.rows])
    hessian = program.hessian.values.cpu().numpy()
    before, after = (part[rows].double().cpu().numpy() for part in (program.weights, weights))
    sets: BoolArray = keep[rows].cpu().numpy()
    hessian.flags.writeable = False
    losses, bounds = [], []
    supports = [program.support.of_row(int(kept.sum())) for kept in sets]
    problems = [
        BlockProblem(weights=before[at], hessian=hessian, support=support)
        for at, support in enumerate(supports)
    ]
    folder = None if sample.evidence_dir is None else Path(sample.evidence_dir)
    results = _bounded(problems, sets, sample.time_limit)
    for at, row in enumerate(rows.tolist()):
        problem, result = problems[at], results[at]
        loss, bound = _relative(problem, after[at], result.bound)
        losses.append(loss)
        bounds.append(bound)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_solution(_certificate_path(folder, stem, row), problem, result)
    found = LayerBounds(
        rows=tuple(rows.tolist()),
        of=program.rows,
        losses=tuple(losses),
        bounds=tuple(bounds),
        seed=sample.seed,
    )
    if folder is not None:
        header = {
            "format": KIND,
            "version": VERSION,
            "layer": name,
            "rows": list(found.rows),
            "supports": [support.as_json() for support in supports],
            "losses": losses,
            "bounds": bounds,
        }
        arrays = {"hessian": hessian, "before": before, "after": after}
        write_container(folder / f"{stem}{DATA}", header, arrays)
    return found


@dataclass(frozen=True, kw_only=True)
class CheckedRow:
    """One row after its check.

    `layer` is the name of its weight, `row` its number; `loss` and `bound` are computed anew from the
    evidence, relative to pruning all of the row; `notes` say what is wrong.
    """

    layer: str
    row: int
    loss: float
    bound: float
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the evidence proves what was stated."""
        return not self.notes


def check_layers(directory: str | os.PathLike[str]) -> Iterator[CheckedRow]:
    """Check the bounds of rows that `prune_layers` wrote to an evidence folder, trusting nobody.

    Of every row the weights after pruning must be of its support, and lose what is stated; the certificate
    must be of these very data and prove the stated bound.

    Parameters
    ----------
    directory : path-like
        ``RowSample(evidence_dir=...)`` of the run.

    Returns
    -------
    iterator of CheckedRow

    Raises
    ------
    ArgumentError
        If there is no evidence in the folder.
    InstanceFormatError
        If a file is missing or damaged.
    """
    folder = Path(directory)
    files = sorted(folder.glob(f"*{DATA}"))
    if not files:
        remedy = "pass the folder of RowSample(evidence_dir=...)"
        raise ArgumentError("directory", f"no bounded rows in {directory}", remedy)
    return _checked(folder, files)


def _checked(folder: Path, files: Sequence[Path]) -> Iterator[CheckedRow]:
    for file in files:
        header, arrays = read_container(file, KIND, VERSION, MOST_BYTES)
        stem = file.name.removesuffix(DATA)
        for at, row in enumerate(header["rows"]):
            support = support_from_json(header["supports"][at])
            problem = BlockProblem(weights=arrays["before"][at], hessian=arrays["hessian"], support=support)
            solution = read_solution(_certificate_path(folder, stem, row), problem)
            after = arrays["after"][at]
            loss, bound = _relative(problem, after, solution.bound)
            yield CheckedRow(
                layer=header["layer"],
                row=row,
                loss=loss,
                bound=bound,
                notes=(
                    *_wrong(problem, solution, support, after),
                    *_other("loss", header["losses"][at], loss),
                    *_other("bound", header["bounds"][at], bound),
                ),
            )


def _certificate_path(folder: Path, stem: str, row: int) -> Path:
    return folder / f"{stem}_row_{row:06d}.certificate.npz"


def _bounded(
    problems: Sequence[BlockProblem], sets: BoolArray, time_limit: float | None
) -> list[BlockSolution]:
    """Return the set of each row, or a better one, with a bound and its certificate."""
    chosen = [
        BlockSolution(
            keep=keep,
            weights=solved_weights(problem, keep, PROGRAM),
            objective=objective(problem, keep, PROGRAM),
            program=PROGRAM,
            method="layer program",
            support=stated_support(problem),
        )
        for problem, keep in zip(problems, sets, strict=True)
    ]
    limits = Limits(time_limit=None if time_limit is None else time_limit * len(problems))
    results = lower_bounds(problems, limits=limits, incumbents=chosen)
    if any(result.limit is Limit.INTERRUPTED for result in results):
        raise KeyboardInterrupt
    return results


def _relative(problem: BlockProblem, after: FloatArray, bound: float | None) -> tuple[float, float]:
    """Return loss of new weights and bound, each relative to pruning everything; no loss is negative."""
    assert problem.hessian is not None
    change = problem.weights - after
    loss, most = (float(0.5 * e @ problem.hessian @ e) for e in (change, problem.weights))
    if most <= 0.0:
        return 0.0, 0.0
    return loss / most, min(max(0.0, bound or 0.0), loss) / most


def _wrong(
    problem: BlockProblem, solution: BlockSolution, support: Support, after: FloatArray
) -> tuple[str, ...]:
    """Return what does not hold of a certificate, and of the weights that it is for."""
    checked = verify(problem, solution)
    notes = checked.notes if not checked.ok else ()
    kept = int((after != 0.0).sum())
    outside = f"{kept} weights are not 0, which {support} does not allow"
    return (*notes, outside) if not _within(support, after) else notes


def _within(support: Support, after: FloatArray) -> bool:
    """Return whether weights are zero outside of a set of a support; more zeros are fine."""
    return bool((after[~support.best(np.abs(after))] == 0.0).all())


def _other(what: str, stated: float, found: float) -> tuple[str, ...]:
    if math.isclose(stated, found, rel_tol=TOLERANCE, abs_tol=1e-12):
        return ()
    return (f"the {what} is {found:.9g}, stated as {stated:.9g}",)
