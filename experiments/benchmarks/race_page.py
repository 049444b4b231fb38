"""The race of exact solvers as a Markdown page."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Sequence
from importlib import metadata

from experiments.benchmarks.rivals import CONTENDERS, OURS, REPEATS, SHORT, Absent
from experiments.benchmarks.timing import Row
from formulations import Limits
from formulations.solvers import available_solvers

PACKAGES = ("cbs-opt", "numpy", "scipy", "numba")


def race_page(outcomes: Sequence[Row | Absent], limits: Limits, arguments: Sequence[str]) -> str:
    """Return the page: what was run, one table a program, where a rival is ahead, and every figure."""
    sections = [_introduction(limits, arguments)]
    programs = dict.fromkeys(outcome.case.program for outcome in outcomes)
    for program in programs:
        sections.append(_summary(program, [o for o in outcomes if o.case.program == program]))
    sections += [_ahead(outcomes), _agreement(outcomes, limits), _details(outcomes)]
    return "\n\n".join(sections) + "\n"


def _introduction(limits: Limits, arguments: Sequence[str]) -> str:
    command = f"OMP_NUM_THREADS=1 python -m experiments.benchmarks.exact_solvers {shlex.join(arguments)}"
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {metadata.version(name)}" for name in PACKAGES]
    notes = []
    for info in available_solvers():
        if ":" not in info.name and info.available:
            versions.append(f"{info.name} {info.version}")
        if ":" not in info.name and info.reason:
            notes.append(f"- {info.name}: {info.reason}.")
    contenders = [f"- `{contender.name}`: {contender.summary}." for contender in CONTENDERS]
    return "\n".join(
        [
            "# Exact solvers on the same blocks",
            "",
            f"    {command}",
            "",
            "Blocks of a digits network (1000 gradients, damping 1e-5), one thread, a proof to a relative "
            f"gap of {limits.rel_gap:g}, at most {limits.time_limit:g} s a solve, all in one run. Every set "
            "is evaluated and every certificate checked by the same code. Compilation and imports are not "
            f"timed; building a model is. Solves under {SHORT:g} s are repeated {REPEATS} times and the "
            "median counts. A solver driven through a model is asked for half the gap, so that its bound "
            "still meets the gap after its tolerances are taken off. Seconds are processor time of "
            "the one thread, which other work on the machine disturbs less than wall time; the last table "
            "has both. The limit is wall time: on a busy machine a solve that it stopped had less processor "
            "time, which its cell gives. A solver that left a block unproved is not tried on larger ones "
            "with the same share. Ratios are to `branch_and_bound`.",
            "",
            *contenders,
            "",
            f"Versions: {', '.join(versions)}.",
            *(["", *notes] if notes else []),
        ]
    )


def _summary(program: str, outcomes: Sequence[Row | Absent]) -> str:
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    lines = [f"## {program}", "", *_table_head(["n", "k", *(f"`{method}`" for method in methods)])]
    cells: dict[tuple[int, int], dict[str, Row | Absent]] = {}
    for outcome in outcomes:
        problem = outcome.case.problem
        cells.setdefault((problem.n, problem.n_prune), {})[outcome.method] = outcome
    for (n, k), found in cells.items():
        ours = found.get(OURS)
        texts = [_cell(found.get(method), ours) for method in methods]
        lines.append("| " + " | ".join([str(n), str(k), *texts]) + " |")
    return "\n".join(lines)


def _table_head(headings: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(headings) + " |", "|" + " ---: |" * len(headings)]


def _cell(outcome: Row | Absent | None, ours: Row | Absent | None) -> str:
    """Seconds and ratio where proved; what is left of the gap, or why nothing ran, elsewhere."""
    if outcome is None:
        return "-"
    if isinstance(outcome, Absent):
        return outcome.reason.removeprefix(f"{outcome.method}: ")
    ratio = ""
    if isinstance(ours, Row) and outcome.method != OURS:
        sign = "" if outcome.solution.proved else "> "
        ratio = f", {sign}{outcome.cpu / ours.cpu:.3g}x"
    if outcome.solution.proved:
        return f"{outcome.cpu:.3f} s{ratio}"
    return f"not in {outcome.cpu:.1f} s, gap {outcome.solution.gap:.1g}{ratio}"


def _ahead(outcomes: Iterable[Row | Absent]) -> str:
    """Return the cases in which a rival proved the optimum in less processor or wall time than we did."""
    rows = [outcome for outcome in outcomes if isinstance(outcome, Row)]
    ours = {_key(row): row for row in rows if row.method == OURS}
    lines = []
    for row in rows:
        mine = ours.get(_key(row))
        if row.method == OURS or mine is None or not row.solution.proved:
            continue
        if mine.solution.proved and row.cpu >= mine.cpu and row.wall >= mine.wall:
            continue
        lines.append(
            f"- {row.case.program}, n = {row.case.problem.n}, k = {row.case.problem.n_prune}: "
            f"`{row.method}` {row.cpu:.3f} s of processor and {row.wall:.3f} s of wall time, "
            f"ours {mine.cpu:.3f} s and {mine.wall:.3f} s"
        )
    return "\n".join(["## Where a rival is ahead", "", *(lines or ["Nowhere in this run."])])


def _key(row: Row) -> tuple[str, str]:
    return row.case.program, row.case.problem.name


def _agreement(outcomes: Iterable[Row | Absent], limits: Limits) -> str:
    """Whether all proofs of one case agree, to twice the gap that each was proved to."""
    proved: dict[tuple[str, str], list[float]] = {}
    rejected = []
    for outcome in outcomes:
        if not isinstance(outcome, Row):
            continue
        if not outcome.verified:
            rejected.append(f"- {outcome.method} on {outcome.case.problem.name}: not verified")
        if outcome.solution.proved and outcome.solution.objective is not None:
            proved.setdefault(_key(outcome), []).append(outcome.solution.objective)
    for (program, name), values in proved.items():
        if max(values) - min(values) > 2.0 * limits.rel_gap * abs(min(values)):
            rejected.append(f"- {program}, {name}: proved values from {min(values)!r} to {max(values)!r}")
    contested = sum(len(values) > 1 for values in proved.values())
    verdict = f"Two or more methods proved {contested} cases, with the same optimum each time."
    return "\n".join(["## Agreement", "", *(rejected or [verdict])])


def _details(outcomes: Iterable[Row | Absent]) -> str:
    headings = ["program", "n", "k", "method", "status", "objective", "gap", "nodes", "wall s", "cpu s"]
    lines = ["## Every solve", "", *_table_head(headings)]
    for outcome in outcomes:
        problem = outcome.case.problem
        cells = [outcome.case.program, str(problem.n), str(problem.n_prune), f"`{outcome.method}`"]
        if isinstance(outcome, Row):
            solution = outcome.solution
            objective = "-" if solution.objective is None else f"{solution.objective:.6e}"
            cells += [solution.termination.value, objective, f"{solution.gap:.1e}"]
            cells += [str(solution.stats.nodes), f"{outcome.wall:.3f}", f"{outcome.cpu:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
