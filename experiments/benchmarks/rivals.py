"""The exact solvers that are raced, each on the formulation that suits it best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from experiments.benchmarks.digits_blocks import digits_block
from experiments.benchmarks.lazy_cuts import gurobi_lazy_cuts
from experiments.benchmarks.timing import Case, ExactMethod, Row, timed
from formulations import BlockProblem, BlockSolution, Limits
from formulations.branch_and_bound import branch_and_bound
from formulations.errors import SolverUnavailableError
from formulations.outer_approximation import outer_approximation
from formulations.problem import PROGRAMS
from formulations.solvers import bridge, solve_with

OURS = "branch_and_bound"
SHORT = 1.0
"""Seconds; a shorter solve is repeated and its median times count."""
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One solver in the race.

    Attributes
    ----------
    name : str
    summary : str
        What it solves, for the page.
    method : callable
    programs : tuple of str
    solver : str or None
        The bridge whose absence or licence may keep it out.
    largest : mapping of str to int
        Largest block by program beyond which it is not worth a try; absent means any.
    """

    name: str
    summary: str
    method: ExactMethod
    programs: tuple[str, ...] = PROGRAMS
    solver: str | None = None
    largest: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A contender that did not run on a case, and why."""

    case: Case
    method: str
    reason: str

    @property
    def line(self) -> str:
        """One line beside those of the rows."""
        return f"{self.case.program:10} {self.case.problem.name:34} {self.method:20} not run: {self.reason}"


def _model(solver: str, **models: str) -> Callable[..., BlockSolution]:
    """`solver` on one model for each program."""

    def method(problem: BlockProblem, program: str, *, limits: Limits) -> BlockSolution:
        return solve_with(solver, problem, program, limits=limits, model=models[program])

    return method


LOW_RANK = {"selection": "selection_low_rank", "joint": "joint_low_rank_perspective"}
LINEARISED = 32
"""Largest block for the product linearisations, which need a variable for each pair."""

CONTENDERS = (
    Contender(name=OURS, summary="ours", method=branch_and_bound),
    Contender(
        name="gurobi",
        summary="Gurobi: selection as shifted QP, joint as perspective (rotated cones)",
        method=_model("gurobi", selection="selection_shifted_qp", joint="joint_perspective"),
        solver="gurobi",
    ),
    Contender(
        name="gurobi_lazy_cuts",
        summary="Gurobi: one tree of linear planes, lazily added, from our root bound and swap search",
        method=gurobi_lazy_cuts,
        solver="gurobi",
    ),
    Contender(name="scip", summary="SCIP: low-rank forms", method=_model("scip", **LOW_RANK), solver="scip"),
    Contender(
        name="mathopt",
        summary="SCIP inside OR-tools (MathOpt): low-rank forms",
        method=_model("mathopt", **LOW_RANK),
        solver="mathopt",
    ),
    Contender(
        name="outer_approximation",
        summary="HiGHS: our planes, integer masters solved again and again",
        method=outer_approximation,
        solver="highs",
    ),
    Contender(
        name="highs",
        summary="HiGHS: McCormick linearisation",
        method=_model("highs", selection="selection_mccormick"),
        programs=("selection",),
        solver="highs",
        largest={"selection": LINEARISED},
    ),
    Contender(
        name="cp_sat",
        summary="CP-SAT: McCormick linearisation",
        method=_model("cp_sat", selection="selection_mccormick"),
        programs=("selection",),
        solver="cp_sat",
        largest={"selection": LINEARISED},
    ),
)


def race(cases: Iterable[Case], contenders: Sequence[Contender], limits: Limits) -> Iterator[Row | Absent]:
    """Every contender on every case, one after the other.

    A contender that could not prove a block is not tried on larger ones with the same share of
    pruned weights; the cases of a program must come in order of size.
    """
    missing = {contender.name: _absence(contender) for contender in contenders}
    for contender in contenders:
        if not missing[contender.name]:
            _warm_up(contender)
    failed: dict[tuple[str, str, float], int] = {}
    for case in cases:
        problem = case.problem
        share = round(problem.n_prune / problem.n, 1)
        for contender in contenders:
            if case.program not in contender.programs:
                continue
            before = failed.get((contender.name, case.program, share))
            if reason := missing[contender.name] or _too_large(contender, case, before):
                yield Absent(case=case, method=contender.name, reason=reason)
                continue
            try:
                row = _median(case, contender, limits)
            except SolverUnavailableError as error:
                yield Absent(case=case, method=contender.name, reason=error.found)
                continue
            if not row.solution.proved:
                failed[contender.name, case.program, share] = problem.n
            yield row


def _too_large(contender: Contender, case: Case, before: int | None) -> str:
    """Return why the contender is not tried on the case; `before` is the size of a block left unproved."""
    n = case.problem.n
    largest = contender.largest.get(case.program, n)
    if n > largest:
        return f"not tried beyond n = {largest}"
    return "" if before is None else f"unproved at n = {before}"


def _absence(contender: Contender) -> str:
    """Why the contender cannot run at all; "" if it can."""
    if contender.solver is None:
        return ""
    info = bridge(contender.solver).info()
    return "" if info.available else info.reason


def _warm_up(contender: Contender) -> None:
    """Solve a small block of each program, so that no later time holds a compilation or an import."""
    for program in contender.programs:
        contender.method(digits_block(16, 1e-5, 10), program, limits=Limits(time_limit=60.0))


def _median(case: Case, contender: Contender, limits: Limits) -> Row:
    """One timed solve, or the median times of a few short ones; each starts from bare data."""
    rows: list[Row] = []
    while not rows or (len(rows) < REPEATS and rows[0].wall < SHORT):
        bare = replace(case, problem=replace(case.problem))
        rows.append(timed(bare, contender.name, contender.method, limits))
    return replace(
        rows[0],
        wall=statistics.median(row.wall for row in rows),
        cpu=statistics.median(row.cpu for row in rows),
        verified=all(row.verified for row in rows),
    )
